"""Masked training: which tokens are hidden, and that the gathered loss is the whole one."""

import math

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.learning.masked import Masked
from nar_t2i.learning.terms import distances, draw_masks, image_means, slot_nll
from nar_t2i.networks.predictions import Categorical
from nar_t2i.noise import Noise
from nar_t2i.schedules import FixedRatio
from nar_t2i.types import TokenBatch, TokenState
from tests.toys import ToyCodec, ToyMasked, ToyText

MEAN_RATIOS = {"cosine": 2 / math.pi, "linear": 1 / 2, "square": 2 / 3, "arccos": 2 / math.pi}


@pytest.mark.parametrize("schedule", MEAN_RATIOS)
def test_mask_ratios_follow_the_schedule(schedule: str) -> None:
    ratios = draw_masks(Noise(0, torch.arange(20_000)), schedule, (64,)).float().mean(1)
    assert ratios.mean() == pytest.approx(MEAN_RATIOS[schedule], abs=0.01)
    # The median ratio is the schedule's value at the median time.
    median = {"cosine": math.cos(math.pi / 4), "linear": 0.5, "square": 0.75, "arccos": math.acos(0.5) / (math.pi / 2)}
    assert ratios.median() == pytest.approx(median[schedule], abs=0.02)
    assert (ratios > 0).all()


