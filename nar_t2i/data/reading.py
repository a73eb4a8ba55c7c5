"""Positions → batches: read, choose a caption, crop, and replace what cannot be read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nar_t2i.data.images import fit
from nar_t2i.data.lost import LostLedger
from nar_t2i.data.order import Order
from nar_t2i.data.source import LostSample, Sample, SampleError, Source, Texts, scalar_columns
from nar_t2i.data.token_cache import CONDITIONS
from nar_t2i.errors import UserError
from nar_t2i.noise import Noise
from nar_t2i.types import Batch, Condition

MAX_REPLACEMENTS = 1000  # neighbours that are tried in place of a sample; a longer run of broken ones is no accident


IN_BAND = 1 << 20  # bytes of a tensor up to which copying is quicker than sharing


class Read(NamedTuple):
    """What a worker hands over.

    batch: None when nothing was readable. tried: samples that were attempted; failed: how many of them were lost.
    lost_samples: what is known about these, one entry for a whole shard that failed.

    On its way to the trainer it takes small tensors along. torch would put each into shared memory of its own and send a
    file descriptor, at 100 µs and more a tensor, and a batch from a cache is little else.
    """

    batch: Batch | None
    tried: int
    failed: int
    lost_samples: list[LostSample]

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, tuple(_in_band(value) for value in self)


class _InBand(NamedTuple):
    """A tensor as what pickle copies."""

    content: bytearray
    dtype: torch.dtype
    shape: tuple[int, ...]


def _in_band(value: Any) -> Any:
    """Nested values with their small tensors as _InBand."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu" or not 0 < value.nbytes <= IN_BAND:
            return value
        return _InBand(bytearray(value.contiguous().view(-1).view(torch.uint8).numpy()), value.dtype, tuple(value.shape))
    return _nested(value, _in_band)


def _as_tensors(value: Any) -> Any:
    """The inverse."""
    if isinstance(value, _InBand):
        return torch.frombuffer(value.content, dtype=value.dtype).view(value.shape)
    return _nested(value, _as_tensors)


