"""The order of the data: a pure function of the seed and the position, so that a run's state is one number.

An epoch shuffles the blocks (shards), cuts them into windows of neighbouring blocks, and shuffles the samples of each
window: reads stay near each other on a parallel file system, and no more than one window is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from nar_t2i.errors import UserError
from nar_t2i.noise import Noise


class Order:
    """Positions in a run's endless data order → sample indices."""

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """(B,) int64 positions from 0 → (B,) int64 sample indices."""
        raise NotImplementedError


def shuffled(count: int, seed: int, stream: str, step: int) -> np.ndarray:
    """(count,) int64, a permutation of 0 … count − 1 that is the same on every machine and version.

    It sorts counter-based noise, because NumPy does not promise that its own shuffles stay the same.
    """
    keys = Noise(seed, torch.arange(count), torch.float64).uniform(stream, step).numpy()
    order = np.argsort(keys)
    ranked = keys[order]
    if (ranked[1:] == ranked[:-1]).any():  # the fast sort leaves ties in an order of the machine's own
        order = np.argsort(keys, kind="stable")
    return order


class ShuffledOrder(Order):
    """Every sample once an epoch, in windows of shuffled blocks.

    blocks: samples of each block. window: blocks that are shuffled together. name: of the source, for messages; the
    order does not depend on it, so that data may move to another folder.
    """

    def __init__(self, blocks: Sequence[int], seed: int, window: int, name: str = ""):
        if window < 1:
            raise UserError(f"the data order needs a window of at least 1 block, not {window}")
        self._lengths = np.asarray(blocks, dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self.length = int(self._lengths.sum())
        if self.length == 0:
            raise UserError(f"the data source {name!r} has no readable samples")
        self._seed, self._window = seed, window
        self._epoch = -1
        self._permuted: dict[int, np.ndarray] = {}

    def indices(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        result = np.empty_like(positions)
        epochs = positions // self.length
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            result[rows] = self._in_epoch(int(epoch), positions[rows] - epoch * self.length)
        return result

    def _in_epoch(self, epoch: int, ordinals: np.ndarray) -> np.ndarray:
        self._enter(epoch)
        windows = np.searchsorted(self._window_starts, ordinals, side="right") - 1
        result = np.empty_like(ordinals)
        for window in np.unique(windows):
            rows = np.flatnonzero(windows == window)
            result[rows] = self._window_samples(int(window))[ordinals[rows] - self._window_starts[window]]
        return result

    def _enter(self, epoch: int) -> None:
        """Shuffle the blocks of an epoch."""
        if epoch == self._epoch:
            return
        self._epoch, self._permuted = epoch, {}
        self._blocks = shuffled(len(self._lengths), self._seed, "order/blocks", epoch)
        ends = np.cumsum(self._lengths[self._blocks])
        self._window_starts = np.concatenate([[0], ends[self._window - 1 :: self._window]])
        if self._window_starts[-1] == self.length:  # the blocks fill their windows exactly
            self._window_starts = self._window_starts[:-1]

    def _window_samples(self, window: int) -> np.ndarray:
        """The sample indices of a window, shuffled; the two that were used last are kept, for batches on a seam."""
        if window not in self._permuted:
            chosen = self._blocks[window * self._window : (window + 1) * self._window]
            samples = np.concatenate([np.arange(self._lengths[b]) + self._starts[b] for b in chosen])
            # The epoch is part of the step, so that a window is shuffled anew in each.
            step = (self._epoch << 24) + window
            samples = samples[shuffled(len(samples), self._seed, "order/samples", step)]
            while len(self._permuted) >= 2:
                del self._permuted[next(iter(self._permuted))]
            self._permuted[window] = samples
        return self._permuted[window]


class MixedOrder(Order):
    """Several orders, drawn by weight; the index spaces of the parts lie one behind the other.

    Weights hold exactly: after any number of rounds, each part was drawn its share of times, to within one sample
    (the heaviest part takes the rounding of the others). Within a round the parts come in shuffled order. So the
    number of draws of a part up to any position has a closed form, and resuming costs nothing.
    """

    def __init__(self, parts: Sequence[Order], lengths: Sequence[int], weights: Sequence[float], seed: int):
        self._parts, self._seed = list(parts), seed
        self._offsets = np.cumsum(lengths) - np.asarray(lengths)
        self._heaviest = int(np.argmax(weights))
        # Integer weights make the counts exact at any position.
        scale = sum(weights)
        self._weights = [round(w / scale * (1 << 40)) for w in weights]
        self._round = max(1024, len(self._parts) ** 2)  # the heaviest part always has room for the others' rounding
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def indices(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        part, within = np.empty_like(positions), np.empty_like(positions)
        rounds = positions // self._round
        for number in np.unique(rounds):
            rows = np.flatnonzero(rounds == number)
            parts, counts = self._draw(int(number))
            slots = positions[rows] - number * self._round
            part[rows], within[rows] = parts[slots], counts[slots]
        result = np.empty_like(positions)
        for p in np.unique(part):
            rows = np.flatnonzero(part == p)
            result[rows] = self._parts[p].indices(within[rows]) + self._offsets[p]
        return result

    def drawn(self, total: int) -> np.ndarray:
        """(parts,) how often each part was drawn in the first `total` positions, at the end of a round."""
        counts = np.array([(total * w) >> 40 for w in self._weights], dtype=np.int64)
        counts[self._heaviest] += total - counts.sum()
        return counts

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A round's part for each slot, and the position within that part."""
        if self._cached is None or self._cached[0] != number:
            before, after = self.drawn(number * self._round), self.drawn((number + 1) * self._round)
            parts = np.repeat(np.arange(len(self._parts)), after - before)
            counts = np.concatenate([np.arange(a, b) for a, b in zip(before, after)])
            mixed = shuffled(self._round, self._seed, "order/mixture", number)
            self._cached = (number, parts[mixed], counts[mixed])
        return self._cached[1:]


class GlobalBatchSampler:
    """One rank's micro-batches of an endless run, as arrays of positions.

    Global batch s holds the positions s·G … (s+1)·G − 1, whatever the number of ranks: micro-batch after micro-batch,
    and within one, rank after rank. start: positions that were consumed before, a multiple of the global batch.
    """

    def __init__(self, global_batch_size: int, micro_batch_size: int, rank: int = 0, world: int = 1, start: int = 0):
        accumulation_steps(global_batch_size, micro_batch_size, world)
        if start % global_batch_size:
            raise UserError(
                f"data.init_args.global_batch_size {global_batch_size}: the run goes on behind {start} samples, which are no whole "
                "number of such batches; keep the size that it had, or one that divides them"
            )
        self._micro, self._rank, self._world, self.start = micro_batch_size, rank, world, start

    def __iter__(self) -> Iterator[np.ndarray]:
        first = self.start + self._rank * self._micro
        while True:
            yield np.arange(first, first + self._micro)
            first += self._micro * self._world


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world: int) -> int:
    """Micro-batches a rank takes for one optimizer step. Raises UserError when the numbers do not divide."""
    if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (micro_batch_size * world):
        raise UserError(
            f"global_batch_size {global_batch_size} is not a positive multiple of micro_batch_size {micro_batch_size} "
            f"× {world} ranks; change one of the three"
        )
    return global_batch_size // (micro_batch_size * world)


def validation_batches(count: int, micro_batch_size: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """A rank's batches of indices: every sample once over the ranks, and every rank the same number of batches.

    Rows are spread evenly (batches differ by at most one), since ranks that ran fewer batches would leave the others
    waiting in a collective; for that, where there are few samples, a batch may have one row more than `micro_batch_size`.
    Raises UserError when there are fewer samples than ranks.
    """
    if count < world:
        raise UserError(f"validation has {count} samples for {world} ranks; give it at least one a rank")
    cells = min(-(-count // (micro_batch_size * world)), count // world) * world  # none of them empty
    edges = np.arange(cells + 1) * count // cells
    return [np.arange(edges[c], edges[c + 1]) for c in range(rank, cells, world)]
