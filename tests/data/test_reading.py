"""What workers hand over arrives as it was sent."""

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from nar_t2i.data import reading
from nar_t2i.data.reading import Read
from nar_t2i.data.source import LostSample
from nar_t2i.types import Batch, Condition


def batch(states):
    condition = Condition((states,), (torch.tensor([[True, False]]),), torch.tensor(2.5), {})
    return Batch(torch.tensor([3]), ["three"], ["a caption"], torch.zeros(1, 3, 0, 8, dtype=torch.uint8),
                 torch.arange(12).view(4, 3).t(), {"score": torch.tensor([float("nan")])}, None, condition)  # fmt: skip


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other if not isinstance(one, dict) else one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_batch_travels_unchanged(monkeypatch, dtype, limit):
    monkeypatch.setattr(reading, "IN_BAND", limit)
    sent = Read(batch(torch.arange(8).view(1, 2, 4).to(dtype)), 1, 2, [LostSample("a", "b", "c")])
    found = pickle.loads(bytes(ForkingPickler.dumps(sent)))  # as DataLoader's queues do
    assert type(found) is Read and same(found, sent)
    before = found.batch.tokens.clone()
    assert torch.equal(found.batch.tokens.add_(1), before + 1)  # it may be written to


def test_small_tensors_travel_inside_the_message():
    def size(states):
        return len(ForkingPickler.dumps(Read(batch(states), 1, 0, [])))

    small, large = torch.zeros(1, 2, 4), torch.zeros(1, 2, 1 << 20)
    assert small.nbytes <= reading.IN_BAND < large.nbytes
    assert size(torch.zeros(1, 2, 1 << 14)) > size(small) + 2**17 - 100  # 2 × 2¹⁴ floats
    assert size(large) < size(small) + 10_000  # shared
