"""The index of a shard: where each image lies in the tar, and all text, so that the tar is read only for pixels.

It stands next to the tar as `<shard>.index.safetensors` and is memory-mapped. Arrays of n samples and m captions:
images (n, 2) int64 offset and size in bytes; keys and captions as UTF-8 bytes with their ends; caption_rows (n + 1),
where each sample's captions begin; scalars (n, s) float32. The metadata holds the size of the tar, which tells a
truncated or replaced tar, and the samples that cannot be used, with reasons.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from nar_t2i.data.arrays import Arrays, open_map
from nar_t2i.data.source import LostSample, scalar_columns
from nar_t2i.errors import UserError
from nar_t2i.files import whole_file
from nar_t2i.liveness import going_on

log = logging.getLogger(__name__)

FORMAT = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json")
INDEX_SUFFIX = ".index.safetensors"
REST = "(all that follow)"  # where keys stand: what a tar held behind the place where it is damaged
MAX_TEXT = 1 << 20  # bytes of a caption or a JSON member


class Row(NamedTuple):
    """One usable sample of a shard. offset, size: of the encoded image in the tar, in bytes."""

    key: str
    offset: int
    size: int
    captions: list[str]
    scalars: dict[str, float]


def split_name(member: str) -> tuple[str, str]:
    """A member's name → its key and lower-case suffix, as webdataset splits them: at the first dot of the last part."""
    folder, slash, name = member.rpartition("/")
    stem, _, suffix = name.partition(".")
    return folder + slash + stem, suffix.lower()


