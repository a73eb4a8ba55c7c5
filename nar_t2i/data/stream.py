"""Remote shards, streamed through webdataset.

A stream has no index, so its order is only approximately that of a run that was not interrupted: a resumed run starts
a new shuffle of the shards. Everything else (ids, random choices, batches of each rank) is as with local shards.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import braceexpand
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import shuffle
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from nar_t2i.data.images import ImageError, decode_image
from nar_t2i.data.order import shuffled
from nar_t2i.data.reading import Read, View, make_batch
from nar_t2i.data.shard_index import IMAGE_SUFFIXES, TEXT_SUFFIXES, read_captions, split_name
from nar_t2i.data.source import LostSample, Sample
from nar_t2i.errors import UserError

SHUFFLE_BUFFER = 1000  # encoded samples that a worker holds and draws from
_BLOCK = 512  # bytes; a tar ends in at least two blocks of zeros


def expand(urls: str) -> list[str]:
    """A URL with braces → its shards. Raises UserError for what cannot be streamed."""
    if not urls.startswith(("http://", "https://", "pipe:")):
        raise UserError(
            f"{urls} cannot be streamed directly; name the command that prints a shard, for example "
            "pipe:aws s3 cp s3://bucket/{00000..00099}.tar -"
        )
    if urls.startswith("http") and shutil.which("curl") is None:
        raise UserError("streaming over http needs the program curl; install it, or name another command with pipe:")
    try:
        return list(braceexpand.braceexpand(urls))
    except ValueError as error:
        raise UserError(f"{urls}: is no pattern of shards: {error}") from error


class StreamShare(NamedTuple):
    """Which part of a stream this process takes. workers: readers of each rank. start: samples consumed before."""

    rank: int = 0
    world: int = 1
    workers: int = 1
    start: int = 0


class StreamReader(IterableDataset):
    """Endless micro-batches of one rank, as `Read`s; a sample that does not decode gives way to the next one.

    urls: `http(s)://…` or `pipe:COMMAND`, with braces for the shards. micro: rows a batch. The share is given
    explicitly, because a worker process cannot know the rank. Raises UserError when a reader would have no shard.
    """

    def __init__(self, urls: str, view: View, micro: int, share: StreamShare):
        self._urls, self._view, self._micro, self._share = expand(urls), view, micro, share
        readers = share.world * share.workers
        if len(self._urls) < readers:
            raise UserError(
                f"{len(self._urls)} shards in {urls} for {share.world} ranks × {share.workers} workers: each worker "
                "needs a shard of its own; take fewer workers, or write more and smaller shards"
            )

    def __iter__(self) -> Iterator[Read]:
        worker = get_worker_info()
        number = worker.id if worker else 0
        share = self._share
        # The loader takes one batch from each worker in turn.
        first = share.start + (number * share.world + share.rank) * self._micro
        stride = share.workers * share.world * self._micro
        samples: list[Sample] = []
        counts = _Counts()
        for item in self._samples(share.rank * share.workers + number, counts):
            if item is None:
                yield Read(None, *counts.take())
                continue
            samples.append(item)
            if len(samples) == self._micro:
                ids = torch.arange(first, first + self._micro)
                yield Read(make_batch(samples, ids, self._view), *counts.take())
                samples, first = [], first + stride

    def _samples(self, reader: int, counts: _Counts) -> Iterator[Sample | None]:
        """Decoded samples of this reader's shards, endlessly; None after a pass that had none."""
        readers, epoch = self._share.world * self._share.workers, 0
        while True:
            # Another start is another shuffle, so that a run that is often interrupted sees all shards.
            order = shuffled(len(self._urls), self._view.seed, f"stream/{self._share.start}", epoch)
            urls = [self._urls[i] for i in order[reader::readers]]
            chance = random.Random(f"{self._view.seed}/{self._share.start}/{epoch}/{reader}")
            found = False
            for raw in shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 10, rng=chance)(_raw_samples(urls, counts)):
                sample = _decode(raw, counts)
                if sample is not None:
                    found = True
                    yield sample
            if not found:
                yield None
            epoch += 1


class _Counts:
    """What happened since the last batch, and how long shards usually are."""

    def __init__(self) -> None:
        self._tried, self._failed, self._lost_samples = 0, 0, []
        self._whole_shards, self._samples_in_them = 0, 0

    def take(self) -> tuple[int, int, list[LostSample]]:
        taken = self._tried, self._failed, self._lost_samples
        self._tried, self._failed, self._lost_samples = 0, 0, []
        return taken

    def sample(self, lost: LostSample | None = None) -> None:
        self._tried += 1
        if lost is not None:
            self._failed += 1
            self._lost_samples.append(lost)

    def whole_shard(self, samples: int) -> None:
        self._whole_shards += 1
        self._samples_in_them += samples

    def broken_shard(self, samples: int, lost: LostSample) -> None:
        """A shard that ended after `samples`; it counts as many lost ones as other shards say it should have had."""
        usual = self._samples_in_them // self._whole_shards if self._whole_shards else 0
        missing = max(1, usual - samples)
        self._tried += missing
        self._failed += missing
        self._lost_samples.append(lost)


class _Watched:
    """A stream that remembers whether it ended as a tar does: webdataset takes a cut between members for the end."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._head, self._tail = b"", b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if len(self._head) < _BLOCK:
            self._head += data[:_BLOCK]
        self._tail = (self._tail + data)[-_BLOCK:]
        return data

    @property
    def complete(self) -> bool:
        plain = self._head[257:262] == b"ustar"  # the end of a compressed tar is checked by its decompressor
        return not plain or self._tail == bytes(_BLOCK)


def _raw_samples(urls: list[str], counts: _Counts) -> Iterator[dict[str, Any]]:
    """Grouped members of the shards, undecoded. What breaks is counted, and the next shard is taken."""
    for url in urls:
        problems: list[str] = []

        def handler(error: Exception) -> bool:
            problems.append(str(error.args[0] if error.args else error))
            return True

        found = 0
        try:
            stream = gopen(url)
            try:
                watched = _Watched(stream)
                # One shard at a time, so that a sample that was cut off is never completed from the next shard.
                files = tar_file_expander([{"url": url, "stream": watched}], handler=handler, select_files=_wanted)
                for raw in group_by_keys(files, handler=handler):
                    found += 1
                    yield raw
            except BaseException:  # a reader that wants no more, too
                with suppress(OSError):
                    stream.close()
                raise
            stream.close()  # a command that failed says so here
            if not watched.complete:
                problems.append("the tar is cut off")
        except OSError as error:
            problems.append(str(error))
        if problems:
            counts.broken_shard(found, LostSample(f"(after {found} samples)", url, problems[0]))
        else:
            counts.whole_shard(found)


def _wanted(member: str) -> bool:
    return split_name(member)[1] in IMAGE_SUFFIXES + TEXT_SUFFIXES


def _decode(raw: dict[str, Any], counts: _Counts) -> Sample | None:
    """Members → a sample, by the same functions as local shards: webdataset's own decoders load pickles."""
    encoded = next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)
    try:
        if encoded is None:
            raise ValueError("no image (.jpg, .png or .webp) next to its text in the tar")
        captions, numbers = read_captions(raw)
        sample = Sample(raw["__key__"], decode_image(encoded), captions, numbers)
    except (ImageError, ValueError) as error:
        counts.sample(LostSample(raw["__key__"], raw["__url__"], str(error)))
        return None
    counts.sample()
    return sample
