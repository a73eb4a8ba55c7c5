"""What every suite of prompts that other programs judge has: its prompts, its layout of pictures, its results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from nar_t2i.errors import UserError


class Item(NamedTuple):
    """One prompt. place: what its files are named by. line: of the prompts' file, where the layout repeats it."""

    prompt: str
    place: str
    line: str = ""


class Scores(NamedTuple):
    """What a suite's programs found. scores: name → number, "overall" first where there is one. counts: what they are of.
    about: the unit, and how "overall" is made."""

    scores: dict[str, float]
    counts: dict[str, int]
    about: str


class Suite:
    """A benchmark whose pictures other programs judge. name: on the command line. pictures: of each prompt, as it asks for."""

    name: ClassVar[str]
    pictures: ClassVar[int] = 4

    def read(self, path: Path) -> list[Item]:
        """The prompts, of the suite's own file or folder. Raises UserError that names it."""
        raise NotImplementedError

    def files(self, item: Item, index: int, pictures: int) -> dict[str, list[int]]:
        """The picture files of the prompt at this index, relative to the folder, and which of its pictures each shows."""
        raise NotImplementedError

    def texts(self, item: Item) -> dict[str, str]:
        """Other files of a prompt."""
        return {}

    def image(self, images: list[Image.Image]) -> Image.Image:
        """What one file shows of its pictures."""
        (image,) = images
        return image

    def ingest(self, path: Path) -> Scores:
        """Scores from what the suite's programs wrote. Raises UserError that names file and line."""
        raise NotImplementedError


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from error


def whole(items: list[Item], path: Path) -> list[Item]:
    """The items, if there are any and each has a prompt and a place of its own."""
    if not items:
        raise UserError(f"{path}: holds no prompt")
    if empty := [item.place for item in items if not item.prompt.strip()]:
        raise UserError(f"{path}: {empty[0]}: has no prompt")
    if len({item.place for item in items}) < len(items):
        raise UserError(f"{path}: two prompts have one name")
    return items


def finite_number(value: Any, where: str) -> float:
    """A finite number, also where it is written as text."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {value!r} is not a number") from None
    if not math.isfinite(found):
        raise UserError(f"{where}: {value!r} is not a finite number")
    return found
