"""Any number of runs, evaluations, ablations and results of suites in one table: what each scored, and where two numbers were
made by different protocols, so that they do not compare.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nar_t2i.errors import UserError
from nar_t2i.evaluation.pieces import work_folder
from nar_t2i.evaluation.report_html import figure, join, page, picture, section, table, tag
from nar_t2i.evaluation.scene_prompts import CATEGORIES
from nar_t2i.evaluation.values import is_number, mapping_at, numbers_of
from nar_t2i.files import read_json, write_text
from nar_t2i.folders import flat

DECODING = (
    "steps", "guidance_scale", "candidates", "seed", "bits", "decoder_passes", "decoder_rows", "truncated_prompts",
    "images_per_second",
)  # fmt: skip
# Keys of a protocol that say what was used, and those beside them that say how it was called.
ALIKE = (("data.hash", "data.source"), ("features.sha256", "features.file"), ("features.sha256", "features.folder"))
OTHER = "†"  # marks a number by another protocol than the row's first


@dataclass(frozen=True)
class Number:
    """low, high: its 95% interval, where one is known. protocol: what has to be the same where two are compared."""

    value: float
    low: float | None = None
    high: float | None = None
    protocol: Mapping[str, Any] | None = None


@dataclass
class Entry:
    """A column. numbers: by their names, in the order in which they are shown. about: what is behind them."""

    name: str
    source: str
    numbers: dict[str, Number] = field(default_factory=dict)
    about: Any = None
    sheets: list[Path] = field(default_factory=list)


def read_entries(path: Path) -> list[Entry]:
    """What a path holds: a run's or quickstart's folder with a metrics.json, a folder of an ablation, a JSON file of `nar-t2i
    evaluate` or `nar-t2i suite ingest`. Raises UserError for anything else."""
    if (path / "comparison.json").is_file():
        return _ablation(path)
    content = read_json(path / "metrics.json" if path.is_dir() else path)
    kind = content.get("kind") if isinstance(content, dict) else None
    if path.is_dir():
        return [_run(path, content)]
    if kind == "evaluation":
        return _evaluation(path, content)
    if kind == "suite":
        return [_suite(path, content)]
    raise UserError(f"{path}: neither an evaluation nor a suite's scores; make one with nar-t2i evaluate or nar-t2i suite ingest")


def write_side_by_side(entries: Sequence[Entry], out: Path) -> Path:
    """Write the table as `out` (HTML) and beside it as CSV. UserError where `out` is named like another kind of file, as those are
    that were read."""
    if out.suffix not in (".html", ".htm"):
        named = out.with_suffix(".html") if out.name else Path("side-by-side.html")
        raise UserError(f"--out {out}: is the page, beside which a .csv is written; name it {named}")
    entries = _named_apart(entries)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.with_suffix(".csv"), as_csv(entries))
    write_text(out, as_html(entries))
    return out


def differing(entries: Sequence[Entry]) -> dict[str, dict[str, list[str]]]:
    """Number → entry → the keys of its protocol that differ from those of the first entry that tells one."""
    found: dict[str, dict[str, list[str]]] = {}
    for name in _names(entries):
        first: dict[str, Any] | None = None
        for entry in entries:
            number = entry.numbers.get(name)
            if number is None or number.protocol is None:
                continue
            told = flat(number.protocol)
            for known, name_alone in ALIKE:  # what is the same, wherever it lies
                if any(key.startswith(known) for key in told):
                    told.pop(name_alone, None)
            first = told if first is None else first
            if keys := sorted(key for key in {**first, **told} if first.get(key) != told.get(key)):
                found.setdefault(name, {})[entry.name] = keys
    return found


def as_csv(entries: Sequence[Entry]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["entry", "measure", "value", "low", "high", "other_protocol"])
    others = differing(entries)
    for entry in entries:
        for name, number in entry.numbers.items():
            interval = ["" if bound is None else bound for bound in (number.low, number.high)]
            writer.writerow([entry.name, name, number.value, *interval, " ".join(others.get(name, {}).get(entry.name, ()))])
    return file.getvalue()


def as_html(entries: Sequence[Entry]) -> str:
    others = differing(entries)
    rows = [[name, *(_cell(entry, name, others) for entry in entries)] for name in _names(entries)]
    notes = [[name, entry, ", ".join(keys)] for name, by_entry in others.items() for entry, keys in by_entry.items()]
    warning = tag("p", f"{OTHER}: by another protocol than the first of its row; such numbers do not compare.") if notes else None
    sheets = [figure(picture(sheet, f"{entry.name}: {sheet.stem}"), f"{entry.name}: {sheet.stem.rpartition('-')[2]}")
              for entry in entries for sheet in entry.sheets]  # fmt: skip
    behind = [tag("details", tag("summary", entry.name), tag("pre", json.dumps(entry.about, indent=2))) for entry in entries]
    return page(
        "nar_t2i: side by side",
        tag("h1", "Side by side"),
        section("Scores", warning, table(["", *(entry.name for entry in entries)], rows)),
        section("Where protocols differ", table(["score", "entry", "keys"], notes)) if notes else None,
        section("The first pictures", [tag("div", sheet, class_="card") for sheet in sheets if sheet is not None]),
        section(
            "Sources", table(["entry", "read from"], [[entry.name, entry.source] for entry in entries], class_="plain"), behind
        ),
    )


def _cell(entry: Entry, name: str, others: Mapping[str, Mapping[str, Any]]) -> Any:
    number = entry.numbers.get(name)
    if number is None:
        return "–"
    mark = OTHER if entry.name in others.get(name, {}) else ""
    value = f"{number.value:,.0f}" if number.value == int(number.value) and abs(number.value) >= 10 else f"{number.value:.4g}"
    if number.low is None or number.high is None:
        return value + mark
    return join([value + mark, tag("span", f"{number.low:.3f} to {number.high:.3f}", class_="small")])


def _names(entries: Iterable[Entry]) -> list[str]:
    """All names; those that several entries have stand where the first has them."""
    return list(dict.fromkeys(name for entry in entries for name in entry.numbers))


def _named_apart(entries: Sequence[Entry]) -> list[Entry]:
    """Entries of one name get the folder that they are from, and else a number, too."""
    taken: dict[str, Entry] = {}
    for entry in entries:
        folder = Path(entry.source).resolve().parent.name
        names = (entry.name, f"{entry.name} ({folder})", *(f"{entry.name} ({count})" for count in range(2, len(entries) + 2)))
        entry.name = next(name for name in names if name not in taken)
        taken[entry.name] = entry
    return list(taken.values())


# ---- what is read ----------------------------------------------------------------------------------------------------


def _run(path: Path, content: Any) -> Entry:
    """A run or a quickstart, by its metrics.json."""
    content = content if isinstance(content, Mapping) else {}
    generator = mapping_at(content.get("generator"))
    numbers = dict(_scene_accuracy(generator.get("scene_accuracy"), generator.get("seed")))
    numbers |= {f"tokenizer: {name}": Number(value) for name, value in numbers_of(content.get("tokenizer"))}
    numbers |= {name.replace("_", " "): Number(value) for name, value in numbers_of(generator) if name in DECODING}
    seconds = numbers_of(content.get("wall_seconds"))
    numbers |= {f"wall seconds: {name}": Number(value) for name, value in seconds if name == "total"}
    numbers |= {f"last: {name}": Number(value) for name, value in numbers_of(content.get("last"))}
    return Entry(path.resolve().name, str(path), numbers, content.get("machine"))


def _evaluation(path: Path, content: Mapping[str, Any]) -> list[Entry]:
    told = mapping_at(content.get("protocol"))
    entries = []
    for name, result in mapping_at(content.get("results")).items():
        result = mapping_at(result)
        numbers = dict(_scene_accuracy(result.get("scene_accuracy"), told.get("seed"), told.get("scene_prompts")))
        for metric, values in result.items():
            values = mapping_at(values)
            if metric in ("scene_accuracy", "decoding"):
                continue
            compared = ("real",) if values.get("real_samples") is not None else ()  # with real pictures
            protocol = {key: told.get(key) for key in ("data", *compared, "features", "seed")}
            protocol["features"] = mapping_at(protocol["features"]).get(str(values.get("features")))
            protocol |= {
                "metric": values.get("protocol"),
                "samples": values.get("samples"),
                "real_samples": values.get("real_samples"),
            }
            for key, value in numbers_of(values):
                if key not in ("samples", "real_samples"):
                    numbers[metric if key == "value" else f"{metric}: {key}"] = Number(value, protocol=protocol)
        numbers |= {key.replace("_", " "): Number(value) for key, value in numbers_of(result.get("decoding")) if key in DECODING}
        label = path.stem if len(content["results"]) == 1 else f"{path.stem} ({name})"
        sheets = sorted(work_folder(path).glob(f"sheet-{name}-*.png"))
        about = {key: content.get(key) for key in ("model", "protocol", "machine", "versions")} | {
            "decoding": result.get("decoding")
        }
        entries.append(Entry(label, str(path), numbers, about, sheets))
    if not entries:
        raise UserError(f"{path}: key results: holds nothing")
    return entries


def _suite(path: Path, content: Mapping[str, Any]) -> Entry:
    name = str(content.get("suite"))
    counts = {"counts": content.get("counts")}
    numbers = {f"{name}: {key}": Number(value, protocol=counts) for key, value in numbers_of(content.get("scores"))}
    return Entry(path.stem, str(path), numbers, {key: content.get(key) for key in ("about", "counts", "source")})


def _ablation(path: Path) -> list[Entry]:
    content, entries = read_json(path / "comparison.json"), []
    prompts = mapping_at(content.get("prompts"))
    told = {
        which: {"prompts": prompts[which], "seed": 0, "hash": None} if which in prompts else None for which in ("seen", "held_out")
    }
    for row in content["rows"]:
        numbers = {f"scene accuracy, {which.replace('_', ' ')}: overall": Number(*row[which], told[which]) for which in told}
        numbers |= {"decoder passes": Number(row["passes"]), "training steps": Number(row["steps"])}
        entries.append(Entry(row["name"], str(path), numbers, row["strategy"]))
    return entries


def _scene_accuracy(found: Any, seed: Any, hashes: Any = None) -> Iterator[tuple[str, Number]]:
    """hashes: of the texts of prompts that do not travel with the package, by the names of their sets."""
    for which, scores in mapping_at(found).items():
        scores = mapping_at(scores)
        protocol = {"prompts": scores.get("count"), "seed": seed, "hash": mapping_at(hashes).get(which)}
        for category in ("overall", *(() if which == "shuffled" else CATEGORIES)):
            if is_number(scores.get(category)):
                interval = mapping_at(scores.get("interval")).get(category)
                low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
                name = f"scene accuracy, {which.replace('_', ' ')}: {category.replace('_', ' ')}"
                yield name, Number(scores[category], low, high, protocol)
