"""The order is a pure function of (seed, epoch), and the same for any ranks × micro-batch × accumulation."""

import numpy as np
import pytest

from nar_t2i.data.order import GlobalBatchSampler, MixedOrder, ShuffledOrder, accumulation_steps, validation_batches
from nar_t2i.errors import UserError

BLOCKS = [7, 0, 5, 9, 3, 12, 1]
TOTAL = sum(BLOCKS)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_every_epoch_is_another_permutation(window):
    order = ShuffledOrder(BLOCKS, 1, window)
    epochs = [order.indices(np.arange(e * TOTAL, (e + 1) * TOTAL)) for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(TOTAL))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_pure_in_seed_and_position():
    everything = ShuffledOrder(BLOCKS, 1, 2).indices(np.arange(3 * TOTAL))
    assert np.array_equal(everything, ShuffledOrder(BLOCKS, 1, 2, "elsewhere").indices(np.arange(3 * TOTAL)))
    assert not np.array_equal(everything, ShuffledOrder(BLOCKS, 2, 2).indices(np.arange(3 * TOTAL)))
    some = np.random.default_rng(0).permutation(3 * TOTAL)[:40]
    assert np.array_equal(ShuffledOrder(BLOCKS, 1, 2).indices(some), everything[some])


def test_the_order_is_this_one():
    """A change of the order would make runs that are resumed see other data: it must be noticed."""
    assert ShuffledOrder([4, 3], 0, 2).indices(np.arange(14)).tolist() == GOLDEN


GOLDEN = [1, 3, 6, 2, 5, 0, 4, 0, 1, 6, 4, 3, 2, 5]


def test_reads_stay_within_a_window_of_blocks():
    order = ShuffledOrder([10] * 20, 3, window=4)
    blocks = order.indices(np.arange(200)) // 10
    for window in range(5):
        assert len(set(blocks[window * 40 : (window + 1) * 40])) == 4
    assert len(set(blocks[:10])) > 1  # mixed within the window


def test_samples_are_well_shuffled():
    """Every sample comes at every place about equally often."""
    places = np.zeros((8, 8))
    order = ShuffledOrder([3, 5], 0, 2)
    for epoch in range(2000):
        places[np.arange(8), order.indices(np.arange(epoch * 8, epoch * 8 + 8))] += 1
    assert np.abs(places / 2000 - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / 2000)


def global_batches(world: int, micro: int, total: int, steps: int) -> list[list[int]]:
    """What all ranks see, global batch by global batch, in the order that is documented."""
    ranks = [iter(GlobalBatchSampler(total, micro, rank, world)) for rank in range(world)]
    accumulation = accumulation_steps(total, micro, world)
    return [[int(p) for _ in range(accumulation) for rank in ranks for p in next(rank)] for _ in range(steps)]


@pytest.mark.parametrize("world,micro", [(1, 16), (1, 4), (2, 8), (2, 2), (4, 4), (4, 1), (8, 2)])
def test_global_batches_do_not_depend_on_the_ranks(world, micro):
    assert global_batches(world, micro, 16, 3) == [list(range(s * 16, s * 16 + 16)) for s in range(3)]


def test_resume_at_a_count():
    sampler = iter(GlobalBatchSampler(16, 4, rank=1, world=2, start=32))
    assert next(sampler).tolist() == [36, 37, 38, 39]
    with pytest.raises(UserError, match="33"):
        GlobalBatchSampler(16, 4, start=33)


def test_what_does_not_divide_names_the_three_numbers():
    with pytest.raises(UserError, match="30 .* 4 × 2 ranks"):
        accumulation_steps(30, 4, 2)


@pytest.mark.parametrize("count", [6, 7, 24, 25, 26, 29])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_validation_is_every_sample_once_in_equally_many_batches(count, world, micro):
    ranks = [validation_batches(count, micro, rank, world) for rank in range(world)]
    assert sorted(int(i) for batches in ranks for batch in batches for i in batch) == list(range(count))
    assert len({len(batches) for batches in ranks}) == 1
    most = micro + (micro == 1 and count % world > 0)  # one more than asked, where a batch of some rank would be empty
    assert all(1 <= len(batch) <= most for batches in ranks for batch in batches)


def test_validation_needs_a_sample_a_rank():
    with pytest.raises(UserError, match="2 samples for 3 ranks"):
        validation_batches(2, 4, 0, 3)


def mixed(weights: list[float], lengths: list[int]) -> MixedOrder:
    return MixedOrder([ShuffledOrder([n], 0, 1) for n in lengths], lengths, weights, 0)


def test_mixture_weights_hold():
    lengths = [50, 1000, 10]
    found = mixed([3, 6, 1], lengths).indices(np.arange(20_480))
    parts = np.searchsorted(np.cumsum(lengths), found, side="right")
    assert np.abs(np.bincount(parts) / len(parts) - [0.3, 0.6, 0.1]).max() < 1e-3
    # Within a round they are shuffled: short stretches vary as independent draws without replacement do.
    shares = (parts.reshape(-1, 64) == 0).mean(1)
    assert 0.03 < shares.std() < 0.08


def test_each_part_of_a_mixture_goes_through_its_epochs():
    found = mixed([1, 3], [10, 30]).indices(np.arange(4096))
    counts = np.bincount(found, minlength=40)
    assert counts[:10].max() - counts[:10].min() <= 1 and counts[10:].max() - counts[10:].min() <= 1


def test_a_mixture_is_pure_in_the_position():
    order = mixed([1, 2, 0.001], [7, 30, 5])
    everything = order.indices(np.arange(8192))
    some = np.random.default_rng(0).permutation(8192)[:200]
    assert np.array_equal(mixed([1, 2, 0.001], [7, 30, 5]).indices(some), everything[some])
    assert (everything >= 37).sum() == pytest.approx(8192 * 0.001 / 3.001, abs=1)
