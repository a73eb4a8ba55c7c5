"""A CSV, TSV or Parquet table of (path, caption) → shards.

Paths are relative to --root (default: the table's folder). Rows with the same path are several captions of one image.
Run the same command again after an interruption.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from nar_t2i.errors import UserError
from nar_t2i.prepare.command import parser
from nar_t2i.prepare.import_command import add_import_options, run_import
from nar_t2i.prepare.importing import Item, Options, Summary, import_items

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def find_items(
    table: str | Path, root: str | Path | None = None, path_column: str = "path", caption_column: str = "caption"
) -> list[Item]:
    """The images of a table in the order of their first rows."""
    table = Path(table)
    root = table.parent if root is None else Path(root)
    captions: dict[str, list[str]] = {}
    for path, caption in _rows(table, (path_column, caption_column)):
        captions.setdefault(path or "", []).append((caption or "").strip())
    return [
        Item(path or "(no path)", root / path, tuple(c for c in found if c), "" if path else "row without a path")
        for path, found in captions.items()
    ]


def _rows(table: Path, columns: tuple[str, str]) -> Iterator[tuple[str | None, str | None]]:
    try:
        if table.suffix.lower() == ".parquet":
            yield from _parquet_rows(table, columns)
        elif table.suffix.lower() in SEPARATORS:
            yield from _text_rows(table, columns)
        else:
            raise UserError(f"{table} is not a table: its name must end in .csv, .tsv or .parquet")
    except (OSError, csv.Error, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{table} cannot be read: {error}") from error


def _text_rows(table: Path, columns: tuple[str, str]) -> Iterator[tuple[str | None, str | None]]:
    csv.field_size_limit(1 << 24)  # captions may be longer than the module's 128 KiB
    # Bytes that are not UTF-8 come through as surrogates, so that they cost a row and not the table.
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter=SEPARATORS[table.suffix.lower()])
        _check_columns(table, rows.fieldnames or [], columns)
        for row in rows:
            yield row[columns[0]], row[columns[1]]


def _parquet_rows(table: Path, columns: tuple[str, str]) -> Iterator[tuple[str | None, str | None]]:
    with pyarrow.parquet.ParquetFile(table) as file:
        _check_columns(table, file.schema_arrow.names, columns)
        for batch in file.iter_batches(columns=list(columns)):
            strings = [batch.column(name).cast(pyarrow.string()).to_pylist() for name in columns]
            yield from zip(*strings)


def _check_columns(table: Path, present: list[str], wanted: tuple[str, str]) -> None:
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
) -> Summary:
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
