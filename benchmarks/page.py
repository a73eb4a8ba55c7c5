"""The results of all benchmarks on one page: tables (README.md) and plots (index.html).

    python benchmarks/page.py                     # of docs/results/bench/*.json, into the same folder

Each table stands below the command, the machine, the versions and the commit that gave its numbers. Numbers of one file may be
compared with each other, those of two files only where the machine is the same and nothing else ran on it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from benchmarks import results
from nar_t2i.errors import UserError
from nar_t2i.evaluation.report_html import embedded, figure, page, section, table, tag

matplotlib.use("Agg")
from matplotlib import pyplot

TITLE = "Benchmarks"
NOTE = (
    "Each table has the command, the machine, the versions and the commit that gave it. What depends on the machine is compared "
    "within one run alone: read ratios, not times."
)
# Names of a row are made of its texts and of these numbers; bars are drawn of the first of these measures that rows have.
NAMING = ("batch", "workers", "ranks", "micro_batch")
MEASURES = ("images_per_second", "samples_per_second", "p50_ms", "step_ms")
HEADER = ("command", "machine", "versions", "commit", "rows")


class Result(NamedTuple):
    """name: of the file, without its ending. content: see `results.write`."""

    name: str
    content: dict[str, Any]


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("folder", nargs="?", default=str(results.FOLDER), help="default: docs/results/bench")
    parsed = parser.parse_args()
    read = load(Path(parsed.folder))
    for name, text in (("README.md", markdown(read)), ("index.html", html(read))):
        Path(parsed.folder, name).write_text(text, encoding="utf-8")
        print(Path(parsed.folder, name))
    return 0


def load(folder: Path) -> list[Result]:
    """Every result file, by name. UserError where there is none, or where one is of another form."""
    read = [Result(path.stem, results.read(path)) for path in sorted(folder.glob("*.json"))]
    if not read:
        raise UserError(f"{folder}: no result of a benchmark; make bench makes them")
    return read


def markdown(read: Sequence[Result]) -> str:
    """The page as tables."""
    parts = [f"# {TITLE}", "", NOTE, "Plots: [index.html](index.html). This page is made by `make bench-page`."]
    for name, content in read:
        columns = columns_of(content["rows"])
        parts += ["", f"## {name}", "", "```", content["command"], "```", ""]
        parts += [f"- {key}: {value}" for key, value in about(content)]
        parts += ["", *([_line(map(shown_name, columns)), "|" + "---|" * len(columns)] if columns else ["No rows."])]
        parts += [_line(shown(row.get(column)) for column in columns) for row in content["rows"]]
    return "\n".join(parts) + "\n"


def html(read: Sequence[Result]) -> str:
    """The page as tables and plots."""
    sections = []
    for name, content in read:
        columns = columns_of(content["rows"])
        rows = [[shown(row.get(column)) for column in columns] for row in content["rows"]]
        header = table([], [[key, value] for key, value in about(content)], class_="plain")
        bars, measured = plot(name, content["rows"]), table([*map(shown_name, columns)], rows)
        sections.append(section(name, tag("pre", content["command"]), header, bars, measured))
    return page(TITLE, tag("h1", TITLE), tag("p", NOTE), sections)


def about(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What holds for all rows of a file: machine, versions, commit, and what the benchmark adds."""
    machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    versions = ", ".join(f"{key} {value}" for key, value in content["versions"].items())
    more = [(shown_name(key), shown(value)) for key, value in content.items() if key not in HEADER]
    return [("machine", machine), ("versions", versions), ("commit", str(content["commit"])), *more]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows, as they first come; those that say what a row is before those that were measured."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    texts = [key for key in keys if key in NAMING or any(isinstance(row.get(key), (str, bool)) for row in rows)]
    return texts + [key for key in keys if key not in texts]


def shown_name(key: str) -> str:
    """The head of a column."""
    return key.replace("_", " ")


def shown(value: Any) -> str:
    """A cell: numbers of four digits, nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return results.number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    return " ".join(str(value).split())


def plot(name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Bars of the first known measure; None where rows have none."""
    measure = next((key for key in MEASURES if any(isinstance(row.get(key), (int, float)) for row in rows)), None)
    drawn = [(_label(row, rows), float(row[measure])) for row in rows if measure and isinstance(row.get(measure), (int, float))]
    if not drawn:
        return None
    labels, values = zip(*drawn, strict=True)
    drawing, axes = pyplot.subplots(figsize=(9, 0.6 + 0.26 * len(values)))
    places = range(len(values))
    axes.barh(places, values, color="#2f6fde")
    axes.set_yticks(places, labels, fontsize=8)
    axes.bar_label(axes.containers[0], [shown(value) for value in values], fontsize=8, padding=2)
    axes.invert_yaxis()
    if max(values) > 50 * min(values) > 0:
        axes.set_xscale("log")
    axes.set_xlabel(shown_name(measure))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(drawing)
    return figure(embedded(buffer.getvalue(), "image/png", f"{name}: {shown_name(measure)}"), shown_name(measure))


def _label(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What tells a row from the others: its texts and naming numbers that are not the same in all."""
    keys = [key for key in columns_of(rows) if isinstance(row.get(key), str) or key in NAMING]
    telling = [key for key in keys if len({shown(other.get(key)) for other in rows}) > 1] or keys
    return ", ".join(f"{shown_name(key)} {shown(row[key])}" if key in NAMING else shown(row[key]) for key in telling if key in row)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    results.program(main)
