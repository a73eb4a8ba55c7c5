"""Counter-based noise: the same numbers in any batch, and good ones."""

import torch

from nar_t2i.noise import Noise, gumbel


def test_an_image_draws_the_same_numbers_in_a_batch_of_one_and_of_seven() -> None:
    batch = Noise(3, torch.arange(10, 17))
    alone = Noise(3, torch.tensor([14]))
    for dtype in (torch.float32, torch.float64):
        batch.dtype = alone.dtype = dtype
        assert torch.equal(batch.uniform("x", 5, (64,))[4], alone.uniform("x", 5, (64,))[0])


def test_slots_draw_the_same_numbers_whichever_others_are_read() -> None:
    noise = Noise(0, torch.arange(3))
    whole = noise.at(2, torch.arange(9).expand(3, 9)).uniform("v", (4,))
    some = torch.tensor([[1, 7], [0, 8], [4, 4]])
    assert torch.equal(noise.at(2, some).uniform("v", (4,)), whole.gather(1, some[..., None].expand(-1, -1, 4)))
    mask = torch.rand(3, 9) < 0.5
    assert torch.equal(noise.at(2, mask).uniform("v", (4,)), whole[mask])


def test_seeds_streams_steps_and_ids_are_apart() -> None:
    ids = torch.arange(200)
    reference = Noise(0, ids).uniform("a", 0, (50,)).flatten()
    others = [
        Noise(1, ids).uniform("a", 0, (50,)),
        Noise(0, ids).uniform("b", 0, (50,)),
        Noise(0, ids).uniform("a", 1, (50,)),
        Noise(0, ids + 200).uniform("a", 0, (50,)),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([reference, other.flatten()]))[0, 1]
        assert abs(correlation) < 0.04  # four standard errors of 10,000 pairs


def test_numbers_are_uniform_and_inside_the_open_interval() -> None:
    values = Noise(7, torch.arange(4000)).uniform("u", 0, (100,)).flatten()
    assert 0 < values.min() and values.max() < 1
    counts = torch.histc(values, 50, 0, 1)
    expected = len(values) / 50
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 95  # 49 degrees of freedom: 99.99%
    assert Noise(-1, torch.tensor([2**62])).uniform("u", 10**12, (3,)).shape == (1, 3)


def test_normal_draws_of_slots_are_standard() -> None:
    draws = Noise(0, torch.arange(200), torch.float64).at(0, torch.ones(200, 100, dtype=torch.bool)).normal("n", (3,)).flatten()
    assert len(draws) == 60_000 and abs(draws.mean()) < 0.02 and abs(draws.var() - 1) < 0.03
    assert ((draws.abs() < 1.96).double().mean() - 0.95).abs() < 0.005


def test_gumbel_has_the_mean_of_a_gumbel() -> None:
    draws = gumbel(Noise(0, torch.arange(50_000), torch.float64).uniform("g"))
    assert torch.isfinite(draws).all()
    assert abs(draws.mean() - 0.5772) < 0.03
