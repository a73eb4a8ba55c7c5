"""A recipe: a YAML file that is a diff over the recipes it extends, resolved to one plain configuration.

`extends: ../base/scenes.yaml` (or a list of them, later ones on top) names the recipes below, relative to the file that
says it. Mappings merge deeply; every other value, lists included, replaces what was there. Five rules beyond that:

- Where a recipe changes a `class_path`, the `init_args` below it are dropped: they belonged to another class.
- A mapping whose keys are all numbers, laid over a list, changes those: `trainer.callbacks.0.init_args.decay=0.9`.
- A recipe that two others extend is read once, before the first of them.
- Interpolation (`${model.init_args.network.init_args.width}`, `${oc.env:HOME}`) is resolved over the merged whole.
- A value that begins with `~/` is a path in the user's folder.

Every mistake is a UserError that names the file and the key.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from nar_t2i.errors import UserError

log = logging.getLogger(__name__)

COMMAND_LINE = "command line"
MODEL = "model.class_path"  # set by recipes that are whole, not by what is laid over them


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    config: plain dicts, lists and scalars.
    sources: for each dotted key, the file that set it, or "command line".
    name: the file that was asked for.
    """

    config: dict[str, Any]
    sources: dict[str, str]
    name: str

    def source(self, key: str) -> str:
        """Which file is to blame for `key`: the one that set it, or something below it, or what it is part of."""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            prefix = ".".join(parts[:end])
            inside = [self.sources[k] for k in self.sources if k == prefix or k.startswith(prefix + ".")]
            if inside:
                return inside[-1]
        return self.name

    def error(self, key: str, reason: str) -> UserError:
        return UserError(f"{self.source(key)}: key {key}: {reason}")


def load(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), option: str = "--config") -> Recipe:
    """Read recipes (later ones on top), lay `overrides` ("a.b.c=value", the value in YAML) over them, and resolve.

    A name that is no file is looked up among the recipes that travel with the package. option: of the command, that names them.
    """
    names = [paths] if isinstance(paths, (str, Path)) else list(paths)
    config: dict[str, Any] = {}
    sources: dict[str, str] = {}
    seen: list[Path] = []
    for name in names:
        before, known = dict(sources), len(seen)
        path = _find(str(name), None, "", option)
        _read(path, (), config, sources, seen)
        bases = {str(base) for base in seen[known:]} - {str(path)}
        if before.get(MODEL) and sources.get(MODEL) in bases:
            log.warning("%s: %s extends %s, a whole recipe, which is laid over what was named before", option, path, sources[MODEL])
    _merge(config, _parse_overrides(overrides), "", COMMAND_LINE, sources)
    recipe = Recipe(config, sources, str(names[0]) if names else COMMAND_LINE)
    return Recipe(_resolve(recipe), sources, recipe.name)


def shipped() -> Path:
    """The folder of the recipes that travel with the package: inside it when installed, beside it in a checkout."""
    package = Path(str(resources.files("nar_t2i")))
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def _find(name: str, folder: Path | None, file: str, key: str) -> Path:
    """The file that `name` means, said by `file` in `folder`."""
    candidates = [(folder / name) if folder else Path(name), shipped() / name, shipped() / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    where = f"{file}: key {key}" if file else f"key {key}"
    raise UserError(f"{where}: recipe {name!r} does not exist, neither there nor among the shipped ones in {shipped()}")


def _read(path: Path, chain: tuple[Path, ...], config: dict[str, Any], sources: dict[str, str], seen: list[Path]) -> None:
    """Merge the recipe at `path`, and first all that it extends, into `config`. seen: what was merged before, which nothing
    that extends it merges again: a second recipe on the same base is a difference, too, and does not undo the first one's."""
    identity = path.resolve()
    if identity in chain:
        circle = [*chain[chain.index(identity) :], identity]
        raise UserError(f"{path}: key extends: circular: {' → '.join(p.name for p in circle)}")
    if chain and any(identity == other.resolve() for other in seen):
        return
    content = _parse(path)
    extends = content.pop("extends", None)
    extends = [extends] if isinstance(extends, str) else extends or []
    if not (isinstance(extends, list) and all(isinstance(name, str) for name in extends)):
        raise UserError(f"{path}: key extends: must be a path or a list of paths, not {extends!r}")
    for name in extends:
        _read(_find(name, path.parent, str(path), "extends"), (*chain, identity), config, sources, seen)
    _merge(config, content, "", str(path), sources)
    seen.append(path)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{path}:{line} not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, not a {type(content).__name__}")
    if "parameters" in content and "method" in content:
        raise UserError(f"{path}: a sweep, for wandb sweep {path}")
    return content


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """All overrides as one tree, so that the order of `x.class_path=…` and `x.init_args.y=…` does not matter."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{COMMAND_LINE}: {override!r} is not of the form a.b.c=value")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{COMMAND_LINE}: key {key}: {text!r} is not a YAML value; quote it") from error
        if isinstance(value, str) and " #" in text and text.lstrip()[:1] not in tuple("'\"!&|>"):
            value = text  # all of it: in a text on a command line, nothing is a comment
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = _without_none_strings(value)
    return tree


def _without_none_strings(value: Any) -> Any:
    """`None`, as Python (and so a W&B sweep) writes null."""
    if isinstance(value, dict):
        return {k: _without_none_strings(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_none_strings(v) for v in value]
    return None if value == "None" else value


def _merge(below: dict[str, Any], above: dict[str, Any], prefix: str, source: str, sources: dict[str, str]) -> None:
    """Lay `above` over `below` in place, noting where each leaf came from."""
    if "class_path" in below and above.get("class_path", below["class_path"]) != below["class_path"]:
        for key in [k for k in below if k in ("init_args", "dict_kwargs")]:
            del below[key]
            _forget(sources, f"{prefix}{key}")
    for name, value in above.items():
        key = f"{prefix}{name}"
        present = below.get(name)
        if isinstance(value, dict) and isinstance(present, list) and all(str(k).isdigit() for k in value):
            present = {str(i): item for i, item in enumerate(present)}
            _merge(present, {str(int(k)): v for k, v in value.items()}, f"{key}.", source, sources)
            beyond = [number for number in present if int(number) >= len(present)]
            if beyond:
                raise UserError(f"{source}: key {key}: the list has no item {beyond[0]}")
            below[name] = [present[number] for number in sorted(present, key=int)]
        elif isinstance(value, dict) and isinstance(present, dict):
            _merge(present, value, f"{key}.", source, sources)
        else:
            _forget(sources, key)
            below[name] = value
            for leaf in _leaves(key, value):
                sources[leaf] = source


def _forget(sources: dict[str, str], key: str) -> None:
    for known in [k for k in sources if k == key or k.startswith(f"{key}.")]:
        del sources[known]


def _leaves(key: str, value: Any) -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield key
    for name, item in items:
        yield from _leaves(f"{key}.{name}", item)


def _at_home(value: Any) -> Any:
    """Paths in the user's folder, written with a tilde."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _resolve(recipe: Recipe) -> dict[str, Any]:
    try:
        return _at_home(OmegaConf.to_container(OmegaConf.create(recipe.config), resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        key = (error.full_key or "").replace("[", ".").replace("]", "")
        missing = isinstance(error, MissingMandatoryValue)
        raise recipe.error(key, "has no value yet (???); give one" if missing else _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
