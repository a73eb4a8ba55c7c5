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

UNREAD = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg"}  # told, since they are images


def find_items(images: str | Path) -> list[Item]:
    """The images under a folder, in the order of their names, and captions that have no image."""
    root = Path(images)
    if not root.is_dir():
        raise UserError(f"{images} is not a folder")
    pictures, texts, unread, seen = [], {}, [], set()

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from error

    for folder, inner, names in os.walk(root, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inner[:] = []
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if (suffix := path.suffix.lower()) in SUFFIXES:
                pictures.append(path)
            elif suffix == ".txt":
                texts[path.with_suffix("")] = path  # of .TXT and .txt the latter
            elif suffix in UNREAD:
                unread.append(path)
    items = [_item(path, root, texts.get(path.with_suffix(""))) for path in pictures]
    items += [
        Item(str(path.relative_to(root)), path, (), f"{path.suffix.lower()} is not read; convert it to JPEG, PNG or WebP")
        for path in unread
    ]
    alone = sorted(texts.keys() - {path.with_suffix("") for path in (*pictures, *unread)})
    return items + [Item(str(texts[path].relative_to(root)), texts[path], (), "caption without an image") for path in alone]


def _item(path: Path, root: Path, caption: Path | None) -> Item:
    name = str(path.relative_to(root))
    if caption is None:
        return Item(name, path, (), "no caption file")
    try:
        if caption.exists() and not caption.is_file():  # a pipe, whose reader would wait
            return Item(name, path, (), "caption cannot be read: it is no regular file")
        text = caption.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return Item(name, path, (), "caption is not UTF-8")
    except OSError as error:
        return Item(name, path, (), f"caption cannot be read: {error.strerror}")
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
