"""Pictures find themselves among others, disturbed ones too, and those of somebody else do not."""

import pytest
import torch

from nar_t2i.evaluation.retrieval import disturbed, retrieve, train_features
from nar_t2i.pixels import to_float, to_uint8


@pytest.fixture(scope="module")
def pictures():
    """Sixty smooth patterns, the last two of them alike."""
    coarse = torch.rand(59, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = (255 * torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")).round().to(torch.uint8)
    return torch.cat([images, images[-1:]])


@pytest.fixture(scope="module")
def network(pictures):
    return train_features(pictures, steps=60, batch_size=32)


def test_each_is_nearest_to_itself(network, pictures):
    found = retrieve(network, pictures, pictures, range(60))
    assert found.top1 == found.top5 == 1.0 and found.count == 60


def test_disturbed_ones_find_their_own_and_shuffled_ones_do_not(network, pictures):
    torch.manual_seed(1)
    hurt = to_uint8(disturbed(to_float(pictures)))
    assert retrieve(network, hurt, pictures, range(60)).top1 > 0.9
    others = torch.arange(60).roll(7)
    assert retrieve(network, hurt, pictures, others).top1 < 0.1
    assert retrieve(network, hurt[:10], pictures, others[:10]).top5 < 0.4


def test_pictures_that_are_equal_count_as_one(network, pictures):
    assert retrieve(network, pictures[58:], pictures, [59, 58]).top1 == 1.0


class Same(torch.nn.Module):
    """All pictures look alike to it."""

    def forward(self, images):
        return torch.full((len(images), 8), self.value)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_network_that_sees_nothing_finds_nothing(pictures, value):
    Same.value = value
    assert retrieve(Same(), pictures, pictures, range(60)).top5 == 0


def test_ranks_are_those_of_a_plain_search(network, pictures):
    torch.manual_seed(2)
    hurt = to_uint8(0.3 * to_float(pictures[:59]) + 0.6 * torch.randn(59, 3, 32, 32))
    with torch.no_grad():
        scores = network(to_float(hurt)) @ network(to_float(pictures[:59])).T
    order = scores.argsort(1, descending=True).tolist()
    top1 = sum(row[0] == i for i, row in enumerate(order)) / 59
    top5 = sum(i in row[:5] for i, row in enumerate(order)) / 59
    found = retrieve(network, hurt, pictures[:59], range(59))
    assert (found.top1, found.top5) == pytest.approx((top1, top5)) and 0 < top1 < 1


def test_the_same_seed_gives_the_same_network(network, pictures):
    again = train_features(pictures, steps=60, batch_size=32)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