def read_captions(members: dict[str, bytes]) -> tuple[list[str], dict[str, float]]:
    """The captions and the numeric JSON fields of one sample; members: suffix → bytes.

    Captions are the list `captions` of the JSON if there is one, else the text file as one caption, else the JSON's
    `caption`. White space is collapsed, empty captions are dropped. Raises ValueError, whose message is the reason.
    """
    for suffix in TEXT_SUFFIXES:
        if len(members.get(suffix, b"")) > MAX_TEXT:
            raise ValueError(f".{suffix} is larger than {MAX_TEXT} bytes")
    try:
        fields = json.loads(members["json"]) if members.get("json") else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken .json: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("the .json is not an object")
    try:
        text = members["txt"].decode("utf-8-sig") if "txt" in members else None
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption is not UTF-8 ({error})") from error
    listed = fields.get("captions")
    captions = _tidied(listed if isinstance(listed, list) else []) or _tidied([text if text is not None else fields.get("caption")])
    if not captions:
        raise ValueError("no caption" if text is None else "empty caption")
    try:
        numbers = {k: float(v) for k, v in fields.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    except OverflowError as error:
        raise ValueError(f"broken .json: {error}") from error
    return captions, numbers


def _tidied(captions: list[Any]) -> list[str]:
    return [" ".join(c.split()) for c in captions if isinstance(c, str) and c.strip()]


@dataclass
class _Members:
    """What a scan found under one key. dotted: images whose names have more dots, such as a mask beside the image."""

    image: tuple[int, int] | None = None
    dotted: list[str] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""


def scan_tar(path: Path) -> tuple[list[Row], list[LostSample]]:
    """The usable samples of a tar, and those that are not, with reasons. Reads headers and text, no images.

    A tar that was cut off yields what came before the cut. Raises UserError when the file is no plain tar at all.
    """
    size = path.stat().st_size
    samples: dict[str, _Members] = {}
    damage = ""
    with open(path, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")
        except tarfile.TarError as error:
            raise UserError(f"{path} is not an uncompressed tar file ({error}); make shards with data_prep/") from error
        try:
            for member in tar:
                tar.members.clear()  # tarfile remembers every header otherwise
                going_on()
                _take_member(file, member, size, samples)
        except (tarfile.TarError, OSError, EOFError) as error:
            damage = str(error)
        file.seek(tar.offset)
        if not damage and file.read(512) != bytes(512):
            damage = f"no end-of-archive mark at byte {tar.offset}"
    rows, lost_samples = _sort_out(samples, path.name)
    if damage:
        log.warning("%s is cut off or damaged (%s): %d samples before that are readable", path, damage, len(rows))
        lost_samples.append(LostSample(REST, path.name, f"the tar is cut off or damaged: {damage}"))
    return rows, lost_samples


def _take_member(file, member: tarfile.TarInfo, tar_size: int, samples: dict[str, _Members]) -> None:
    key, suffix = split_name(member.name)
    if member.isreg() and "." in suffix and suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
        samples.setdefault(key, _Members()).dotted.append(member.name)
    if not member.isreg() or member.issparse() or suffix not in IMAGE_SUFFIXES + TEXT_SUFFIXES:
        return  # never opened, pickles among them
    found = samples.setdefault(key, _Members())
    if member.offset_data + member.size > tar_size:
        found.problem = f".{suffix} is cut off by the end of the tar"
    elif suffix in IMAGE_SUFFIXES:
        if found.image is not None:
            found.problem = "several images under one key"
        found.image = (member.offset_data, member.size)
    elif suffix in found.texts:
        found.problem = f"several .{suffix} under one key"
    else:
        file.seek(member.offset_data)  # tarfile finds its own way back
        found.texts[suffix] = file.read(min(member.size, MAX_TEXT + 1))


def _sort_out(samples: dict[str, _Members], shard: str) -> tuple[list[Row], list[LostSample]]:
    rows, lost_samples = [], []
    for key, found in samples.items():
        problem = found.problem
        if found.image is None and found.dotted:
            lost_samples += [
                LostSample(name, shard, "a key ends at the first dot, and this name has others before its suffix")
                for name in found.dotted
            ]
            continue
        if not problem and found.image is None:
            problem = "no image (.jpg, .png or .webp)"
        elif not problem and found.image[1] == 0:
            problem = "empty image (0 bytes)"
        if not problem:
            try:
                captions, numbers = read_captions(found.texts)
            except ValueError as error:
                problem = str(error)
        if problem:
            lost_samples.append(LostSample(key, shard, problem))
        else:
            rows.append(Row(key, *found.image, captions, numbers))
    return rows, lost_samples


def encode_index(rows: list[Row], lost_samples: Iterable[LostSample], tar_size: int) -> bytes:
    """The index as the bytes of a safetensors file."""
    captions = [caption for row in rows for caption in row.captions]
    columns = scalar_columns([row.scalars for row in rows])
    arrays = {
        "images": np.array([(row.offset, row.size) for row in rows], dtype=np.int64).reshape(-1, 2),
        "caption_rows": np.cumsum([0, *(len(row.captions) for row in rows)], dtype=np.int64),
        "scalars": np.stack(list(columns.values()), 1) if columns else np.zeros((len(rows), 0), np.float32),
        **_strings("key", [row.key for row in rows]),
        **_strings("caption", captions),
    }
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    metadata = {
        "format": FORMAT,
        "tar_size": tar_size,
        "identity": digest.hexdigest(),
        "scalars": list(columns),
        "lost": [list(lost) for lost in lost_samples],
    }
    return save(arrays, {"index": json.dumps(metadata)})  # one entry: safetensors keeps no order among several


def _strings(name: str, strings: list[str]) -> dict[str, np.ndarray]:
    # A member's name may hold bytes that are not UTF-8, which tarfile keeps as surrogates.
    encoded = [s.encode("utf-8", "replace") for s in strings]
    blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    return {f"{name}_bytes": blob, f"{name}_ends": np.cumsum([0, *map(len, encoded)], dtype=np.int64)}


class ShardIndex:
    """A decoded index; the arrays are views of `buffer`, which may be a memory map."""

    def __init__(self, buffer: bytes | mmap.mmap):
        arrays = Arrays(buffer)
        metadata = json.loads(arrays.metadata["index"])
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}")
        self.images: np.ndarray = arrays["images"]
        self.scalars: np.ndarray = arrays["scalars"]
        self.scalar_names: list[str] = metadata["scalars"]
        self.tar_size: int = metadata["tar_size"]
        self.identity: str = metadata["identity"]
        self.lost = [LostSample(*lost) for lost in metadata["lost"]]
        self.in_memory = isinstance(buffer, bytes)
        self._buffer = buffer
        self._base = arrays.start
        self._key_ends, self._caption_ends = arrays["key_ends"], arrays["caption_ends"]
        self._caption_rows = arrays["caption_rows"]
        rows, captions = len(self.images), len(self._caption_ends) - 1
        ends = self._key_ends[-1:].tolist(), self._caption_ends[-1:].tolist(), self._caption_rows[-1:].tolist()
        wanted = [len(arrays["key_bytes"])], [len(arrays["caption_bytes"])], [captions]
        shapes = self.images.shape == (rows, 2) and self.scalars.shape == (rows, len(self.scalar_names))
        if not shapes or ends != wanted or len(self._key_ends) != rows + 1 or len(self._caption_rows) != rows + 1:
            raise ValueError("its arrays do not fit together")

    def __len__(self) -> int:
        return len(self.images)

    def keys(self, rows: np.ndarray) -> list[str]:
        return self._decode("key_bytes", self._key_ends, rows)

    def captions(self, row: int) -> list[str]:
        first, last = self._caption_rows[row], self._caption_rows[row + 1]
        return self._decode("caption_bytes", self._caption_ends, np.arange(first, last))

    def picked_captions(self, rows: np.ndarray, pick: np.ndarray) -> list[str]:
        """One caption a row; pick: (B,) in [0, 1), which of its captions each takes."""
        first = self._caption_rows[rows]
        count = self._caption_rows[rows + 1] - first
        return self._decode("caption_bytes", self._caption_ends, first + (pick * count).astype(np.int64))

    def _decode(self, name: str, ends: np.ndarray, which: np.ndarray) -> list[str]:
        starts, stops = (ends[which] + self._base[name]).tolist(), (ends[which + 1] + self._base[name]).tolist()
        buffer = self._buffer
        return [buffer[a:b].decode("utf-8") for a, b in zip(starts, stops)]


def index_path(tar: Path, folder: str | Path | None = None) -> Path:
    """Where the index of a tar stands: beside it, or in a folder, where tars of other folders may bear the same name."""
    if folder is None:
        return tar.with_suffix(INDEX_SUFFIX)
    of_path = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:12]
    return Path(folder, f"{tar.stem}-{of_path}{INDEX_SUFFIX}")