def test_a_curriculum_begins_with_few_masked_tokens() -> None:
    learning = Masked("linear", curriculum=0.5, first_ceiling=0.2)
    assert [learning.ceiling(progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx([0.2, 0.6, 1, 1])
    assert Masked("linear").ceiling(0) == 1
    ratios = draw_masks(Noise(0, torch.arange(20_000)), "linear", (64,), ceiling=0.2).float().mean(1)
    assert ratios.mean() == pytest.approx(0.1, abs=0.01) and ratios.max() <= 0.21

    torch.manual_seed(0)
    codec, text = ToyCodec("categorical"), ToyText()
    network = ToyMasked(codec.spec, text.widths)
    batch = TokenBatch(torch.randint(4, (8, 4)), text(["a"] * 8))
    early, late, plain = (
        strategy.loss(network, batch, Noise(5, torch.arange(8)), progress)["loss"].total
        for strategy, progress in ((learning, 0.0), (learning, 1.0), (Masked("linear"), 0.0))
    )
    assert torch.equal(late, plain) and not torch.equal(early, late)


@pytest.mark.parametrize("wrong", [{"curriculum": 1.5}, {"curriculum": -0.1}, {"first_ceiling": 0.0}])
def test_a_curriculum_that_cannot_be_is_an_error(wrong: dict) -> None:
    with pytest.raises(UserError, match="curriculum"):
        Masked(**wrong)


def test_a_region_hides_what_lies_together() -> None:
    noise = Noise(3, torch.arange(4000))
    scattered, together, half = (draw_masks(noise, "linear", (8, 8), regions=share) for share in (0.0, 1.0, 0.5))
    assert torch.equal(scattered.sum(1), together.sum(1))  # as many as ever, elsewhere

    def neighbours(masks: torch.Tensor) -> float:
        """Of the masked slots' right-hand neighbours, the share that is masked, in images that are half masked."""
        grid = masks[(masks.sum(1) - 32).abs() < 8].unflatten(1, (8, 8))
        return (grid[:, :, 1:] & grid[:, :, :-1]).sum().item() / grid[:, :, :-1].sum().item()

    assert neighbours(together) > 0.75 > 0.6 > neighbours(scattered)
    assert neighbours(scattered) < neighbours(half) < neighbours(together)
    changed = (half != scattered).any(1).float().mean()
    assert 0.45 < changed < 0.55
    # Every slot is hidden, if those in the middle more often.
    assert together.float().mean(0).min() > 0.25


def test_distances_are_of_any_number_of_dimensions() -> None:
    assert distances(torch.tensor([[0.5]]), (3,)).tolist() == [[1, 0, 1]]
    square = distances(torch.tensor([[0.25, 0.75]]), (2, 2))
    assert square.tolist()[0] == pytest.approx([1, 0, 2**0.5, 1])


def test_the_stated_share_is_masked_wholly() -> None:
    masks = draw_masks(Noise(4, torch.arange(20_000)), "linear", (64,), everything=0.25)
    assert masks.all(1).float().mean() == pytest.approx(0.25 + 0.75 / 128, abs=0.01)
    early = draw_masks(Noise(4, torch.arange(2000)), "linear", (64,), ceiling=0.5, everything=1.0)
    assert (early.sum(1) == 32).all()  # a curriculum's ceiling holds for them, too


@pytest.mark.parametrize("wrong", [{"regions": 1.5}, {"everything": -0.1}])
def test_a_share_that_cannot_be_is_an_error(wrong: dict) -> None:
    with pytest.raises(UserError, match="shares"):
        Masked(**wrong)


def test_masked_places_are_uniform() -> None:
    masks = draw_masks(Noise(1, torch.arange(20_000)), "linear", (16,)).float()
    assert (masks.mean(0) - masks.mean()).abs().max() < 0.015


def test_the_same_sample_is_masked_alike_in_any_batch_and_ranks_differ() -> None:
    whole = draw_masks(Noise(0, torch.arange(8)), "cosine", (64,))
    rank_0, rank_1 = (draw_masks(Noise(0, ids), "cosine", (64,)) for ids in torch.arange(8).view(2, 4))
    assert torch.equal(torch.cat([rank_0, rank_1]), whole)
    assert (rank_0 != rank_1).any(dim=1).all()


def test_the_gathered_loss_is_the_loss_over_all_slots() -> None:
    torch.manual_seed(0)
    codec, text = ToyCodec("categorical"), ToyText()
    network = ToyMasked(codec.spec, text.widths)
    condition = text(["a", "b c", "d", "e f g"])
    tokens = torch.randint(4, (4, 4))
    noise = Noise(5, torch.arange(4))
    total, weight = Masked("linear").loss(network, TokenBatch(tokens, condition), noise, 0.0)["loss"]

    masked = draw_masks(noise, "linear", (4,))
    everywhere = network(TokenState(tokens, masked), network.prepare(condition)).nll(tokens)
    by_hand = torch.stack([nll[mask].mean() for nll, mask in zip(everywhere, masked)])
    torch.testing.assert_close(total, by_hand.sum())
    assert weight == 4
    unmasked = torch.stack([nll[~mask].mean() for nll, mask in zip(everywhere, masked) if (~mask).any()])
    assert not torch.allclose(unmasked.mean(), by_hand.mean())


def test_masked_values_are_not_read() -> None:
    torch.manual_seed(0)
    text, codec = ToyText(), ToyCodec("categorical")
    network = ToyMasked(codec.spec, text.widths)
    prepared = network.prepare(text(["a"]))
    masked = torch.tensor([[True, False, True, False]])
    a, b = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[3, 1, 0, 3]])
    assert torch.equal(network(TokenState(a, masked), prepared).logits, network(TokenState(b, masked), prepared).logits)


def test_image_means() -> None:
    masked = torch.tensor([[True, True, False], [False, True, False]])
    means = image_means(torch.tensor([1.0, 3.0, 7.0]), masked.nonzero()[:, 0], masked.sum(1))
    assert torch.equal(means, torch.tensor([2.0, 7.0]))


def test_smoothed_targets_are_torch_s() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(6, 5), torch.randint(5, (6,))
    wanted = torch.nn.functional.cross_entropy(logits, target, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(slot_nll(Categorical(logits), target, None, 0.2), wanted)


def test_masked_counts_are_rounded() -> None:
    masked = draw_masks(Noise(0, torch.arange(3)), FixedRatio(0.67), (10,))
    assert masked.sum(1).tolist() == [7, 7, 7]
    assert draw_masks(Noise(0, torch.arange(3)), FixedRatio(0.64), (10,)).sum(1).tolist() == [6, 6, 6]
    assert draw_masks(Noise(0, torch.arange(3)), FixedRatio(0.01), (10,)).sum(1).tolist() == [1, 1, 1]