def _nested(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` on what batches are nested of; texts, numbers and lists, which hold no tensors, stay."""
    if isinstance(value, (Batch, Condition)):
        return type(value)(*map(change, value))
    if type(value) is tuple:
        return tuple(map(change, value))
    return {key: change(item) for key, item in value.items()} if isinstance(value, dict) else value


def _received(*fields: Any) -> Read:
    return Read(*map(_as_tensors, fields))


@dataclass(frozen=True)
class View:
    """How a sample is looked at. size: pixels a side. Random choices come from `seed` and the sample's id."""

    size: int
    seed: int = 0
    random_caption: bool = False
    random_crop: bool = False
    random_flip: bool = False
    scalars: tuple[str, ...] = ()


class BatchReader(Dataset):
    """Reads the batch at an array of positions; it lives in the workers.

    order: positions → sample indices of training, where an unreadable sample is replaced by the next readable one.
    None: positions are indices (validation), and an unreadable sample is left out; where nothing else is left of a batch, since
    all ranks must have as many, the next readable one takes their place.
    """

    def __init__(self, source: Source, view: View, order: Order | None):
        self._source, self._view, self._order = source, view, order

    def __getitems__(self, positions: np.ndarray) -> Read | UserError:
        try:
            return self._read(positions)
        except UserError as error:
            return error  # raised by `reads`; from a worker it would arrive as the text of a traceback

    def _read(self, positions: np.ndarray) -> Read:
        ids = torch.from_numpy(np.asarray(positions, dtype=np.int64))
        indices = positions if self._order is None else self._order.indices(positions)
        if self._source.token_spec is not None:
            return self._read_tokens(ids, indices)
        samples, lost_samples, read = [], [], []
        for index in indices.tolist():
            sample, failed, found = self._readable(index)
            samples.append(sample)
            lost_samples += failed
            read += [found] if sample is not None else []
        tried = len(indices) + len(lost_samples)
        if self._order is None:
            tried = len(indices)
            ids = ids[torch.tensor([s is not None for s in samples], dtype=torch.bool)]
            samples = [s for s in samples if s is not None]
            if not samples:
                samples, read = self._next_readable(int(indices[-1]))
                ids = torch.tensor(read)
        if not samples or None in samples:
            return Read(None, tried, len(lost_samples), lost_samples)
        batch = self._batch(samples, ids)
        condition = self._states(np.array(read), choices(ids, self._view).caption)
        return Read(batch._replace(condition=condition), tried, len(lost_samples), lost_samples)

    def _batch(self, samples: list[Sample], ids: torch.Tensor) -> Batch:
        return make_batch(samples, ids, self._view)

    def _states(self, indices: np.ndarray, pick: np.ndarray) -> Condition | None:
        return self._source.read_states(indices, pick) if self._source.has_states else None

    def _readable(self, index: int) -> tuple[Sample | None, list[LostSample], int]:
        """The sample, or in training the next one that can be read; what failed on the way; and its index."""
        lost_samples: list[LostSample] = []
        attempts = 1 if self._order is None else min(MAX_REPLACEMENTS, len(self._source))
        for step in range(attempts):
            try:
                found = (index + step) % len(self._source)
                return self._source.read(found), lost_samples, found
            except SampleError as error:
                lost_samples.append(error.lost)
        return None, lost_samples, index

    def _next_readable(self, index: int) -> tuple[list[Sample], list[int]]:
        """The sample after an index that can be read, and its index; nothing where there is none nearby."""
        for step in range(1, min(MAX_REPLACEMENTS, len(self._source))):
            found = (index + step) % len(self._source)
            with suppress(SampleError):  # which is told where its own turn comes
                return [self._source.read(found)], [found]
        return [], []

    def _read_tokens(self, ids: torch.Tensor, indices: np.ndarray) -> Read:
        """A batch from a cache, gathered as arrays: no image is opened and no sample object is made."""
        choice = choices(ids, self._view)
        texts, tokens, errors = self._source.read_tokens(indices, choice.caption, choice.left, choice.flip)
        scalars = {name: torch.from_numpy(_column(texts, name)) for name in (*self._view.scalars, *CONDITIONS)}
        condition = self._states(indices, choice.caption)
        return Read(Batch(ids, texts.keys, texts.captions, None, tokens, scalars, errors, condition), len(indices), 0, [])


def _column(texts: Texts, name: str) -> np.ndarray:
    return texts.scalars.get(name, np.full(len(texts.keys), np.nan, dtype=np.float32))


class Choices(NamedTuple):
    """The random choices of a batch. caption: (B,) in [0, 1). top, left: (B,) place of the crop. flip: (B,) bool."""

    caption: np.ndarray
    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray

    @classmethod
    def fixed(cls, count: int, place: float, flip: bool) -> Choices:
        """The first caption, and one crop, the same for all."""
        return cls(np.zeros(count), np.full(count, place), np.full(count, place), np.full(count, flip))


def choices(ids: torch.Tensor, view: View) -> Choices:
    """Every choice of a sample is a function of (seed, id)."""
    noise, count = Noise(view.seed, ids, torch.float64), len(ids)
    caption = noise.uniform("data/caption").numpy() if view.random_caption else np.zeros(count)
    place = noise.uniform("data/crop", shape=(2,)).numpy() if view.random_crop else np.full((count, 2), 0.5)
    flip = noise.uniform("data/flip").numpy() < 0.5 if view.random_flip else np.zeros(count, dtype=bool)
    return Choices(caption, place[:, 0], place[:, 1], flip)


def make_batch(samples: list[Sample], ids: torch.Tensor, view: View, choice: Choices | None = None) -> Batch:
    """Samples with images → a batch: one caption each, and the square that `view`, or `choice`, describes."""
    choice = choices(ids, view) if choice is None else choice
    captions = [s.captions[int(p * len(s.captions))] for s, p in zip(samples, choice.caption)]
    pixels, rows = [], []
    for row, sample in enumerate(samples):
        place = (float(choice.top[row]), float(choice.left[row]))
        fitted = fit(sample.image, view.size, place, bool(choice.flip[row]))
        pixels.append(fitted.pixels)
        height, width = (
            _or(sample.scalars.get(f"original_{side}"), here) for side, here in zip(("height", "width"), sample.image.shape)
        )
        rows.append(
            {
                **{name: sample.scalars.get(name, float("nan")) for name in view.scalars},
                **dict(zip(CONDITIONS, (width, height, fitted.top, fitted.left), strict=True)),
            }
        )
    images = torch.from_numpy(np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2)))
    scalars = {name: torch.from_numpy(column) for name, column in scalar_columns(rows).items()}
    return Batch(ids, [s.key for s in samples], captions, images, None, scalars)


def _or(said: float | None, measured: int) -> float:
    """What a sample says of its original, which was larger where it was shrunk on its way here; else what it measures."""
    return measured if said is None or math.isnan(said) else said


def reads(loader: DataLoader) -> Iterator[Read]:
    """What a loader of a `BatchReader` yields. Raises the UserError that a worker met."""
    for read in loader:
        if isinstance(read, UserError):
            raise read
        yield read


class CountedLoader:
    """Batches for a trainer: an iterable whose lost samples are booked in the main process.

    make_loader: builds the DataLoader of `Read`s, anew for each pass, since where a pass begins is known only then.
    length: batches an epoch as the trainer sees it; None where there is no end.
    yielded, waited: batches handed over, and the seconds that the trainer spent asking for them.
    """

    def __init__(self, make_loader: Callable[[], DataLoader], ledger: LostLedger, length: int | None = None):
        self._make_loader, self._ledger, self._length = make_loader, ledger, length
        self.yielded = 0
        self.waited = 0.0

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("an endless loader has no length")
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        asked = time.perf_counter()
        for read in reads(self._make_loader()):
            self._ledger.note(read.tried, read.failed, read.lost_samples)
            if read.batch is None:
                self._ledger.refuse_empty()
            self.yielded += 1
            self.waited += time.perf_counter() - asked
            yield read.batch
            asked = time.perf_counter()

    def state_dict(self) -> dict:
        """Empty: the data module keeps the count. Lightning asks for it before it trusts a loader to resume."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """See `state_dict`."""
