"""Our decoder against diffusers' aMUSEd pipeline: with one table of draws for both, the tokens are equal."""

import pytest
import torch
from diffusers import AmusedScheduler

from benchmarks.amused import STEPS, TEMPERATURE, Amused, ConfidenceOf, one_table
from nar_t2i.inference import Confidence
from nar_t2i.noise import Noise
from nar_t2i.schedules import masked_counts
from tests.inference.test_graphs import NothingCrosses

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tiny", "tiny-512"])
def both(request):
    return Amused(request.param, CPU)


def drawn_by_both(both, batch=3):
    texts, noise = both.texts(batch), both.noise(batch)
    with one_table(noise, both.network.spec.length):
        theirs = both.theirs(texts)
    return theirs, both.ours(texts, noise)


def test_the_same_tokens_from_one_table(both):
    """After 12 guided steps, in fp32."""
    theirs, decoded = drawn_by_both(both)
    assert torch.equal(decoded.tokens, theirs)
    assert (decoded.passes, decoded.rows) == (STEPS, 2 * STEPS)
    assert len(theirs.unique()) > 8 and not torch.equal(theirs[0], theirs[1])


def test_control_other_numbers_or_settings_or_weights_draw_otherwise(both, monkeypatch):
    theirs, _ = drawn_by_both(both)
    texts, noise = both.texts(3), both.noise(3)
    assert not torch.equal(both.ours(texts, Noise(1, noise.ids)).tokens, theirs)
    right = both.inference
    for choice_temperature in (right.choice_temperature * 0.5, 8.0):
        both.inference = ConfidenceOf(CPU)
        both.inference.choice_temperature = choice_temperature
        other = both.ours(texts, noise).tokens
        both.inference = right
        assert not torch.equal(other, theirs)
    weight = both.network.layers[0].mlp.out.weight
    kept = weight.clone()
    weight.mul_(1.5)
    other = both.ours(texts, noise).tokens
    weight.copy_(kept)
    assert not torch.equal(other, theirs)


def test_the_table_is_put_back():
    multinomial = torch.multinomial
    with one_table(Noise(0, torch.arange(2)), 4):
        assert torch.multinomial is not multinomial
    assert torch.multinomial is multinomial


@pytest.mark.parametrize("length", [25, 36, 256, 1024])
def test_counts_are_the_schedulers(length):
    """Where half of the tokens is a whole number, single precision loses one of it; else Confidence has the same counts."""
    scheduler = AmusedScheduler(mask_token_id=9)
    scheduler.set_timesteps(STEPS, (TEMPERATURE, 0))
    sample, left = torch.full((1, length), 9), []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.zeros(1, length, 9), timestep, sample).prev_sample
        left.append(int((sample == 9).sum()))
    unknown = torch.tensor([length])
    assert [int(n) for n in ConfidenceOf(CPU).counts(unknown)] == left
    exact = [int(n) for n in masked_counts("cosine", STEPS, unknown)]
    assert [n - m for n, m in zip(exact, left)] == [int(step == 7 and length % 2 == 0) for step in range(STEPS)]


@pytest.mark.parametrize("unknown", [1, 2, 5, 11])
def test_few_tokens_are_kept_back_for_the_last_pass(unknown):
    """As the scheduler does: one stays masked until then."""
    counts = [int(n) for n in ConfidenceOf(CPU).counts(torch.tensor([unknown]))]
    assert counts[-1] == 0 and all(n >= 1 for n in counts[:-1]) and counts == sorted(counts, reverse=True) and counts[0] <= unknown


def test_the_luck_of_choices_falls_as_the_schedulers():
    scheduler, ours = AmusedScheduler(mask_token_id=9), ConfidenceOf(CPU)
    scheduler.set_timesteps(STEPS, (TEMPERATURE, 0))
    falling = [ours.choice_temperature * (1 - (step + 1) / STEPS) for step in range(STEPS)]
    torch.testing.assert_close(torch.tensor(falling), scheduler.temperatures)


def test_it_touches_no_value_on_the_device(both):
    """So that a decoding can be recorded."""
    inference = Confidence(STEPS)
    network = type(both.network)(**both.network._described_args).to("meta")
    condition, null = (text.map(lambda x: x.to("meta")) for text in both.texts(2))
    with torch.no_grad(), NothingCrosses():
        decoded = inference.decode(
            network, condition, null, Noise(0, torch.zeros(2, dtype=torch.long, device="meta")), both.guidance
        )
    assert inference.static and network.static and decoded.tokens.shape == (2, network.spec.length)
