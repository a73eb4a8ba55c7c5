"""COCO captions → shards.

Reads `captions_*.json` (its lists `images` with id and file_name, and `annotations` with image_id and caption) beside a
folder of images. All captions of an image are kept. Run the same command again after an interruption.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from nar_t2i.errors import UserError
from nar_t2i.prepare.command import parser
from nar_t2i.prepare.import_command import add_import_options, run_import
from nar_t2i.prepare.importing import Item, Options, Summary, import_items


def find_items(annotations: str | Path, images: str | Path) -> list[Item]:
    """The images of a COCO file in the order of their ids, each with its captions in the order of the file."""
    root = Path(images)
    if not root.is_dir():
        raise UserError(f"{images} is not a folder")
    captions: dict[int, list[str]] = defaultdict(list)
    names: dict[int, str | None] = {}
    try:
        content = json.loads(Path(annotations).read_bytes())
        for entry in content["images"]:
            name = entry.get("file_name")
            name = None if name is None else str(name)
            if names.setdefault(entry["id"], name) != name:
                raise UserError(
                    f"{annotations}: image id {entry['id']} is that of {names[entry['id']]} and of {name}, so that captions "
                    "cannot be told apart"
                )
        order = sorted(names)
        if content["annotations"] and not any("caption" in entry for entry in content["annotations"]):
            raise UserError(f"{annotations}: its annotations are no captions (COCO's are in captions_*.json)")
        for entry in content["annotations"]:
            caption = entry.get("caption")
            captions[entry["image_id"]].append(caption.strip() if isinstance(caption, str) else "")
    except OSError as error:
        raise UserError(f"{annotations} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{annotations} is not COCO captions JSON (images and annotations): {error!r}") from error
    items = [_item(image, names[image], root, captions[image]) for image in order]
    unknown = [image for image in captions if image not in names]
    return items + [Item(f"image id {image}", root / "?", (), "caption without an image") for image in unknown]


def _item(image: int, name: str | None, root: Path, captions: list[str]) -> Item:
    """A name is told by its letters whether it stays in the folder: the images there may be links to elsewhere."""
    if name is None:
        return Item(f"image id {image}", root / "?", (), "image without a file_name")
    try:
        problem = "it holds a null byte" if b"\0" in os.fsencode(name) else ""
    except UnicodeEncodeError as error:
        problem = str(error)
    if problem:
        return Item(repr(name), root / "?", tuple(captions), f"file_name is none: {problem}")
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == "..":
        return Item(name, root / "?", tuple(captions), "file_name leads out of the image folder")
    return Item(name, root / name, tuple(c for c in captions if c), "" if captions else "no caption")


def import_coco(annotations: str | Path, images: str | Path, out: str | Path, options: Options = Options()) -> Summary | None:
    """Shards of COCO captions; see `import_items`."""
    return import_items(find_items(annotations, images), out, options)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("annotations", help="captions_*.json")
    arguments.add_argument("images", help="folder of the images")
    add_import_options(arguments)
    parsed = arguments.parse_args(argv)
    return run_import(parsed, lambda options: import_coco(parsed.annotations, parsed.images, parsed.out, options))


if __name__ == "__main__":
    sys.exit(main())
