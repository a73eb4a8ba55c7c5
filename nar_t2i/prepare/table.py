"""A CSV, TSV or Parquet table of (path, caption) → shards.

Paths are relative to --root (default: the table's folder). Rows with the same path are several captions of one image. In a CSV a
caption with a comma or a line break stands in quotes; in a TSV quotes are a part of the caption unless they enclose it. Run the
same command again after an interruption.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import pyarrow
import pyarrow.parquet

from nar_t2i.errors import UserError
from nar_t2i.prepare.command import parser
from nar_t2i.prepare.import_command import add_import_options, run_import
from nar_t2i.prepare.importing import Item, Options, Summary, import_items

MOST_LINES = 100  # of a caption in a .tsv
QUOTED = re.compile(r'"(?:[^"]|"")*"')
UNCLOSED = re.compile(r'"(?:[^"]|"")*')
FIELD = re.compile(rf"(?:^|(?<=\t))(?:{QUOTED.pattern}(?=\t|$)|[^\t]*)")


def find_items(
    table: str | Path, root: str | Path | None = None, path_column: str = "path", caption_column: str = "caption"
) -> list[Item]:
    """The images of a table in the order of their first rows."""
    table = Path(table)
    root = table.parent if root is None else Path(root)
    captions: dict[str, list[str]] = {}
    unusable = []
    for row in _rows(table, (path_column, caption_column)):
        if row.problem:
            unusable.append(Item(row.problem[0], root / "?", (), row.problem[1]))
        else:
            captions.setdefault(row.path or "", []).append((row.caption or "").strip())
    return [
        Item(path or "(no path)", root / path, tuple(c for c in found if c), "" if path else "row without a path")
        for path, found in captions.items()
    ] + unusable


class Row(NamedTuple):
    """What a row says. problem: which row, and why it cannot be used."""

    path: str | None
    caption: str | None
    problem: tuple[str, str] | None = None


def _rows(table: Path, columns: tuple[str, str]) -> Iterator[Row]:
    try:
        if table.suffix.lower() == ".parquet":
            yield from _parquet_rows(table, columns)
        elif table.suffix.lower() in (".csv", ".tsv"):
            yield from _text_rows(table, columns)
        else:
            raise UserError(f"{table} is not a table: its name must end in .csv, .tsv or .parquet")
    except (OSError, csv.Error, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{table} cannot be read: {error}") from error


def _text_rows(table: Path, columns: tuple[str, str]) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)  # captions may be longer than the module's 128 KiB
    # Bytes that are not UTF-8 come through as surrogates, so that they cost a row and not the table.
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _csv_rows(table, file) if table.suffix.lower() == ".csv" else _tsv_rows(list(file))
        _, head = next(rows, (1, []))
        if "\udcff\udcfe" in (start := "".join(head)[:4]) or "\udcfe\udcff" in start:
            raise UserError(f"{table}: is in UTF-16; save it as UTF-8")
        if isinstance(head, str):
            raise UserError(f"{table}, line 1: {head}")
        _check_columns(table, head, columns)
        places = [head.index(column) for column in columns]
        for line, row in rows:
            if isinstance(row, str):
                yield Row(None, None, (f"line {line}", row))
            elif any(row[len(head) :]) or len(row) <= max(places):
                yield Row(None, None, (f"line {line}", f"row has other fields than the table: {len(row)}, not {len(head)}"))
            else:
                yield Row(*(row[place] for place in places))


def _csv_rows(table: Path, file: TextIO) -> Iterator[tuple[int, list[str] | str]]:
    """The number of each row's first line, and its fields, or why it has none. Empty lines are none."""
    rows = csv.reader(file, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise UserError(f"{table}: a quote that is opened in line {line} or later is never closed") from error
            yield line, f"row is not CSV: {error}"
        else:
            if row:
                yield line, row


def _tsv_rows(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """As `_csv_rows`, a line a row. Quotes that do not enclose a field, as spreadsheets would write it, are its own. One that is
    open at a line's end encloses the following lines, too, if it ends in them, and none of them could be a row."""
    columns = len(FIELD.findall(lines[0])) if lines else 0
    at = 0
    while at < len(lines):
        end = at + 1
        if (fields := _fields(lines[at]))[-1].startswith('"') and not QUOTED.fullmatch(fields[-1]):
            while end < min(len(lines), at + MOST_LINES) and len(_fields(lines[end])) != columns:
                end += 1
                whole = _fields("".join(lines[at:end]))
                if len(whole) == columns and not UNCLOSED.fullmatch(whole[-1]):
                    fields = whole
                    break
            else:
                end = at + 1
        if fields != [""]:
            yield at + 1, [field[1:-1].replace('""', '"') if QUOTED.fullmatch(field) else field for field in fields]
        at = end


def _fields(text: str) -> list[str]:
    return [found[0] for found in FIELD.finditer(text.rstrip("\r\n"))]


def _parquet_rows(table: Path, columns: tuple[str, str]) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(table) as file:
        _check_columns(table, file.schema_arrow.names, columns)
        for batch in file.iter_batches(columns=list(columns)):
            strings = [batch.column(name).cast(pyarrow.string()).to_pylist() for name in columns]
            yield from (Row(*row) for row in zip(*strings, strict=True))


def _check_columns(table: Path, present: list[str], wanted: tuple[str, str]) -> None:
    if twice := [name for name in wanted if present.count(name) > 1]:
        raise UserError(f"{table}: has several columns {', '.join(twice)}; keep one")
    missing = [name for name in wanted if name not in present]
    if missing:
        raise UserError(
            f"{table} has no column {', '.join(missing)}; it has {', '.join(present) or 'none'} "
            "(--path-column and --caption-column name them)"
        )


def import_table(
    table: str | Path,
    out: str | Path,
    options: Options = Options(),
    root: str | Path | None = None,
    path_column: str = "path",
    caption_column: str = "caption",
) -> Summary | None:
    """Shards of a table; see `import_items`."""
    return import_items(find_items(table, root, path_column, caption_column), out, options)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("table", help=".csv, .tsv or .parquet")
    add_import_options(arguments)
    arguments.add_argument("--root", help="folder that the paths start from; default: the table's folder")
    arguments.add_argument("--path-column", default="path", help="default: path")
    arguments.add_argument("--caption-column", default="caption", help="default: caption")
    parsed = arguments.parse_args(argv)
    columns = parsed.path_column, parsed.caption_column
    return run_import(parsed, lambda options: import_table(parsed.table, parsed.out, options, parsed.root, *columns))


if __name__ == "__main__":
    sys.exit(main())
