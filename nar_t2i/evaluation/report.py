"""`nar-t2i report`: one self-contained report.html for a quickstart folder or a single run, and one table of several.

It shows what it finds and leaves out what is missing. Everything that comes from files is escaped, and the page asks
for nothing outside itself. From `evaluation/` it reads

    scores.json    the `tokenizer` and `generator` parts of metrics.json, and `shipped`: what `generator` holds, of the
                   small model in the package
    samples.json   [{"file", "prompt", "category", "passed", "set": "seen" or "held_out", "model"}, …], the files
                   relative to `evaluation/`
    *.png          shown whole where there is no samples.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nar_t2i.errors import UserError
from nar_t2i.evaluation.comparison import merge_comparisons
from nar_t2i.evaluation.report_curves import charts, read_curves
from nar_t2i.evaluation.report_html import Markup, figure, join, meter, page, picture, section, table, tag
from nar_t2i.evaluation.scene_prompts import CATEGORIES
from nar_t2i.evaluation.side_by_side import read_entries, write_side_by_side
from nar_t2i.evaluation.values import is_number, mapping_at, value_at
from nar_t2i.files import read_json, write_json, write_text

STAGES = ("tokenizer", "text", "generator")  # run folders of a quickstart
SIDE_BY_SIDE = "side-by-side.html"
MOST_SAMPLES = 96  # cards of a set of prompts; the rest is counted
STAGE_COLORS = ("#98a2b3", "#7a9bd8", "#2f6fde", "#1b3f8f", "#d9a22b")
SETS = {"seen": "Seen combinations", "held_out": "Held-out combinations"}


def main(arguments: argparse.Namespace) -> int:
    """A report of each run; of several things, or of an evaluation's file, one table; of ablations alone, one comparison."""
    paths = [Path(name) for name in arguments.runs]
    if all((path / "comparison.json").exists() for path in paths):
        if arguments.out is not None:
            raise UserError(f"--out: the comparison of ablations is written into the first of them, {paths[0]}")
        print(merge_comparisons(paths))
        return 0
    folders = [path for path in paths if not path.is_file() and not (path / "comparison.json").exists()]
    for folder in folders:
        runs_of(folder)
    for folder in folders:
        if _goes_on(folder) or not (folder / "metrics.json").exists():
            write_json(folder / "metrics.json", collect_metrics(folder))
        print(f"{write_report(folder)}\n{folder / 'metrics.json'}")
    if len(paths) > 1 or not folders or arguments.out is not None:
        out = paths[0].resolve().parent / SIDE_BY_SIDE if arguments.out is None else Path(arguments.out)
        print(write_side_by_side([entry for path in paths for entry in read_entries(path)], out))
    return 0


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` and return its path. UserError where the folder is neither a quickstart nor a run."""
    folder = Path(folder)
    runs = runs_of(folder)
    path = folder / "metrics.json"
    metrics = read_json(path) if path.exists() else collect_metrics(folder)
    if not isinstance(metrics, dict):
        raise UserError(f"{path}: must hold one JSON object")
    title = f"nar_t2i: {folder.resolve().name}"
    text = page(
        title,
        tag("h1", title),
        _subtitle(folder),
        _headline(metrics),
        _accuracy(metrics),
        _samples(folder),
        [_run_section(run) for run in runs],
        _wall_time(metrics),
        _decoding(metrics),
        section("Configuration", [_configuration(run) for run in runs], _raw("metrics.json", metrics)),
        section("Versions and machine", _versions(runs, metrics)),
    )
    write_text(folder / "report.html", text)
    return folder / "report.html"


def _goes_on(folder: Path) -> bool:
    """Whether there may be more than when a report was written: of a run always, of a quickstart until it has ended."""
    stages = folder / "stages.json"
    done = mapping_at(read_json(stages)).get("done") if stages.exists() else None
    is_run = (folder / "metrics.csv").exists() or (folder / "config.yaml").exists()
    return is_run or (isinstance(done, list) and "evaluation" not in done)


def collect_metrics(folder: Path) -> dict[str, Any]:
    """What metrics.json would hold: a quickstart's scores and seconds, or the last values that a run logged."""
    if (folder / "metrics.csv").exists():
        curves = read_curves(folder / "metrics.csv")
        last = {name: float(values[-1]) for name, (_, values) in curves.items()}
        return {"steps": int(max((steps[-1] for steps, _ in curves.values()), default=0)), "last": last}
    scores, stages = folder / "evaluation/scores.json", folder / "stages.json"
    metrics = dict(mapping_at(read_json(scores))) if scores.exists() else {}
    seconds = mapping_at(read_json(stages), "seconds") if stages.exists() else {}
    if seconds:
        metrics["wall_seconds"] = {name: round(value, 1) for name, value in seconds.items() if is_number(value)}
    return metrics


@dataclass(frozen=True)
class Run:
    """A run folder. name: "" where the folder is reported alone."""

    folder: Path
    name: str

    @cached_property
    def config_text(self) -> str | None:
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    @property
    def sample_prompts(self) -> list[str]:
        """The prompts of the sample grids, in their order."""
        try:
            config = yaml.safe_load(self.config_text or "")
        except yaml.YAMLError:
            return []
        prompts = value_at(config, "model", "init_args", "sample_prompts")
        return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def runs_of(folder: Path) -> list[Run]:
    """The runs of a folder; UserError where there are none."""
    if not folder.exists():
        raise UserError(f"{folder}: does not exist")
    if (folder / "metrics.csv").is_file() or ((folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()):
        return [Run(folder, "")]
    runs = [Run(folder / name, name) for name in STAGES if (folder / name / "metrics.csv").is_file()]
    if (folder / "judged").is_dir() or any(folder.glob("runs/*/*/ablation.json")):
        raise UserError(f"{folder}: an ablation that is not finished; the same nar-t2i ablate goes on with it")
    if not runs:
        raise UserError(f"{folder}: neither a run (it has no metrics.csv) nor a quickstart (no {' or '.join(STAGES)} run in it)")
    return runs


# ---- parts of the page -----------------------------------------------------------------------------------------------


def _subtitle(folder: Path) -> Markup:
    stages = folder / "stages.json"
    if settings := mapping_at(read_json(stages), "settings") if stages.exists() else {}:
        flags = [f"--{key.replace('_', '-')}" for key, value in settings.items() if value is True]
        scale = str(settings.get("scale", "full"))
        start = {"full": "nar-t2i quickstart", "shortened": "nar-t2i quickstart --shortened"}
        command = start.get(scale, f"NAR_T2I_QUICKSTART_SCALE={scale} nar-t2i quickstart")
        return tag("p", "Made by ", tag("code", " ".join([command, *flags])), f" in {folder}.")
    return tag("p", f"The run in {folder}.")


def _headline(metrics: Mapping[str, Any]) -> Markup | None:
    accuracy = mapping_at(metrics, "generator", "scene_accuracy")
    tiles = [
        _accuracy_tile("single object, seen", accuracy, "seen", "single_object"),
        _accuracy_tile("overall, seen", accuracy, "seen", "overall"),
        _accuracy_tile("overall, held out", accuracy, "held_out", "overall"),
        _tile("shuffled prompts", _share(value_at(accuracy, "shuffled", "overall")), _chance_note(accuracy)),
        _tile("tokenizer", _text(value_at(metrics, "tokenizer", "psnr"), "{:.1f} dB"), "PSNR, held-out scenes"),
        _tile("codebook use", _text(value_at(metrics, "tokenizer", "codebook_use"), "{:.0%}"), "of the codes occur"),
        _tile("detector ratio", _share(value_at(metrics, "tokenizer", "detector_ratio")), "reconstructions / originals"),
        _tile("decoder passes", _text(value_at(metrics, "generator", "decoder_passes"), "{:.0f}"), "calls a picture"),
        _tile("wall time", _duration(value_at(metrics, "wall_seconds", "total")), "installation included"),
    ]
    last = mapping_at(metrics, "last")
    tiles += [_tile(name.replace("_", " "), _text(value, "{:.4g}"), "last value") for name, value in last.items()]
    shown = [tile for tile in tiles if tile]
    return tag("div", shown, class_="tiles") if shown else None


def _tile(name: str, value: str | None, note: str | None) -> Markup | None:
    if value is None:
        return None
    return tag("div", tag("span", name), tag("b", value), tag("span", note or ""), class_="tile")


def _accuracy_tile(name: str, accuracy: Any, which: str, category: str) -> Markup | None:
    return _tile(name, _share(value_at(accuracy, which, category)), _range(value_at(accuracy, which, "interval", category)))


def _accuracy(metrics: Mapping[str, Any]) -> Markup | None:
    """Categories down, sets of prompts across."""
    accuracy = value_at(metrics, "generator", "scene_accuracy")
    if not isinstance(accuracy, Mapping):
        return None
    shipped = mapping_at(metrics, "shipped", "scene_accuracy")
    columns = [(SETS.get(name, name), value, False) for name, value in accuracy.items() if name != "shuffled"]
    columns += [("Shuffled prompts", accuracy.get("shuffled"), True)]
    columns += [(f"Shipped model: {SETS[name].lower()}", shipped[name], False) for name in SETS if name in shipped]
    columns = [(title, value, quiet) for title, value, quiet in columns if isinstance(value, Mapping)]
    chance = mapping_at(accuracy, "shuffled", "chance", "derangement")
    present = [c for c in (*CATEGORIES, "overall") if any(c in value for _, value, _ in columns)]
    rows = [
        [c.replace("_", " "), *(_cell(value, c, quiet) for _, value, quiet in columns), _share(value_at(chance, c)) or "–"]
        for c in present
    ]
    if not rows:
        return None
    return section(
        "Scene accuracy",
        tag(
            "p",
            "The share of pictures that show exactly the objects, colours, counts and places of their prompt, one "
            "picture a prompt, with 95% intervals. Shuffled: the same pictures held against other seen prompts of "
            "their category; chance: what a perfect generator would get there, computed exactly.",
        ),
        table(["category", *(title for title, _, _ in columns), "Chance"], rows, total=present[-1] == "overall"),
    )


def _cell(scores: Mapping[str, Any], category: str, quiet: bool) -> Any:
    value = scores.get(category)
    if not is_number(value):
        return "–"
    interval, count = value_at(scores, "interval", category), value_at(scores, "count", category)
    note = tag("span", _range(interval) or "", f", n={count}" if is_number(count) else "", class_="small")
    return join([_share(value), note, meter(value, quiet)])


def _samples(folder: Path) -> Markup | None:
    base = folder / "evaluation"
    path = base / "samples.json"
    if not path.is_file():
        whole = [figure(picture(file, file.stem), file.name) for file in sorted(base.glob("*.png"))]
        return section("Generated pictures", [tag("div", one, class_="card") for one in whole if one])
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: must hold a list of JSON objects")
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in entries:
        prompts = groups.setdefault(str(entry.get("set", "")), {})
        prompts.setdefault(str(entry.get("prompt", "")), []).append(entry)
    return section(
        "Generated pictures",
        tag("p", "The mark says whether the detector finds exactly what the prompt asks for."),
        [_sample_set(base, name, prompts) for name, prompts in groups.items()],
    )


def _sample_set(base: Path, name: str, prompts: Mapping[str, list[dict[str, Any]]]) -> list[Markup | None]:
    shown = list(prompts.items())[:MOST_SAMPLES]
    several = len({entry.get("model") for _, entries in shown for entry in entries}) > 1
    cards = [_sample_card(base, prompt, entries, several) for prompt, entries in shown]
    left = len(prompts) - len(shown)
    return [
        tag("h3", SETS.get(name, name)) if name else None,
        tag("div", cards, class_="samples two" if several else "samples"),
        tag("p", f"{left} more in {base / 'samples.json'}.") if left else None,
    ]


def _sample_card(base: Path, prompt: str, entries: Iterable[dict[str, Any]], several: bool) -> Markup:
    """A prompt with its picture, or with those of several models side by side."""
    pictures = []
    for entry in entries:
        file = base / str(entry.get("file", ""))
        inside = file.resolve().is_relative_to(base.resolve())
        image = picture(file, prompt) if inside else None
        passed = entry.get("passed")
        mark = None if passed is None else tag("span", "✓" if passed else "✗", class_="good" if passed else "bad")
        label = [mark, " ", str(entry.get("model" if several else "category", "")).replace("_", " ")]
        pictures.append(tag("div", image or tag("span", "no picture", class_="small"), tag("figcaption", label)))
    return tag("figure", tag("div", pictures, class_="pair"), tag("figcaption", prompt), class_="card")


def _run_section(run: Run) -> Markup | None:
    name = run.name.capitalize() or "Training"
    curves = run.folder / "metrics.csv"
    shown = (
        charts(read_curves(curves)) if curves.exists() else tag("p", "Nothing has been logged yet: see trainer.log_every_n_steps.")
    )
    return section(name, shown, _pictures_of(run))


def _pictures_of(run: Run) -> list[Markup | None]:
    """The first and the last picture of each kind that training left (`<kind>-<step>.png`)."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted((run.folder / "pictures").glob("*-*.png")):
        kinds.setdefault(path.stem.rpartition("-")[0], []).append(path)
    shown: list[Markup | None] = []
    for kind, paths in kinds.items():
        chosen = [paths[0], paths[-1]] if len(paths) > 1 else paths
        figures = [figure(picture(path, path.stem), f"after step {_step_of(path)}") for path in chosen]
        note = {
            "reconstructions": "Pairs, left to right: a held-out image, and what its tokens decode to.",
            "samples": "The recipe's prompts, row by row:",
        }.get(kind)
        prompts = run.sample_prompts if kind == "samples" else []
        shown += [
            tag("h3", kind.replace("_", " ").capitalize()),
            tag("p", note) if note else None,
            tag("div", [tag("div", one, class_="card") for one in figures if one]),
            tag("ol", [tag("li", prompt) for prompt in prompts], class_="prompts") if prompts else None,
        ]
    return shown


def _step_of(path: Path) -> str:
    step = path.stem.rpartition("-")[2]
    return str(int(step)) if step.isdigit() else step


def _wall_time(metrics: Mapping[str, Any]) -> Markup | None:
    seconds = {k: v for k, v in mapping_at(metrics, "wall_seconds").items() if is_number(v)}
    total = seconds.pop("total", sum(seconds.values()))
    if not total:
        return None
    bars = [
        tag("i", style=f"flex:{value:.3f};background:{STAGE_COLORS[index % len(STAGE_COLORS)]}", title=name)
        for index, (name, value) in enumerate(seconds.items())
    ]
    rows = [[name, _duration(value), f"{value / total:.0%}"] for name, value in [*seconds.items(), ("total", total)]]
    return section("Wall time", tag("div", bars, class_="stack"), table(["stage", "time", "share"], rows, total=True))


def _decoding(metrics: Mapping[str, Any]) -> Markup | None:
    names = {
        "decoder_passes": "decoder passes a picture",
        "decoder_rows": "row evaluations a picture",
        "steps": "steps",
        "guidance_scale": "guidance scale",
        "images_per_second": "pictures a second",
        "precision": "precision",
        "seed": "seed",
    }
    generator = mapping_at(metrics, "generator")
    rows = [[title, _plain(generator[key])] for key, title in names.items() if generator.get(key) is not None]
    return section("Decoding", table([], rows, class_="plain")) if rows else None


def _configuration(run: Run) -> Markup | None:
    if run.config_text is None:
        return None
    title = f"{run.name}/config.yaml" if run.name else "config.yaml"
    return tag("details", tag("summary", title), tag("pre", run.config_text))


def _raw(name: str, value: Any) -> Markup:
    return tag("details", tag("summary", name), tag("pre", json.dumps(value, indent=2)))


def _versions(runs: Iterable[Run], metrics: Mapping[str, Any]) -> Markup | None:
    """The machine, and the versions of the last run."""
    files = [run.folder / "versions.json" for run in runs if (run.folder / "versions.json").is_file()]
    machine = metrics.get("machine")
    facts = list(_flattened(machine)) if isinstance(machine, Mapping) else [("machine", machine)] if machine else []
    facts += _flattened(read_json(files[-1])) if files else []
    return table([], [[key, _plain(value)] for key, value in facts], class_="plain") if facts else None


def _flattened(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if isinstance(inner, Mapping):
            yield from _flattened(inner, "" if key == "packages" else f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}".replace("_", " "), inner


# ---- values ----------------------------------------------------------------------------------------------------------


def _text(value: Any, form: str) -> str | None:
    return form.format(value) if is_number(value) else None


def _share(value: Any) -> str | None:
    return _text(value, "{:.3f}")


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _range(interval: Any) -> str | None:
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        return f"{interval[0]:.3f} to {interval[1]:.3f}"
    return None


def _chance_note(accuracy: Any) -> str | None:
    chance = _share(value_at(accuracy, "shuffled", "chance", "derangement", "overall"))
    return chance and f"chance {chance}"


def _duration(seconds: Any) -> str | None:
    if not is_number(seconds):
        return None
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
