"""What every source of captioned images looks like: samples by index, in blocks that lie close together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from nar_t2i.data.order import Order, ShuffledOrder
from nar_t2i.hashing import text_hash
from nar_t2i.types import Condition, TokenSpec

BLOCK = 1024  # samples a block, for sources that have no shards of their own


@dataclass
class Sample:
    """One captioned image.

    key: its name, for messages.
    image: (H, W, 3) uint8 RGB, or None when only the text was read or tokens come from a cache.
    captions: at least one.
    scalars: numbers about the sample, such as original_width in pixels.
    """

    key: str
    image: np.ndarray | None
    captions: list[str]
    scalars: dict[str, float] = field(default_factory=dict)


class LostSample(NamedTuple):
    """A sample that cannot be used: its key, the shard (or source) that holds it, and why."""

    key: str
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key} in {self.shard}: {self.reason}"


class SampleError(Exception):
    """A sample that cannot be read. Callers count it and go on with another one."""

    def __init__(self, lost: LostSample):
        super().__init__(str(lost))
        self.lost = lost

    def __reduce__(self):
        return SampleError, (self.lost,)


class Texts(NamedTuple):
    """The text of many samples, one caption chosen for each. scalars: (B,) float32 each, NaN where there is none."""

    keys: list[str]
    captions: list[str]
    scalars: dict[str, np.ndarray]


class Tokens(NamedTuple):
    """What a cache holds of many samples. tokens: (B, N, *value_shape). errors: (B, N) float32, or None where it has none."""

    texts: Texts
    tokens: torch.Tensor
    errors: torch.Tensor | None


class Source:
    """Captioned images by index. A subclass gives `name`, `__len__` and `read`; the rest has defaults.

    Sources travel to worker processes, so they must be picklable and open their files lazily.
    """

    name: str
    token_spec: TokenSpec | None = None  # set where images come as tokens from a cache
    has_errors = False  # True where tokens come with their quantisation errors
    has_states = False  # True where captions come with their states from a cache
    truncated: float | None = None  # there, the share of the captions that did not fit into the text encoder

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Sample:
        """The sample with its image. Raises SampleError when it cannot be read."""
        raise NotImplementedError

    def read_text(self, index: int) -> Sample:
        """The sample without its image. Override it where that is cheaper; raises SampleError like `read`."""
        sample = self.read(index)
        sample.image = None
        return sample

    def read_texts(self, indices: np.ndarray, pick: np.ndarray) -> Texts:
        """Keys, one caption each, and scalars of many samples.

        indices: (B,) int64. pick: (B,) in [0, 1), which of its captions each sample takes.
        """
        samples = [self.read_text(int(i)) for i in indices]
        captions = [s.captions[int(p * len(s.captions))] for s, p in zip(samples, pick)]
        return Texts([s.key for s in samples], captions, scalar_columns([s.scalars for s in samples]))

    def read_tokens(self, indices: np.ndarray, pick: np.ndarray, place: np.ndarray, flip: np.ndarray) -> Tokens:
        """`read_texts`, and tokens, where `token_spec` is set.

        place: (B,) in [0, 1), which of the cached crops each sample takes. flip: (B,), whether it takes a mirrored one.
        """
        raise NotImplementedError

    def check_views(self, crops: bool, flips: bool) -> None:
        """Raise UserError where tokens come from a cache without the crops and mirrored images that are asked for."""

    def read_states(self, indices: np.ndarray, pick: np.ndarray) -> Condition:
        """The states of one caption of each sample, as `read_texts` picks it, where `has_states` is True."""
        raise NotImplementedError

    def check_text(self, fingerprint: dict[str, str]) -> None:
        """Raise UserError where states come from a cache that another text encoder made."""

    def check_tokens(self, spec: TokenSpec, codec_hash: str) -> None:
        """Raise UserError where tokens come from a cache that another codec made; images suit any codec."""

    def check_errors(self) -> None:
        """Raise UserError where tokens come from a cache without their quantisation errors."""

    @property
    def blocks(self) -> Sequence[int]:
        """Lengths of the runs of samples that are quick to read together (shards); they sum to `len(self)`."""
        full, rest = divmod(len(self), BLOCK)
        return [BLOCK] * full + [rest] * (rest > 0)

    def block_name(self, block: int) -> str:
        """A short file-name-safe name of a block, the same in every run."""
        return f"{block:05d}"

    def identity(self, block: int) -> str:
        """A hash of what the block holds: a token cache made from another block is refused by it."""
        return text_hash(f"{self.name}:{block}:{self.blocks[block]}")

    def fingerprint(self) -> str:
        """A hash of the samples and of their order, but for the order's seed and window; not of where they lie."""
        digest = hashlib.sha256()
        for block, length in enumerate(self.blocks):
            digest.update(f"{self.identity(block)}:{length}".encode())
        return digest.hexdigest()

    @property
    def lost(self) -> list[LostSample]:
        """Samples that are known to be unusable before any is read; they have no index."""
        return []

    @property
    def lost_count(self) -> int:
        """How many these are, where one entry stands for all that a damaged shard held."""
        return len(self.lost)

    @property
    def scalar_names(self) -> set[str] | None:
        """The numbers that samples may have; None where that is not known before they are read."""
        return None

    def order(self, seed: int, window: int) -> Order:
        """The endless shuffled order of this source. window: blocks that are shuffled together."""
        return ShuffledOrder(self.blocks, seed, window, self.name)


class SourceAround(Source):
    """Another source, of which a subclass changes what it has to."""

    def __init__(self, source: Source):
        self._source, self.name = source, source.name
        self.token_spec, self.has_errors, self.has_states = source.token_spec, source.has_errors, source.has_states
        self.truncated = source.truncated

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Sample:
        return self._source.read(index)

    def read_text(self, index: int) -> Sample:
        return self._source.read_text(index)

    def read_texts(self, indices: np.ndarray, pick: np.ndarray) -> Texts:
        return self._source.read_texts(indices, pick)

    def read_tokens(self, indices: np.ndarray, pick: np.ndarray, place: np.ndarray, flip: np.ndarray) -> Tokens:
        return self._source.read_tokens(indices, pick, place, flip)

    def check_views(self, crops: bool, flips: bool) -> None:
        self._source.check_views(crops, flips)

    def read_states(self, indices: np.ndarray, pick: np.ndarray) -> Condition:
        return self._source.read_states(indices, pick)

    def check_text(self, fingerprint: dict[str, str]) -> None:
        self._source.check_text(fingerprint)

    def check_tokens(self, spec: TokenSpec, codec_hash: str) -> None:
        self._source.check_tokens(spec, codec_hash)

    def check_errors(self) -> None:
        self._source.check_errors()

    @property
    def blocks(self) -> Sequence[int]:
        return self._source.blocks

    def block_name(self, block: int) -> str:
        return self._source.block_name(block)

    def identity(self, block: int) -> str:
        return self._source.identity(block)

    @property
    def lost(self) -> list[LostSample]:
        return self._source.lost

    @property
    def lost_count(self) -> int:
        return self._source.lost_count

    @property
    def scalar_names(self) -> set[str] | None:
        return self._source.scalar_names


def scalar_columns(rows: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    """Rows of named numbers as columns: (B,) float32 a name, NaN where a row has none."""
    names = sorted(set().union(*rows)) if rows else []
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=np.float32) for name in names}
