"""How pictures are evaluated: which metrics, of how many samples, with which seeds. In a recipe, or from the command line.

metrics: {fid: {}, kid: {subsets: 100}}   or a list of names; options are fields of the metric's class
count: 30000          samples of --data; none means all
seed: 0               sample i is drawn with seed + i
choice_seed: 0        which samples, and which of their captions
caption: random       or first
reference: same       real pictures: those whose captions are drawn; or all of --data
inception: {input: uint8, resize: none, filter: bicubic}    see nar_t2i.evaluation.features
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nar_t2i import recipe as recipes
from nar_t2i.errors import UserError
from nar_t2i.evaluation.metrics import METRICS, Metric

SCENE_ACCURACY = "scene_accuracy"
NAMES = (SCENE_ACCURACY, *METRICS)
CHOICES = {"caption": ("first", "random"), "reference": ("same", "all")}
INCEPTION = {"input": ("uint8", "unit", "symmetric"), "resize": None, "filter": ("bilinear", "bicubic", "lanczos")}
NEEDS = {"inception": "--inception FILE", "clip": "--clip FOLDER"}  # whose weights no package brings


@dataclass(frozen=True)
class Protocol:
    """See the head of the file. metrics: over features; scene_accuracy: whether prompts of scenes are scored, too."""

    name: str | None = None
    metrics: tuple[Metric, ...] = ()
    scene_accuracy: bool = True
    count: int | None = None
    seed: int = 0
    choice_seed: int = 0
    caption: str = "first"
    reference: str = "same"
    inception: Mapping[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> list[str]:
        """Kinds of features that the metrics need."""
        return list(dict.fromkeys(metric.features for metric in self.metrics))


def read_protocol(name: str) -> Protocol:
    """A recipe of this kind: a file, or the name of a shipped one. Raises UserError that names file and key."""
    if not Path(name).is_file():
        name = str(recipes.shipped() / "evaluation" / f"{name.removesuffix('.yaml')}.yaml")
    if not Path(name).is_file():
        known = sorted(path.stem for path in (recipes.shipped() / "evaluation").glob("*.yaml"))
        raise UserError(f"--protocol {Path(name).stem}: no such file, and none of the shipped ones: {', '.join(known)}")
    recipe = recipes.load(name)
    keys = [f.name for f in fields(Protocol) if f.name not in ("name", "scene_accuracy")]
    for key, value in recipe.config.items():
        if key not in keys:
            raise recipe.error(key, f"is unknown; the keys are {', '.join(keys)}")
        if key in CHOICES and value not in CHOICES[key]:
            raise recipe.error(key, f"must be one of {', '.join(CHOICES[key])}, not {value!r}")
        if key in ("count", "seed", "choice_seed") and not _is_whole(value) and not (key == "count" and value is None):
            raise recipe.error(key, f"must be a whole number, not {value!r}")
    inception = recipe.config.get("inception") or {}
    if not isinstance(inception, dict):
        raise recipe.error("inception", f"must be a mapping, not {inception!r}")
    for key, value in inception.items():
        if key not in INCEPTION:
            raise recipe.error(f"inception.{key}", f"is unknown; the keys are {', '.join(INCEPTION)}")
        if (value not in INCEPTION[key]) if INCEPTION[key] else not (value is None or (_is_whole(value) and value)):
            raise recipe.error(
                f"inception.{key}", f"must be {' or '.join(INCEPTION[key] or ('none', 'pixels a side'))}, not {value!r}"
            )
    if not recipe.config.get("metrics"):
        raise recipe.error("metrics", f"is missing; there are {', '.join(NAMES)}")
    try:
        metrics, accuracy = chosen_metrics(recipe.config["metrics"])
    except UserError as error:
        raise recipe.error("metrics", str(error)) from error
    unused = [key for key in ("count", "choice_seed", "caption", "reference") if not metrics]
    unused += ["reference"] * (not any(metric.needs_real for metric in metrics)) + ["inception"] * (
        not any(m.features == "inception" for m in metrics)
    )
    if found := [key for key in unused if key in recipe.config]:
        raise recipe.error(found[0], "none of the metrics uses it")
    rest = {key: recipe.config[key] for key in keys if key in recipe.config and key not in ("metrics", "inception")}
    return Protocol(Path(name).stem, metrics, accuracy, inception=inception, **rest)


def chosen_metrics(named: Any) -> tuple[tuple[Metric, ...], bool]:
    """Metrics, by a list of names or by {name: options}, and whether scene accuracy is one of them."""
    options = {str(name): None for name in named} if isinstance(named, (list, tuple)) else named
    if not isinstance(options, Mapping) or not all(given is None or isinstance(given, Mapping) for given in options.values()):
        raise UserError(f"metrics are a list of names, or a mapping from names to options, not {named!r}")
    metrics = []
    for name, given in options.items():
        if name not in NAMES:
            raise UserError(f"{name!r} is no metric; there are {', '.join(NAMES)}")
        known = [f.name for f in fields(METRICS[name])] if name in METRICS else []
        for key, value in (given or {}).items():
            if key not in known or not _is_whole(value):
                raise UserError(f"{name}: option {key}={value!r} is not one of its whole numbers ({', '.join(known) or 'none'})")
        if name in METRICS:
            metrics.append(METRICS[name](**(given or {})))
    return tuple(metrics), SCENE_ACCURACY in options


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
