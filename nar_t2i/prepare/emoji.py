"""The Unicode emoji, as captioned pictures that nobody here drew → shards.

    emoji.py data/emoji/train --split train --image-size 64

Needs Debian's fonts-noto-color-emoji, unicode-data and unicode-cldr-core (or the same files, by --font, --unicode and
--cldr). The splits are fixed: `train`; `held_out`, people of whom every part (person, profession, skin tone, hair) was
seen in training, but not together; and `unseen`, things and flags of whose names no training caption has a word: the
lowest score to expect.
Run the same command again after an interruption.
"""

from __future__ import annotations

import hashlib
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from nar_t2i.data.images import fit
from nar_t2i.data.source import LostSample, Sample, SampleError, Source
from nar_t2i.errors import UserError
from nar_t2i.hashing import file_hash, text_hash
from nar_t2i.prepare.command import add_shard_range, at_least, parser, run
from nar_t2i.prepare.rendering import write_source

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
UNICODE = "/usr/share/unicode/emoji/emoji-test.txt"
CLDR = "/usr/share/unicode/cldr/common"
SIZE = 109  # the one size, in pixels an em, of the font's pictures, which are 136 × 128
SIDE = 136
JOINER, PICTURE = 0x200D, 0xFE0F
TONES = range(0x1F3FB, 0x1F400)
THINGS = ("Animals & Nature", "Flags", "Food & Drink", "Objects", "Travel & Places")
LITTLE = {"a", "and", "at", "flag", "for", "in", "of", "on", "over", "the", "to", "with"}
HELD_OUT_SHARE, UNSEEN_SHARE = 0.15, 0.16
# Flags of territories that are those of states.
TWINS = {"Bouvet Island", "Ceuta & Melilla", "Clipperton Island", "Diego Garcia", "Heard & McDonald Islands", "St. Martin",
         "Svalbard & Jan Mayen", "U.S. Outlying Islands", "British Indian Ocean Territory", "France", "Australia", "Norway",
         "Spain", "United States"}  # fmt: skip
Split = Literal["train", "held_out", "unseen"]


class Emoji(NamedTuple):
    """One emoji. text: its characters. name, keywords: CLDR's, in English. group: as Unicode sorts them."""

    text: str
    name: str
    keywords: tuple[str, ...]
    group: str

    @property
    def parts(self) -> frozenset[int]:
        """Its characters that mean something: people, professions, hair, skin tones, things."""
        return frozenset(ord(c) for c in self.text if ord(c) not in (JOINER, PICTURE))

    @property
    def words(self) -> frozenset[str]:
        return words_of([self.name])

    @property
    def captions(self) -> list[str]:
        """Its name, and two wordings; the keywords say what else it is called."""
        others = [keyword for keyword in self.keywords if keyword != self.name and not set(keyword.split()) <= self.words]
        also = f", {', '.join(others[:3])}" if others else ""
        return [self.name, f"an emoji of {self.name}", f"{self.name}{also}"]


def words_of(captions: Iterable[str]) -> frozenset[str]:
    """The words in captions that mean something."""
    return frozenset(word for caption in captions for word in re.findall(r"[^\W\d_]+", caption.lower())) - LITTLE


def read_emoji(unicode: str | Path = UNICODE, cldr: str | Path = CLDR) -> list[Emoji]:
    """All fully qualified emoji, in Unicode's order. Raises UserError where a file is missing or of another kind."""
    annotations = [_read_annotations(Path(cldr, folder, "en.xml")) for folder in ("annotations", "annotationsDerived")]
    names, keywords = ({k: v for part in annotations for k, v in part[i].items()} for i in (0, 1))
    found, group = [], ""
    for line in _read(Path(unicode), "unicode-data").splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        if match := re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)$", line):
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            plain = text.replace(chr(PICTURE), "")
            found.append(Emoji(text, names.get(plain, match[2]), keywords.get(plain, ()), group))
    if not found:
        raise UserError(f"{unicode}: names no emoji; Unicode's emoji-test.txt is meant")
    return found


def split_emoji(emoji: Sequence[Emoji]) -> dict[Split, list[Emoji]]:
    """The splits, which are the same wherever these emoji are given: each is drawn by its characters, and taken back into
    training where training's would give it away, or lack a part of it."""
    unseen = {
        e for e in emoji
        if e.group in THINGS and not e.parts & set(TONES) and e.name.removeprefix("flag: ") not in TWINS
        and _draw(e, "unseen") < UNSEEN_SHARE
    }  # fmt: skip
    held_out = {e for e in emoji if e.parts & set(TONES) and len(e.parts) > 1 and _draw(e, "held out") < HELD_OUT_SHARE}
    while True:
        train = [e for e in emoji if e not in unseen and e not in held_out]
        parts = frozenset().union(*(e.parts for e in train))
        words = words_of(caption for e in train for caption in e.captions)
        # Flags are spelled with letters, which all flags share.
        told = {e for e in unseen if e.words & words or not e.words or (e.group != "Flags" and e.parts & parts)}
        apart = {e for e in held_out if not e.parts <= parts}
        if not told and not apart:
            break
        unseen, held_out = unseen - told, held_out - apart  # which may give others away in turn
    return {"train": train, "held_out": [e for e in emoji if e in held_out], "unseen": [e for e in emoji if e in unseen]}


