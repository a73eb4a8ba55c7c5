"""Predictions draw from the distribution that they state, and state the likelihood of what they draw."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.networks.predictions import Bernoulli, Categorical, truncation
from nar_t2i.noise import Noise

DRAWS = 20_000
LOGITS = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0])


def slots(draws=DRAWS, seed=0):
    """Noise of one image with a slot a draw."""
    return Noise(seed, torch.zeros(1, dtype=torch.int64)).at(0, torch.arange(draws)[None])


def chi_square(values, expected):
    """Pearson's statistic of the counts of `values` against probabilities."""
    counts = torch.bincount(values.flatten(), minlength=len(expected)).double()
    wanted = expected.double() * values.numel()
    return float(((counts - wanted).square() / wanted).sum())


def drawn(logits, temperature=1.0):
    return Categorical(logits.expand(1, DRAWS, -1)).sample(slots(), temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    values = drawn(LOGITS, temperature).values
    assert chi_square(values, (LOGITS / temperature).softmax(0)) < 18.5  # 4 degrees of freedom, p = 0.001
    for other in (0.9, 1.1):  # control: a temperature that is wrong by a tenth is rejected
        assert chi_square(values, (LOGITS / (other * temperature)).softmax(0)) > 18.5


def test_what_was_drawn_without_a_gradient_leaves_the_loss_its_own():
    given = LOGITS.expand(1, 8, -1).bfloat16().requires_grad_()
    prediction = Categorical(given)
    with torch.no_grad():
        values = prediction.sample(slots(8)).values
    prediction.nll(values).sum().backward()
    expected = LOGITS.expand(8, -1).softmax(1) - torch.nn.functional.one_hot(values[0], 5)
    torch.testing.assert_close(given.grad[0].float(), expected, rtol=2e-2, atol=1e-2)
    assert prediction.logits.dtype == torch.float32 and Categorical(given.detach()).logits.dtype == torch.float32


def test_a_tensor_of_temperatures_acts_row_by_row():
    logits = LOGITS.expand(2, DRAWS // 2, -1)
    noise = Noise(0, torch.arange(2)).at(0, torch.arange(DRAWS // 2).expand(2, -1))
    values = Categorical(logits).sample(noise, torch.tensor([0.5, 2.0])[:, None, None]).values
    for row, temperature in enumerate((0.5, 2.0)):
        assert chi_square(values[row], (LOGITS / temperature).softmax(0)) < 18.5


def test_probabilities_stated_are_untempered():
    sampled = drawn(LOGITS, 0.5)
    torch.testing.assert_close(sampled.log_prob, LOGITS.log_softmax(0)[sampled.values])


def test_a_draw_that_falls_on_a_boundary_takes_the_code_below_it():
    """As where the number of sums below it is counted: of halves and a quarter and a quarter, 0.5 is still the first."""
    at = SimpleNamespace(uniform=lambda stream: torch.tensor([[0.0, 0.25, 0.5, 0.6, 0.75, 1.0]]))
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(1, 6, 3)
    assert Categorical(logits).sample(at).values.tolist() == [[0, 0, 0, 1, 1, 2]]


def test_temperature_zero_takes_the_mode():
    assert (drawn(LOGITS, 0).values == 3).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_where_a_logit_is_no_number_the_codes_stay_in_range(value):
    """So that the loss, which is none either, or the guard can tell of it; a GPU would be lost to an index out of range."""
    logits = torch.zeros(2, 3, 5)
    logits[0, 1, 2] = value
    sampled = Categorical(logits).sample(Noise(0, torch.arange(2)).at(0, torch.arange(3).expand(2, -1)))
    assert sampled.values.min() >= 0 and sampled.values.max() < 5
    assert sampled.log_prob[1].isfinite().all() and not sampled.log_prob[0, 1].isfinite()


def test_the_range_is_never_left():
    """Rounding of the cumulative mass must not give code V, nor codes of no probability."""
    logits = torch.full((4097,), -1e4)
    logits[17] = logits[4000] = 0.0
    values = Categorical(logits.expand(1, 2000, -1)).sample(slots(2000)).values
    assert set(values.flatten().tolist()) == {17, 4000}
    flat = Categorical(torch.zeros(1, 2000, 4097)).sample(slots(2000)).values
    assert 0 <= flat.min() and flat.max() <= 4096 and len(flat.unique()) > 1000


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-38, 1e-31, 1e-20])
def test_the_coldest_draws_take_the_likeliest(temperature):
    assert Categorical(torch.tensor([[[0.0, 1.0, 20.0]]])).sample(slots(1), temperature).values.item() == 2
    assert Bernoulli(torch.tensor([[[-3.0, 1.0]]])).sample(slots(1), temperature).values.tolist() == [[[0, 1]]]


def test_a_code_that_was_cut_off_is_not_drawn_between_sums_that_should_be_equal(monkeypatch):
    """As a GPU's may be: here every other sum is a little smaller."""
    sums = torch.Tensor.cumsum

    def uneven(x, dim):
        found = sums(x, dim)
        return found - 0.2 * (torch.arange(found.shape[-1]) % 2) if found.shape[-1] == 8 else found

    monkeypatch.setattr(torch.Tensor, "cumsum", uneven)
    logits = torch.tensor([2.0, -9, -9, -9, 1.9, -9, -9, -9]).expand(1, 2000, 8)
    assert set(Categorical(logits).sample(slots(2000), top_k=2).values.flatten().tolist()) == {0, 4}


def test_nll_and_guidance():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    target = torch.randint(5, (2, 3))
    expected = -a.log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)
    torch.testing.assert_close(Categorical(a).nll(target), expected)
    torch.testing.assert_close(Categorical(a)[:1].nll(target[:1]), expected[:1])
    torch.testing.assert_close(Categorical(a).guide(Categorical(b), 3.0).logits, b + 3 * (a - b))
    torch.testing.assert_close(Categorical(a).guide(Categorical(b), 1.0).logits, a)
    torch.testing.assert_close(Bernoulli(a).guide(Bernoulli(b), 3.0).logits, b + 3 * (a - b))


def test_predictions_compute_in_fp32_or_better():
    assert Categorical(torch.zeros(1, 2, dtype=torch.bfloat16)).logits.dtype == torch.float32
    assert Bernoulli(torch.zeros(1, 2, dtype=torch.float64)).logits.dtype == torch.float64


def test_two_bits_by_enumeration():
    logits = torch.tensor([0.7, -1.2])
    on = logits.sigmoid()
    patterns = torch.tensor(list(itertools.product([0, 1], repeat=2)), dtype=torch.uint8)
    expected = torch.where(patterns.bool(), on, 1 - on).prod(-1)
    prediction = Bernoulli(logits.expand(1, DRAWS, 2))
    torch.testing.assert_close((-Bernoulli(logits.expand(4, 2)).nll(patterns)).exp(), expected)
    sampled = prediction.sample(slots())
    index = (sampled.values * torch.tensor([2, 1])).sum(-1)
    assert sampled.values.dtype == torch.uint8
    assert chi_square(index, expected) < 16.3  # 3 degrees of freedom, p = 0.001
    torch.testing.assert_close(sampled.log_prob.exp(), expected[index])
    dependent = torch.tensor([on.mean() / 2, 0.0, 0.0, 0.0]) + expected * (1 - on.mean() / 2)
    assert chi_square(index, dependent) > 16.3
    assert torch.equal(prediction.sample(slots(), 0).values[0, 0], torch.tensor([1, 0], dtype=torch.uint8))
    tempered = (prediction.sample(slots(), 0.25).values.float()).mean((0, 1))
    torch.testing.assert_close(tempered, (logits / 0.25).sigmoid(), rtol=0, atol=0.015)


def test_only_codes_are_truncated():
    draws = Noise(0, torch.arange(1)).at(0, torch.ones(1, 3, dtype=torch.bool))
    assert truncation(0, 1.0) == {} and truncation(3, 0.9) == {"top_k": 3, "top_p": 0.9}
    Bernoulli(torch.zeros(3, 2)).sample(draws)
    with pytest.raises(UserError, match="top_k and top_p need tokens that are codes"):
        Bernoulli(torch.zeros(3, 2)).sample(draws, **truncation(0, 0.9))
