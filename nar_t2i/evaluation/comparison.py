"""Ablations side by side: one table, two plots and a grid of pictures, from what `nar-t2i ablate` has judged.

Accuracies are means over the categories. All entries draw the same prompts with the same seeds, so that the difference
between two of them is a mean of paired differences, whose interval is far narrower than those of the accuracies. Both are 95%
intervals of the sampling of prompts and pictures, for the trainings at hand; what other trainings would give stands apart: the
spread over seeds, and the interval that it leaves of the difference.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from nar_t2i.errors import UserError
from nar_t2i.evaluation.report_html import embedded, figure, page, picture, section, table, tag
from nar_t2i.evaluation.scene_accuracy import Z95, wilson
from nar_t2i.files import read_json, write_json
from nar_t2i.folders import flat

T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)  # Student's t at 97.5%, by degrees of freedom
COLUMNS = (
    "name",
    "seen",
    "seen_low",
    "seen_high",
    "held_out",
    "difference",
    "difference_low",
    "difference_high",
    "passes",
    "seconds_an_image",
    "seeds",
    "spread",
    "over_seeds_low",
    "over_seeds_high",
    "steps",
    "forward_passes",
    "changes",
)


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


class Row(NamedTuple):
    """One entry. seen, held_out: accuracies. difference: of `seen` to the first entry's, over the seeds that both have; None for
    that one. spread: the standard deviation of `seen` over seeds, over_seeds: the difference with the interval that other seeds
    leave of it; None with one. forward_passes: of the network, in all of training. changes: see `changes`."""

    name: str
    seen: Interval
    held_out: Interval
    difference: Interval | None
    passes: int
    seconds_an_image: float
    seeds: int
    spread: float | None
    over_seeds: Interval | None
    steps: int
    forward_passes: int
    strategy: dict[str, Any]
    changes: str


def share_interval(passed: np.ndarray) -> Interval:
    """Wilson's interval of a mean over the sampling of prompts. passed: (seeds, prompts), 0 or 1.

    Each prompt has a mean over its seeds. The interval is that of the number of independent prompts with one picture each
    whose share would vary as much as the mean of these means does: at least the prompts, at most the pictures.
    """
    means = passed.mean(0)
    share, spread = float(means.mean()), float(((means - means.mean()) ** 2).sum())
    certain = share in (0, 1)
    count = len(means) if certain else min(len(means) ** 2 * share * (1 - share) / max(spread, 1e-12), passed.size)
    return Interval(share, *wilson(share * count, count))


def paired_interval(differences: np.ndarray) -> Interval:
    """differences: (seeds, prompts), of 0 or 1. The interval of their mean over the sampling of prompts, with half a pair more
    of each of the four kinds, so that few pairs that differ do not seem certain (Agresti and Min 2005).
    """
    values = differences.mean(0)
    count, total = len(values) + 2, float(values.sum())
    middle = total / count
    half = Z95 * math.sqrt(max((float(np.square(values).sum()) + 1) / count - middle**2, 0.0) / count)
    return Interval(float(values.mean()), middle - half, middle + half)


def seeds_interval(values: np.ndarray) -> Interval:
    """values: (seeds,), one a training, at least two. Student's interval of their mean."""
    freedom, mean = len(values) - 1, float(values.mean())
    # The expansion of Abramowitz and Stegun 26.7.5, right to 0.003 from ten degrees on.
    t = (
        T95[freedom - 1]
        if freedom <= len(T95)
        else Z95 + (Z95**3 + Z95) / (4 * freedom) + (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * freedom**2)
    )
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def compare(judged: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """name → verdicts, one dict a seed, from the first seed on; the first name is what the others are compared with."""
    rows: list[Row] = []
    reference: np.ndarray | None = None
    for name, seeds in judged.items():
        seen = np.array([verdicts["seen"]["passed"] for verdicts in seeds], dtype=float)  # (seeds, prompts)
        held_out = np.array([verdicts["held_out"]["passed"] for verdicts in seeds], dtype=float)
        first, means = seeds[0], seen.mean(1)
        differences = None
        if reference is not None:
            if seen.shape[1] != reference.shape[1]:
                raise UserError(f"{name} was judged on {seen.shape[1]} prompts, the first entry on {reference.shape[1]}")
            shared = min(len(seen), len(reference))
            differences = seen[:shared] - reference[:shared]
        rows.append(Row(
            name, share_interval(seen), share_interval(held_out), None if differences is None else paired_interval(differences),
            first["passes"], float(np.mean([verdicts["seconds_an_image"] for verdicts in seeds])), len(seeds),
            float(means.std(ddof=1)) if len(seeds) > 1 else None,
            seeds_interval(differences.mean(1)) if differences is not None and len(differences) > 1 else None,
            first["steps"], round(first["steps"] * first["training_passes"]),
            first["strategy"], changes(first["strategy"], next(iter(judged.values()))[0]["strategy"]),
        ))  # fmt: skip
        reference = seen if reference is None else reference
    return rows


def write_comparison(out: Path, judged: dict[str, list[Path]]) -> Path:
    """Write comparison.html, .md, .csv and .json into `out`. judged: name → the folders that `nar-t2i ablate` has judged,
    one a seed; the first name is the reference."""
    verdicts = {name: [read_json(folder / "verdicts.json") for folder in folders] for name, folders in judged.items()}
    rows = compare(verdicts)
    machines = {_machine(found["machine"]) for seeds in verdicts.values() for found in seeds}
    machine = "; and ".join(sorted(machines))
    first = next(iter(verdicts.values()))[0]
    write_json(
        out / "comparison.json",
        {
            "prompts": {which: Counter(first[which]["category"]) for which in ("seen", "held_out")},
            "machine": machine,
            "judged": {
                name: [os.path.relpath(folder.resolve(), out.resolve()) for folder in folders] for name, folders in judged.items()
            },
            "rows": [row._asdict() for row in rows],
        },
    )
    (out / "comparison.csv").write_text(as_csv(rows), encoding="utf-8")
    (out / "comparison.md").write_text(as_markdown(rows, machine), encoding="utf-8")
    html = out / "comparison.html"
    html.write_text(as_html(rows, machine, {name: folders[0] / "sheet.png" for name, folders in judged.items()}), encoding="utf-8")
    return html


def merge_comparisons(folders: Sequence[Path]) -> Path:
    """One comparison, in the first folder, of what several runs of `nar-t2i ablate` have judged. An entry that two folders
    have by one name gets its folder's name, too. UserError where a folder holds no comparison."""
    judged: dict[str, list[Path]] = {}
    for folder in folders:
        found = read_json(folder / "comparison.json")
        if "judged" not in found:
            raise UserError(f"{folder / 'comparison.json'}: says not what was judged; have nar-t2i ablate write it again")
        for name, parts in found["judged"].items():
            paths = [(folder / part).resolve() for part in parts]
            if paths in judged.values():  # as they are where this was done before
                continue
            names = (name, f"{name} ({folder.resolve().name})", *(f"{name} ({number})" for number in range(2, len(judged) + 3)))
            judged[next(free for free in names if free not in judged)] = paths
    return write_comparison(folders[0], judged)


def changes(strategy: dict[str, Any], reference: dict[str, Any]) -> str:
    """In what a strategy differs from the reference, in a line: class names, and the arguments that are set otherwise."""
    now, before = flat(strategy), flat(reference)
    told = []
    for key in {**now, **before}:
        kind = key.rpartition("init_args")[0] + "class_path"  # of the part that the key belongs to
        same_kind = "init_args" not in key or now.get(kind) == before.get(kind)
        if now.get(key) != before.get(key) and (key in now or same_kind):
            short = key.replace(".init_args", "").removesuffix(".class_path")
            told.append(
                f"{short} "
                f"{str(now.get(key, 'default')).rpartition('.')[2] if key.endswith('class_path') else now.get(key, 'default')}"
            )
    return ", ".join(told)


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def cells(row: Row) -> list[str]:
    """What the table shows of a row."""
    spread = "–" if row.spread is None else f"{row.spread:.3f}"
    difference = "reference" if row.difference is None else _told(row.difference, "+.3f")
    over_seeds = "–" if row.over_seeds is None else f"[{row.over_seeds.low:+.3f}, {row.over_seeds.high:+.3f}]"
    return [
        row.name,
        _told(row.seen),
        f"{row.held_out.mean:.3f}",
        difference,
        str(row.passes),
        f"{1000 * row.seconds_an_image:.0f}",
        f"{row.steps:,}",
        f"{row.forward_passes:,}",
        f"{row.seeds}",
        spread,
        over_seeds,
        row.changes,
    ]


HEAD = ("strategy", "seen [95%]", "held out", "difference in seen [95%]", "passes", "ms an image", "training steps",
        "forward passes of training", "seeds", "spread over seeds", "difference, over seeds", "in what it differs")  # fmt: skip


def as_markdown(rows: Sequence[Row], machine: str) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\nMachine: {machine}.\n"


def as_csv(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        difference, over_seeds = row.difference or ("", "", ""), row.over_seeds or ("", "", "")
        writer.writerow(
            [
                row.name,
                *row.seen,
                row.held_out.mean,
                *difference,
                row.passes,
                row.seconds_an_image,
                row.seeds,
                "" if row.spread is None else row.spread,
                *over_seeds[1:],
                row.steps,
                row.forward_passes,
                row.changes,
            ]
        )
    return file.getvalue()


def as_html(rows: Sequence[Row], machine: str, pictures: dict[str, Path]) -> str:
    sheets = [figure(picture(pictures[row.name], row.name), row.name) for row in rows]
    strategies = [[row.name, json.dumps(row.strategy)] for row in rows]
    return page(
        "nar_t2i: comparison",
        tag("h1", "Comparison"),
        section("Table", table(HEAD, map(cells, rows)), machine),
        section("Accuracy against cost", embedded(plot(rows), "image/png", "accuracy against decoder passes and time")),
        section("The same prompts and seeds", *[sheet for sheet in sheets if sheet is not None]),
        section("Strategies", table(("strategy", "as resolved"), strategies)),
    )


def plot(rows: Sequence[Row]) -> bytes:
    """Accuracy over decoder passes, and over time an image, as a PNG."""
    drawing = matplotlib.figure.Figure(figsize=(12, 6), layout="constrained")
    costs = (("decoder passes", [row.passes for row in rows]), ("ms an image", [1000 * row.seconds_an_image for row in rows]))
    for axes, (title, values) in zip(drawing.subplots(1, 2, sharey=True), costs):
        means = [row.seen.mean for row in rows]
        below, above = ([abs(row.seen[end] - row.seen.mean) for row in rows] for end in (1, 2))
        axes.errorbar(values, means, [below, above], fmt="o", capsize=3)
        line, labels = 0.024 * (max(means) - min(means) or 1.0), []  # names of points that lie close are put above each other
        for row, x, y in sorted(zip(rows, values, means), key=lambda point: point[2]):
            place = y
            while any(abs(math.log(x / other)) < 0.5 and abs(place - height) < line for other, height in labels):
                place += line / 4
            labels.append((x, place))
            axes.annotate(
                row.name, (x, y), xytext=(1.06 * x, place), fontsize=6.5, va="center", arrowprops={"arrowstyle": "-", "lw": 0.3}
            )
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks(matplotlib.ticker.LogFormatter(minor_thresholds=(2.5, 1)))
        axes.margins(x=0.15)
        axes.set(xlabel=title, ylabel="scene accuracy, seen")
        axes.grid(alpha=0.3)
    file = io.BytesIO()
    drawing.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _told(interval: Interval, how: str = ".3f") -> str:
    return f"{interval.mean:{how}} [{interval.low:{how}}, {interval.high:{how}}]"
