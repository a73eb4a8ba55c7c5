"""Self-conditioning: who is shown which guesses, in training and in decoding."""

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.inference import Confidence
from nar_t2i.learning import Masked, SelfConditioned
from nar_t2i.networks import EncoderDecoder
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import TokenBatch, TokenSpec, TokenState
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
    return TokenBatch(torch.randint(7, (count, 16), generator=torch.Generator().manual_seed(1)), make_condition(count, torch.float64)[0])


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


def test_decoding_shows_each_pass_the_draws_of_the_one_before():
    reader = network(self_conditioning=True)
    torch.nn.init.normal_(reader.embedding.guess.weight)
    condition, null = make_condition(2, torch.float64)
    found = Confidence(4, "linear").decode(reader, condition, null, noise(2), Guidance(2.0))
    guesses = [state.guess for state in reader.states]
    assert (guesses[0] == -1).all() and all((guess >= 0).all() for guess in guesses[1:])
    plain = network()
    assert all(state.guess is None for state in plain.states) and found.passes == 4
    Confidence(4).decode(plain, condition, null, noise(2), Guidance(2.0))
    assert all(state.guess is None for state in plain.states)


def test_a_network_that_reads_no_guesses_is_refused():
    with pytest.raises(UserError, match="self_conditioning"):
        SelfConditioned().loss(network(), batch(), noise(), 1.0)
    with pytest.raises(UserError, match="share"):
        SelfConditioned(1.5)
    with pytest.raises(UserError, match="codes"):
        EncoderDecoder(TokenSpec((4,), "binary", 3), (8,), width=16, depth=1, self_conditioning=True)