def write_index(tar: Path, rows: list[Row], lost_samples: Iterable[LostSample]) -> None:
    """Write the index of a complete tar next to it."""
    with whole_file(index_path(tar)) as file:
        file.write(encode_index(rows, lost_samples, tar.stat().st_size))


def open_index(tar: Path, path: Path | None = None, compared: bool = False) -> ShardIndex:
    """The index of a tar; one is made where there is none (kept in memory where the folder is read-only).

    path: of the index; none: beside the tar. compared: a tar that is newer than its index was compared with it before. Raises
    UserError when the tar is not the one that was indexed.
    """
    path = index_path(tar) if path is None else path
    if not path.exists():
        log.info("indexing %s", tar)
        encoded = encode_index(*scan_tar(tar), tar.stat().st_size)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(encoded)
        except OSError as error:
            log.info("the index of %s stays in memory: %s", tar, error)
            return ShardIndex(encoded)
    try:
        index = ShardIndex(open_map(path))
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, MemoryError, struct.error) as error:
        raise UserError(f"{path} is not a readable shard index ({error}); delete it, and it is made anew") from error
    size = tar.stat().st_size
    if size != index.tar_size:
        raise UserError(
            f"{tar} has {size} bytes, its index was made for {index.tar_size}: the tar is truncated or was replaced. "
            f"Restore it, or delete {path.name} to index what is there"
        )
    if (
        not compared and tar.stat().st_mtime_ns > path.stat().st_mtime_ns
    ):  # copied in this order, or written again: tars are padded to few sizes
        log.info("%s is newer than its index; comparing them", tar)
        if ShardIndex(encode_index(*scan_tar(tar), size)).identity != index.identity:
            raise UserError(
                f"{tar} holds other samples than {path.name} says: it was replaced. Delete {path.name} to index what is there"
            )
        with suppress(OSError):
            os.utime(path)
    return index