class EmojiPictures(Source):
    """Emoji on white squares. Raises UserError where the font, or what it needs to shape sequences, is missing."""

    def __init__(self, emoji: Sequence[Emoji], image_size: int = 64, font: str | Path = FONT):
        if not features.check("raqm"):
            raise UserError("Pillow was built without Raqm, so that it cannot draw emoji made of several characters")
        if not Path(font).is_file():
            raise UserError(f"{font}: no such file; Debian's fonts-noto-color-emoji has it")
        self.name, self.font, self.image_size = f"emoji at {image_size} px", str(font), image_size
        self._emoji = list(emoji)

    def __len__(self) -> int:
        return len(self._emoji)

    def identity(self, block: int) -> str:
        drawn = "\n".join("\t".join((e.text, *e.captions)) for e in self._emoji)
        return text_hash(f"{self.name}:{self._font_hash}:{block}:{drawn}")

    @cached_property
    def _font_hash(self) -> str:
        return file_hash(Path(self.font))

    def read_text(self, index: int) -> Sample:
        emoji = self._emoji[index]
        return Sample("-".join(f"{ord(c):x}" for c in emoji.text), None, emoji.captions)

    def read(self, index: int) -> Sample:
        sample = self.read_text(index)
        picture = draw(self._emoji[index].text, self.font)
        if picture is None:
            raise SampleError(LostSample(sample.key, self.name, "the font does not draw it as one picture"))
        sample.image = fit(picture, self.image_size).pixels
        return sample


def draw(text: str, font: str) -> np.ndarray | None:
    """(136, 136, 3) uint8, in the middle of a white square; None where the font has no one picture of it."""
    opened = _open_font(font)
    left, top, right, bottom = opened.getbbox(text)
    if not 0 < right - left <= SIDE or not 0 < bottom - top <= SIDE:
        return None
    image = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 0))
    place = ((SIDE - right + left) // 2 - left, (SIDE - bottom + top) // 2 - top)
    ImageDraw.Draw(image).text(place, text, font=opened, embedded_color=True)
    if image.getextrema()[3][1] == 0:
        return None
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


@cache
def _open_font(path: str) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise UserError(f"{path}: not a font with pictures of {SIZE} pixels, such as Noto Color Emoji: {error}") from error


def _draw(emoji: Emoji, purpose: str) -> float:
    """In [0, 1), from its characters."""
    digest = hashlib.sha256(f"{purpose}:{emoji.text.replace(chr(PICTURE), '')}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read(path: Path, package: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; Debian's {package} has it") from error


def _read_annotations(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Names and keywords by characters."""
    try:
        entries: Iterable[ElementTree.Element] = list(ElementTree.fromstring(_read(path, "unicode-cldr-core")).iter("annotation"))
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: not CLDR's annotations: {error}") from error
    names = {e.get("cp", ""): (e.text or "").strip() for e in entries if e.get("type") == "tts"}
    keywords = {e.get("cp", ""): tuple(map(str.strip, (e.text or "").split("|"))) for e in entries if e.get("type") is None}
    return names, keywords


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("out", help="folder for the shards")
    arguments.add_argument("--split", choices=["train", "held_out", "unseen"], default="train")
    arguments.add_argument("--image-size", type=at_least(1), default=64, help="pixels a side; default: 64")
    arguments.add_argument("--font", default=FONT, help=f"default: {FONT}")
    arguments.add_argument("--unicode", default=UNICODE, help=f"emoji-test.txt; default: {UNICODE}")
    arguments.add_argument("--cldr", default=CLDR, help=f"folder of annotations; default: {CLDR}")
    arguments.add_argument("--samples-per-shard", type=at_least(1), default=500, help="default: 500")
    arguments.add_argument("--workers", type=at_least(0), default=0, help="processes that draw; default: 0")
    add_shard_range(arguments)
    parsed = arguments.parse_args(argv)

    def work() -> str:
        emoji = split_emoji(read_emoji(parsed.unicode, parsed.cldr))[parsed.split]
        source = EmojiPictures(emoji, parsed.image_size, parsed.font)
        summary = write_source(source, parsed.out, parsed.samples_per_shard, parsed.workers, parsed.shard_range)
        return f"{parsed.out}: these shards are done; others are not yet" if summary is None else str(summary)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
