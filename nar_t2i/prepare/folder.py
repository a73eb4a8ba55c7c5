"""A folder of images with side-by-side captions → shards.

`cat.jpg` takes its captions from `cat.txt`: UTF-8, one caption a line. Folders are searched at any depth, linked ones, too, but
not twice; hidden ones are skipped. Run the same command again after an interruption.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nar_t2i.errors import UserError
from nar_t2i.prepare.command import parser
from nar_t2i.prepare.import_command import add_import_options, run_import
from nar_t2i.prepare.importing import SUFFIXES, Item, Options, Summary, import_items


def find_items(images: str | Path) -> list[Item]:
    """The images under a folder, in the order of their names, and captions that have no image."""
    root = Path(images)
    if not root.is_dir():
        raise UserError(f"{images} is not a folder")
    pictures, texts, seen = [], set(), set()

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from error

    for folder, inner, names in os.walk(root, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inner[:] = []
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                pictures.append(path)
            elif path.suffix.lower() == ".txt" and not name.startswith("."):
                texts.add(path)
    items = [_item(path, root) for path in pictures]
    alone = sorted(texts - {path.with_suffix(".txt") for path in pictures})
    return items + [Item(str(path.relative_to(root)), path, (), "caption without an image") for path in alone]


def _item(path: Path, root: Path) -> Item:
    name = str(path.relative_to(root))
    try:
        text = path.with_suffix(".txt").read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return Item(name, path, (), "no caption file")
    except UnicodeDecodeError:
        return Item(name, path, (), "caption is not UTF-8")
    return Item(name, path, tuple(line.strip() for line in text.splitlines() if line.strip()))


def import_folder(images: str | Path, out: str | Path, options: Options = Options()) -> Summary | None:
    """Shards of a folder of images and `.txt` captions; see `import_items`."""
    return import_items(find_items(images), out, options)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("images", help="folder of images and captions")
    add_import_options(arguments)
    parsed = arguments.parse_args(argv)
    return run_import(parsed, lambda options: import_folder(parsed.images, parsed.out, options))


if __name__ == "__main__":
    sys.exit(main())
