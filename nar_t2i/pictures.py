"""Files of pictures: a drawn picture that says what it was drawn from, contact sheets, and films of tokens being filled."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from nar_t2i.errors import UserError
from nar_t2i.files import whole_file
from nar_t2i.pixels import to_uint8
from nar_t2i.types import Step, TokenCodec

DRAWN_FROM = "nar-t2i"  # the key of a PNG's text that says, as JSON, all that the picture was drawn from
UNKNOWN_GREY = 150
FRAME_MILLISECONDS = 180


def save_whole(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture so that it is there whole or not at all. options: of Pillow's save."""
    with whole_file(path) as file:
        image.save(file, path.suffix[1:], **options)


class Picture(NamedTuple):
    """A PNG with a text chunk that says what it was drawn from. A picture that is there is not drawn again, and never overwritten
    by another one.
    """

    path: Path
    drawn_from: dict[str, Any]

    def is_there(self, film: str) -> bool:
        """And its film, if there is to be one. UserError where another picture is."""
        if not self.path.exists():
            return False
        try:
            with Image.open(self.path) as image:
                image.load()  # all of it
                there = json.loads(image.info[DRAWN_FROM])
        except (OSError, ValueError, KeyError):
            there = None
        same = isinstance(there, dict)
        differing = [key for key, value in json.loads(json.dumps(self.drawn_from)).items() if not same or there.get(key) != value]
        if differing:
            what = (
                f"was drawn by another {differing[0].replace('_', ' ')}"
                if same
                else "was not drawn by this command, or is not whole"
            )
            raise UserError(f"--out {self.path.parent}: {self.path.name} is there, and {what}; name another folder, or delete it")
        return film == "none" or film_path(self.path, film).exists()

    def save(self, image: Image.Image) -> None:
        told = PngInfo()
        told.add_text(DRAWN_FROM, json.dumps(self.drawn_from))
        for kind in ("strip", "gif"):
            film_path(self.path, kind).unlink(missing_ok=True)  # of a picture that was here before
        save_whole(image, self.path, pnginfo=told)

    def open(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, side: int = 160) -> Image.Image:
    """All pictures in rows, each with its caption below. side: pixels a picture on the sheet."""
    columns = min(columns, len(images))
    font = ImageFont.load_default(size=11)
    text_height, gap = 44, 8
    cell_width, cell_height = side + gap, side + text_height + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + index % columns * cell_width, gap + index // columns * cell_height
        resample = Image.Resampling.NEAREST if side % image.width == 0 else Image.Resampling.BICUBIC
        sheet.paste(image.resize((side, side), resample), (x, y))
        lines = textwrap.wrap(caption, width=side // 6)[:3]
        draw.multiline_text((x, y + side + 3), "\n".join(lines), fill="black", font=font, spacing=2)
    return sheet


def film_path(picture: Path, kind: str) -> Path:
    """Where the film of a picture goes: a name that no picture has."""
    return picture.with_suffix(".film.png" if kind == "strip" else ".film.gif")


class Films:
    """Collects the pictures of every step, until they are saved; tokens that are not known yet are shown as grey patches."""

    def __init__(self, tokenizer: TokenCodec):
        if len(tokenizer.spec.shape) != 2:
            raise UserError("--film: this model's tokens are no grid, so there are no places to show")
        self.tokenizer = tokenizer
        self._batches: list[list[torch.Tensor]] = []

    def __call__(self, step: Step) -> None:
        if step.step == 0:
            self._batches.append([])
        images = to_uint8(self.tokenizer.decode(step.tokens))
        scale = images.shape[-1] // self.tokenizer.spec.shape[-1]
        unknown = step.masked.view(-1, 1, *self.tokenizer.spec.shape)
        unknown = unknown.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        self._batches[-1].append(torch.where(unknown, UNKNOWN_GREY, images).byte().cpu())

    def save(self, paths: Sequence[Path], kind: str) -> None:
        """Write a film beside every picture since the last call. paths: of the pictures. kind: "strip" or "gif"."""
        films = [film for batch in self._batches for film in zip(*batch, strict=True)]
        self._batches = []
        for path, film in zip(paths, films, strict=True):
            frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in film]
            if kind == "strip":
                strip = Image.new("RGB", (len(frames) * (frames[0].width + 2), frames[0].height), "white")
                for index, frame in enumerate(frames):
                    strip.paste(frame, (index * (frame.width + 2), 0))
                save_whole(strip, film_path(path, kind))
            else:
                large = [f.resize((4 * f.width, 4 * f.height), Image.Resampling.NEAREST) for f in frames]
                save_whole(
                    large[0],
                    film_path(path, kind),
                    save_all=True,
                    append_images=large[1:] + [large[-1]] * 6,
                    duration=FRAME_MILLISECONDS,
                    loop=0,
                )
