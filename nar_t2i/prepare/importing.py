"""Captioned images of any origin → shards: the part that every importer shares.

A list of items is cut into chunks of fixed length, and each chunk becomes one shard, whatever is dropped from it. So a
run that was killed goes on with the first chunk that has no finished shard, and the same list gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from nar_t2i.data.images import ImageError, decode_image
from nar_t2i.data.shard_index import IMAGE_SUFFIXES, MAX_TEXT
from nar_t2i.errors import UserError
from nar_t2i.files import read_json, write_json, write_new
from nar_t2i.prepare.command import shard_range
from nar_t2i.prepare.shards import ShardFile, is_finished

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # the last three are stored as PNG
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
MANIFEST = "manifest.json"
NEWEST = "last_changed"  # in it: when the last of the files did, in seconds since 1970
MAX_CAPTION_BYTES = MAX_TEXT // 8  # bytes, of which JSON makes up to six times as many
SUMMARY = "summary.json"


class Item(NamedTuple):
    """One image to import. name: how messages call it. problem: why it is dropped unread, or empty."""

    name: str
    path: Path
    captions: tuple[str, ...]
    problem: str = ""


class Dropped(NamedTuple):
    """An item that did not get into a shard."""

    name: str
    reason: str


@dataclass(frozen=True)
class Options:
    """How to import.

    samples_per_shard: items of a chunk. max_size: larger images are shrunk to this shorter side, in pixels.
    workers: threads that read and check images. shards: those to write (see `shard_range`).
    """

    samples_per_shard: int = 1000
    max_size: int | None = None
    workers: int = 4
    shards: str = "0:"


@dataclass(frozen=True)
class Summary:
    """What an import did. kept: samples in shards. dropped: the rest, each with its reason."""

    kept: int
    dropped: list[Dropped]
    shards: int

    @property
    def reasons(self) -> dict[str, int]:
        """How many were dropped for each kind of reason, the most frequent first."""
        return dict(Counter(d.reason.split(":")[0].split(" (")[0] for d in self.dropped).most_common())

    def write(self, folder: Path) -> None:
        """Beside the shards, as `summary.json`."""
        told = {"kept": self.kept, "shards": self.shards, "reasons": self.reasons, "dropped": self.dropped}
        write_json(folder / SUMMARY, told)

    def __str__(self) -> str:
        lines = [f"kept {self.kept} samples in {self.shards} shards, dropped {len(self.dropped)}"]
        lines += [f"  {count:>8}  {reason}" for reason, count in self.reasons.items()]
        lines += [f"  e.g. {d.name}: {d.reason}" for d in self.dropped[:5]]
        return "\n".join(lines)


def text_problem(captions: Sequence[str]) -> str:
    """Why these captions cannot be used, or empty."""
    if not any(c.strip() for c in captions):
        return "empty caption"
    if sum(len(c.encode("utf-8", "surrogatepass")) for c in captions) > MAX_CAPTION_BYTES:
        return f"captions are longer than {MAX_CAPTION_BYTES} bytes"
    # Readers below let bytes that are not UTF-8 through as surrogates, to be found here, by item.
    if any("\ud800" <= character <= "\udfff" for c in captions for character in c):
        return "caption is not UTF-8"
    return ""


def import_items(items: Sequence[Item], folder: str | Path, options: Options = Options()) -> Summary | None:
    """Write the items as shards into a folder, or go on where an interrupted run stopped.

    Writes `summary.json` beside the shards once all are there, and returns None before. Raises UserError when the folder holds
    another import, or nothing is kept.
    """
    folder = Path(folder)
    if not items:
        raise UserError(f"nothing to import into {folder}: no images were found")
    if options.samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {options.samples_per_shard}; it must be at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    made_from = {"samples_per_shard": options.samples_per_shard, "max_size": options.max_size}
    fingerprint, newest = _fingerprint(items)
    claim_folder(folder, {"items": fingerprint, **made_from}, newest)
    kept, dropped = 0, []
    starts = range(0, len(items), options.samples_per_shard)
    chosen = shard_range(options.shards, len(starts))
    chunks = [items[start : start + options.samples_per_shard] for start in starts]
    bar = tqdm(total=sum(len(chunks[shard]) for shard in chosen), desc=f"→ {folder}", unit="image", mininterval=0.5)
    with bar, ThreadPoolExecutor(options.workers) as pool:
        for shard in chosen:
            _import_chunk(chunks[shard], folder, shard, options, pool, bar)
        if not all(_is_imported(folder, shard) for shard in range(len(chunks))):
            return None
        for shard, chunk in enumerate(chunks):
            lost = _dropped_from(folder, shard)
            kept, dropped = kept + len(chunk) - len(lost), dropped + lost
    summary = Summary(kept, dropped, len(starts))
    summary.write(folder)
    if not kept:
        raise UserError(f"not one of {len(items)} images could be imported:\n{summary}")
    return summary


def claim_folder(folder: Path, wanted: dict, newest: tuple[float, str] = (0.0, "")) -> None:
    """Note what the shards of a folder are made from, by one of the processes that begin at once. newest: when the last of the
    files changed that they are made from, and its name. Raises UserError when they were made from something else.
    """
    path = folder / MANIFEST
    if not path.exists() and any(folder.glob("*.tar")):
        raise UserError(f"{folder} already holds shards of unknown origin; choose an empty folder")
    if write_new(path, {**wanted, NEWEST: newest[0]}):
        return
    found = read_json(path)
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise UserError(
            f"{folder} holds shards from another input or other options ({', '.join(differing)} differ); "
            "choose another folder, or delete this one"
        )
    if newest[0] > found.get(NEWEST, newest[0]):
        raise UserError(
            f"{newest[1]} was changed after {folder} was begun, whose shards may hold what it was; choose another folder, or "
            f"delete this one (if it is the same, write {newest[0]} as {NEWEST} into {path})"
        )


def _fingerprint(items: Sequence[Item]) -> tuple[str, tuple[float, str]]:
    """Of names, texts and sizes; and when the last of the images changed, and its name."""
    digest, newest = hashlib.sha256(), (0.0, "")
    for item in items:
        try:
            about = item.path.stat() if item.path.is_file() else None
        except OSError:  # a name that no file can have
            about = None
        digest.update(repr((item.name, item.captions, item.problem, about.st_size if about else -1)).encode())
        newest = max(newest, (about.st_mtime, item.name)) if about else newest
    return digest.hexdigest(), newest


def _import_chunk(chunk: Sequence[Item], folder: Path, shard: int, options: Options, pool: ThreadPoolExecutor, bar: tqdm) -> None:
    """One shard; what was dropped is kept beside it, so that a later run can tell it again."""
    if _is_imported(folder, shard):
        bar.update(len(chunk))
        return
    dropped = []
    with ShardFile(folder / f"{shard:05d}.tar") as file:
        for row, (item, loaded) in enumerate(_load_all(chunk, options, pool)):
            if isinstance(loaded, str):
                dropped.append(Dropped(item.name, loaded))
            else:
                size = {"original_width": float(loaded.width), "original_height": float(loaded.height)}
                file.add(f"{shard:05d}{row:06d}", loaded.data, loaded.suffix, item.captions, size, item.name)
            bar.update()
        write_json(_record(folder, shard), dropped)  # before the tar appears: a finished shard always has its record


def _is_imported(folder: Path, shard: int) -> bool:
    return is_finished(folder / f"{shard:05d}.tar") and _record(folder, shard).exists()


def _record(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.dropped.json"


def _dropped_from(folder: Path, shard: int) -> list[Dropped]:
    return [Dropped(*entry) for entry in read_json(_record(folder, shard))]


class _Loaded(NamedTuple):
    """An image as it goes into the shard. width, height: of the original, upright, in pixels."""

    data: bytes
    suffix: str
    width: int
    height: int


def _load_all(chunk: Sequence[Item], options: Options, pool: ThreadPoolExecutor) -> Iterator[tuple[Item, _Loaded | str]]:
    """Items in order with their images, or the reason why there is none; few at a time, to bound the memory."""
    ahead = 4 * options.workers
    for start in range(0, len(chunk), ahead):
        part = chunk[start : start + ahead]
        yield from zip(part, pool.map(lambda item: _load(item, options.max_size), part))


def _load(item: Item, max_size: int | None) -> _Loaded | str:
    problem = item.problem or text_problem(item.captions)
    if problem:
        return problem
    try:
        if item.path.exists() and not item.path.is_file():
            return "image file cannot be read: it is no regular file"
        data = item.path.read_bytes()
    except FileNotFoundError:
        return "image file is missing"
    except (OSError, ValueError) as error:  # a name that no file can have
        return f"image file cannot be read: {error}"
    try:
        pixels = decode_image(data, formats=FORMATS)
    except ImageError as error:
        return f"image {error}"
    height, width = pixels.shape[:2]
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        suffix = _STORED.get(image.format)
    if max_size is not None and min(height, width) > max_size:
        data, suffix = shrink(pixels, max_size, lossy=suffix in ("jpg", "webp"))
    elif suffix not in IMAGE_SUFFIXES:
        data, suffix = encode_png(pixels), "png"
    return _Loaded(data, suffix, width, height)


def shrink(pixels: np.ndarray, size: int, lossy: bool) -> tuple[bytes, str]:
    """(H, W, 3) uint8 → encoded bytes with the shorter side `size`, and their suffix. lossy: JPEG instead of PNG."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    small = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS, reducing_gap=3.0))
    if not lossy:
        return encode_png(small), "png"
    buffer = io.BytesIO()
    Image.fromarray(small).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue(), "jpg"


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
