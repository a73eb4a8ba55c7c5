"""Local shards: tar files of captioned images, read by random access."""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

import braceexpand
import numpy as np
import torch.distributed as dist

from nar_t2i.data.images import MAX_PIXELS, ImageError, decode_image
from nar_t2i.data.shard_index import REST, ShardIndex, index_path, open_index
from nar_t2i.data.source import LostSample, Sample, SampleError, Source, Texts
from nar_t2i.errors import UserError
from nar_t2i.files import allow_open_files

log = logging.getLogger(__name__)

OPEN_SHARDS = 128  # file handles a process keeps; a window of the data order needs far fewer


class ShardSource(Source):
    """Tar shards in img2dataset's layout: `key.jpg|jpeg|png|webp`, `key.txt`, `key.json`.

    path: a folder of tars, one tar, or a pattern such as `shards/{00000..00099}.tar` or `shards/*.tar`.
    max_pixels: larger images are refused. index_folder: of the indices, where they cannot stand beside the tars.
    """

    def __init__(self, path: str, max_pixels: int = MAX_PIXELS, index_folder: str | None = None):
        allow_open_files()
        self.name = str(path)
        self._tars = find_tars(path)
        self._stems = Counter(tar.stem for tar in self._tars)
        self._max_pixels = max_pixels
        self._open: OrderedDict[int, tuple[ShardIndex, int]] = OrderedDict()
        self._compared: set[int] = set()  # shards that were, with their index
        self._in_memory: dict[int, ShardIndex] = {}  # of shards in a read-only folder, where a new scan would be slow
        self._lengths, self._identities, self._lost, self._scalar_names = [], [], [], set()
        self._held, self._damaged = [], []  # of each shard: samples that it has, or has lost; whether it is cut off
        self._index_paths = [index_path(tar, index_folder) for tar in self._tars]
        self._make_missing()
        for shard in range(len(self._tars)):
            index = self._index(shard)
            self._lengths.append(len(index))
            self._identities.append(index.identity)
            self._lost += index.lost
            self._held.append(len(index) + len(index.lost))
            self._damaged.append(any(lost.key == REST for lost in index.lost))
            self._scalar_names.update(index.scalar_names)
        self._starts = np.cumsum(self._lengths) - self._lengths

    def _make_missing(self) -> None:
        """Index the shards that were not. Ranks begin in different places, and leave to each other what is done by then."""
        missing = [shard for shard, path in enumerate(self._index_paths) if not path.exists()]
        if not missing:
            return
        log.warning(
            "%d of %d shards of %s have no index yet and are read through once; data_prep/index_shards.py does that ahead, by many "
            "processes",
            len(missing),
            len(self._tars),
            self.name,
        )
        together = dist.is_available() and dist.is_initialized()
        first = len(missing) * dist.get_rank() // dist.get_world_size() if together else 0
        for shard in missing[first:] + missing[:first]:
            if not self._index_paths[shard].exists():
                self._index(shard)
        if self._in_memory:
            log.warning(
                "%s is read-only, so that every start, and every rank, reads its shards through and keeps their indices in "
                "memory; make them "
                "elsewhere with data_prep/index_shards.py --index-folder, and name it as ShardSource's index_folder",
                self.name,
            )

    def __len__(self) -> int:
        return sum(self._lengths)

    @property
    def blocks(self) -> Sequence[int]:
        return self._lengths

    @property
    def lost(self) -> list[LostSample]:
        return self._lost

    @property
    def lost_count(self) -> int:
        """Those that are known, and for each damaged shard as many as it holds fewer than a whole one usually does."""
        held, damaged = np.array(self._held), np.array(self._damaged)
        usual = int(np.median(held[~damaged])) if not damaged.all() else 0
        return len(self._lost) + int((usual - held[damaged]).clip(min=0).sum())

    @property
    def scalar_names(self) -> set[str]:
        return self._scalar_names

    def block_name(self, block: int) -> str:
        stem = self._tars[block].stem
        return stem if self._stems[stem] == 1 else f"{block:05d}-{stem}"  # tars of several folders may bear one name

    def identity(self, block: int) -> str:
        return self._identities[block]

    def read(self, index: int) -> Sample:
        shard, row = self._locate(index)
        entry, handle = self._shard(shard)
        sample = self._text(entry, row)
        offset, size = entry.images[row].tolist()
        try:
            sample.image = decode_image(os.pread(handle, size, offset), self._max_pixels)
        except (ImageError, OSError) as error:
            raise SampleError(LostSample(sample.key, self._tars[shard].name, str(error))) from error
        return sample

    def read_bytes(self, index: int) -> bytes:
        """The encoded image as it lies in the tar."""
        shard, row = self._locate(index)
        entry, handle = self._shard(shard)
        offset, size = entry.images[row].tolist()
        return os.pread(handle, size, offset)

    def read_text(self, index: int) -> Sample:
        shard, row = self._locate(index)
        return self._text(self._shard(shard)[0], row)

    def read_texts(self, indices: np.ndarray, pick: np.ndarray) -> Texts:
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        keys = np.empty(len(indices), dtype=object)
        captions = np.empty(len(indices), dtype=object)
        scalars: dict[str, np.ndarray] = {}
        for shard in np.unique(shards):
            chosen = np.flatnonzero(shards == shard)
            entry, rows = self._shard(int(shard))[0], indices[chosen] - self._starts[shard]
            keys[chosen] = entry.keys(rows)
            captions[chosen] = entry.picked_captions(rows, pick[chosen])
            for column, name in enumerate(entry.scalar_names):
                empty = np.full(len(indices), np.nan, dtype=np.float32)
                scalars.setdefault(name, empty)[chosen] = entry.scalars[rows, column]
        return Texts(keys.tolist(), captions.tolist(), scalars)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # handles do not travel to other processes

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    @staticmethod
    def _text(entry: ShardIndex, row: int) -> Sample:
        numbers = dict(zip(entry.scalar_names, entry.scalars[row].tolist()))
        return Sample(entry.keys(np.array([row]))[0], None, entry.captions(row), numbers)

    def _shard(self, shard: int) -> tuple[ShardIndex, int]:
        """The index and the open file of a shard; the least recently used one makes room."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][1])
        self._open[shard] = self._index(shard), os.open(self._tars[shard], os.O_RDONLY)
        return self._open[shard]

    def _index(self, shard: int) -> ShardIndex:
        if shard in self._in_memory:
            return self._in_memory[shard]
        index = open_index(self._tars[shard], self._index_paths[shard], compared=shard in self._compared)
        self._compared.add(shard)
        if index.in_memory:
            self._in_memory[shard] = index
        return index


def find_tars(path: str) -> list[Path]:
    """The tars that a folder, a file or a pattern names, in order. Raises UserError when there are none."""
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
    else:
        found = []
        try:
            names = list(braceexpand.braceexpand(str(path)))
        except ValueError as error:
            raise UserError(f"{path}: is no pattern of shards: {error}") from error
        for name in names:
            here = Path(name)
            found += sorted(here.parent.glob(here.name)) if any(c in here.name for c in "*?[") else [here]
    missing = [str(tar) for tar in found if not tar.is_file()]
    if missing:
        raise UserError(f"shards do not exist: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}")
    if not found:
        raise UserError(f"no .tar shards in {path}; data_prep/ makes them from images and captions")
    return found
