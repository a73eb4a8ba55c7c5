"""Self-conditioning: who is shown which guesses, in training and in decoding."""

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.inference import (
    Confidence,
    CriticGuided,
    EntropyBounded,
    GibbsSweeps,
    Halton,
    Moment,
    ProgressiveStages,
    Purity,
    RandomOrder,
)
from nar_t2i.inference.guided import paired
from nar_t2i.learning import Masked, SelfConditioned
from nar_t2i.networks import EncoderDecoder
from nar_t2i.networks.predictions import Bernoulli
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import TokenBatch, TokenNetwork, TokenSpec, TokenState
from tests.inference.test_confidence import make_condition

SPEC = TokenSpec((4, 4), "categorical", 7)


class Watched(EncoderDecoder):
    def __init__(self, **options):
        super().__init__(SPEC, (8,), width=16, depth=1, heads=2, **options)
        self.states, self.gradients = [], []

    def forward(self, state, prepared, read=None, cache=None):
        self.states.append(state)
        self.gradients.append(torch.is_grad_enabled())
        return super().forward(state, prepared, read, cache)


def network(**options):
    torch.manual_seed(0)
    made = Watched(**options).double()
    torch.nn.init.normal_(made.head.logits.weight)
    return made


def batch(count=200):
    return TokenBatch(
        torch.randint(7, (count, 16), generator=torch.Generator().manual_seed(1)), make_condition(count, torch.float64)[0]
    )


def noise(count=200):
    return Noise(0, torch.arange(count), torch.float64)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_images_is_shown_its_guesses(share):
    reader, given = network(self_conditioning=True), batch()
    SelfConditioned(share).loss(reader, given, noise(), 1.0)["loss"].total.backward()
    first, second = reader.states
    assert reader.gradients == [False, True] and first.guess is None
    assert torch.equal(first.masked, second.masked)
    shown = (second.guess >= 0).any(1)
    assert shown.double().mean() == pytest.approx(share, abs=0.08)
    assert torch.equal(second.guess[shown] >= 0, second.masked[shown])  # at masked slots, and nowhere else
    drawn = reader(first, reader.prepare(given.condition), first.masked).sample(noise().at(0, first.masked)).values
    every = torch.full_like(given.tokens, -1).masked_scatter(first.masked, drawn)
    assert torch.equal(second.guess[shown], every[shown])


def test_every_weight_gets_a_gradient_under_autocast():
    """The pass without a gradient must not leave casts behind that have none."""
    torch.manual_seed(0)
    reader = EncoderDecoder(SPEC, (8,), width=16, depth=1, heads=2, self_conditioning=True)
    torch.nn.init.normal_(reader.head.logits.weight)
    condition = make_condition(8)[0]
    given = TokenBatch(torch.randint(7, (8, 16)), condition)
    with torch.autocast("cpu", torch.bfloat16):
        total = SelfConditioned(1.0).loss(reader, given, Noise(0, torch.arange(8)), 1.0)["loss"].total
    total.backward()
    assert not [name for name, p in reader.named_parameters() if p.grad is None]


def test_it_begins_as_masked_training_and_guesses_then_matter():
    reader = network(self_conditioning=True)
    one, other = (s.loss(reader, batch(), noise(), 1.0)["loss"].total for s in (SelfConditioned(), Masked()))
    torch.testing.assert_close(one, other)  # the embedding of guesses starts at zero
    torch.nn.init.normal_(reader.embedding.guess.weight)
    state = TokenState(batch().tokens, torch.ones(200, 16, dtype=torch.bool))
    prepared = reader.prepare(batch().condition)
    plain, guessed = reader(state, prepared).logits, reader(state._replace(guess=batch().tokens), prepared).logits
    assert not torch.allclose(plain, guessed)
    seen = state._replace(masked=torch.zeros_like(state.masked))  # what is in sight needs no guess
    torch.testing.assert_close(reader(seen, prepared).logits, reader(seen._replace(guess=batch().tokens), prepared).logits)


class Fickle(TokenNetwork):
    """A critic that finds other tokens wrong each time."""

    spec = SPEC

    def __init__(self):
        super().__init__()
        self.draws = torch.Generator().manual_seed(0)

    def prepare(self, condition):
        return None

    def forward(self, state, prepared, read=None, cache=None):
        return Bernoulli(torch.randn(*state.values.shape, 1, generator=self.draws))


def shown(strategy, scale=1.0, known=None, **options):
    """The states that a network is shown; it says other things for other guesses."""
    reader = network(**options)
    if options:
        torch.nn.init.normal_(reader.embedding.guess.weight)
    strategy.decode(reader, *make_condition(2, torch.float64), noise(2), Guidance(scale), known)
    return reader, reader.states


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("strategy", [
    Confidence(4, "linear"), Purity(4), Moment(4), EntropyBounded(1.0), ProgressiveStages(4), CriticGuided(Fickle(), steps=4),
], ids=lambda strategy: type(strategy).__name__)  # fmt: skip
def test_decoding_shows_each_pass_the_draws_of_the_one_before(strategy, scale):
    reader, states = shown(strategy, scale, self_conditioning=True)
    assert len(states) >= 3 and (states[0].guess == -1).all()
    text = reader.prepare(paired(*make_condition(2, torch.float64)) if scale > 1 else make_condition(2, torch.float64)[0])
    slots = torch.arange(16).expand(2, -1)
    for step, (before, after) in enumerate(zip(states, states[1:])):
        said = reader(before, text, slots.repeat(len(before.values) // 2, 1))
        said = said[:2].guide(said[2:], scale) if scale > 1 else said
        if isinstance(strategy, EntropyBounded):
            drawn = said.sample(noise(2).at(step, slots), strategy.temperature).values
        else:
            drawn = strategy.draw(said, noise(2).at(step, slots), step).values
        drawn = drawn.repeat(len(before.values) // 2, 1)
        asked = after.masked & before.masked
        assert asked.any() and torch.equal(after.guess[asked], drawn[asked])
        assert (after.guess[after.masked] >= 0).all()


def test_what_was_revoked_was_guessed_too():
    _, states = shown(CriticGuided(Fickle(), steps=4), self_conditioning=True)
    revoked = [(after.masked & ~before.masked, before, after) for before, after in zip(states, states[1:])]
    assert any(again.any() for again, _, _ in revoked)
    assert all(torch.equal(after.guess[again], before.values[again]) for again, before, after in revoked)


@pytest.mark.parametrize(
    "strategy", [RandomOrder(4), Halton(4), GibbsSweeps(RandomOrder(4))], ids=lambda strategy: type(strategy).__name__
)
def test_strategies_that_guess_nothing_show_nothing(strategy):
    _, states = shown(strategy, self_conditioning=True)
    assert all(state.guess is None for state in states)
    _, states = shown(GibbsSweeps(Confidence(3), block=8), self_conditioning=True)
    assert [state.guess is None for state in states] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("strategy", [Confidence(4), EntropyBounded(), ProgressiveStages(), CriticGuided(Fickle(), steps=3)])
def test_a_network_that_reads_no_guesses_is_shown_none(strategy):
    assert all(state.guess is None for state in shown(strategy)[1])


def test_a_network_that_reads_no_guesses_is_refused():
    with pytest.raises(UserError, match="self_conditioning"):
        SelfConditioned().loss(network(), batch(), noise(), 1.0)
    with pytest.raises(UserError, match="share"):
        SelfConditioned(1.5)
    with pytest.raises(UserError, match="codes"):
        EncoderDecoder(TokenSpec((4,), "binary", 3), (8,), width=16, depth=1, self_conditioning=True)
