"""Learning strategies beside plain masked training: what each changes, and that none is another one."""

import itertools
import math

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.learning import Causal, CriticOf, Masked, Prefixes, Progressive, Replaced, SelfConditioned, Unrolled
from nar_t2i.learning.terms import draw_masks
from nar_t2i.networks import PrefixDecoder, TokenCritic
from nar_t2i.networks.predictions import Categorical
from nar_t2i.networks.tokens import select
from nar_t2i.noise import Noise
from nar_t2i.schedules import FixedRatio, TruncatedGaussian, mask_ratio
from nar_t2i.types import TokenBatch, TokenNetwork, TokenSpec
from tests.toys import ToyBinary, ToyCodec, ToyMasked, ToyText

STRATEGIES = [
    Masked(), Masked("linear"), Masked("square"), Masked("arccos"), Masked("exponential"), Masked(TruncatedGaussian()),
    Masked(FixedRatio(0.5)), Masked(regions=1.0), Masked(everything=0.5), Masked(label_smoothing=0.1), Replaced(),
    Replaced(0.0, 0.3), Replaced(0.3, 0.0), Replaced(visible_weight=0.5), Unrolled(), Unrolled(3), Unrolled(fill="mode"),
    Unrolled(counted="masked"), Progressive(), Progressive(2), Progressive(first="high"), Progressive(revise=0.0),
]  # fmt: skip


class Watched(TokenNetwork):
    """Says of every slot a little of what its value and neighbours are, and keeps what it was shown."""

    def __init__(self, spec=TokenSpec((8, 8), "categorical", 7)):
        super().__init__()
        self.spec, self.states, self.reads = spec, [], []
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(9, 7, dtype=torch.float64))

    def prepare(self, condition):
        return None

    def forward(self, state, prepared, read=None, cache=None):
        self.states.append(state)
        asked = read is not None and read.ndim == 1
        self.reads.append(
            torch.zeros_like(state.masked).flatten().index_fill(0, read, True).view_as(state.masked) if asked else read
        )
        shown = state.values.masked_fill(state.masked, 7)
        logits = self.weight[shown] + 0.5 * self.weight[shown.roll(1, 1)] + 0.3 * self.weight[shown.roll(8, 1)]
        return Categorical(select(logits, read))


def batch(count=64, seed=0):
    tokens = torch.randint(7, (count, 64), generator=torch.Generator().manual_seed(seed))
    error = torch.rand(count, 64, generator=torch.Generator().manual_seed(seed + 1))
    return TokenBatch(tokens, ToyText()(["a"] * count), error)


def lost(strategy, network=None, count=64, progress=1.0):
    terms = strategy.loss(network or Watched(), batch(count), Noise(0, torch.arange(count), torch.float64), progress)
    return terms["loss"].total / terms["loss"].weight


class Guided(Watched):
    """Reads guesses, too."""

    self_conditioning = True

    def forward(self, state, prepared, read=None, cache=None):
        guess = torch.full_like(state.values, -1) if state.guess is None else state.guess
        values = torch.where(state.masked, guess, state.values)
        return super().forward(state._replace(values=values, masked=state.masked & (guess < 0)), prepared, read)


def test_no_strategy_is_another_one():
    losses = [lost(strategy).item() for strategy in STRATEGIES]
    losses += [lost(strategy, Guided()).item() for strategy in (SelfConditioned(), SelfConditioned(1.0))]
    losses.append(lost(Causal()).item())
    spec, widths = Watched().spec, ToyText().widths
    prefixes, critic = (kind(spec, widths, width=16, depth=1, heads=2) for kind in (PrefixDecoder, TokenCritic))
    for network in (prefixes, critic):
        torch.nn.init.normal_(network.head.logits.weight)
    losses += [lost(strategy, prefixes).item() for strategy in (Prefixes(4), Prefixes())]
    losses += [lost(CriticOf(Watched(), **how), critic).item() for how in ({}, {"label": "changed"}, {"redraw": "all"})]
    for (i, a), (j, b) in itertools.combinations(enumerate(losses), 2):
        assert a != pytest.approx(b, abs=1e-9), (i, j)


@pytest.mark.parametrize("strategy", [Replaced(0.0, 0.0), Unrolled(1), Masked(label_smoothing=0.0)])
def test_switched_off_they_are_masked_training(strategy):
    network, plain = Watched(), Watched()
    one, other = lost(strategy, network), lost(Masked(), plain)
    torch.testing.assert_close(one, other)
    one.backward(), other.backward()
    torch.testing.assert_close(network.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_is_the_same_in_any_batch(strategy):
    whole, half = (lost(strategy, count=count) * count for count in (8, 4))
    given, text = batch(8), batch(4).condition
    first, rest = (
        strategy.loss(
            Watched(), TokenBatch(given.tokens[part], text, given.error[part]), Noise(0, torch.arange(8)[part], torch.float64), 1.0
        )
        for part in (slice(0, 4), slice(4, 8))
    )
    torch.testing.assert_close(first["loss"].total + rest["loss"].total, whole)
    assert half.isfinite()


def ratios(schedule, count=20_000):
    return draw_masks(Noise(0, torch.arange(count), torch.float64), schedule, (256,)).double().mean(1)


def test_mask_ratios_of_a_truncated_gaussian():
    found = ratios(TruncatedGaussian(0.55, 0.25, 0.5, 1.0)).sort().values
    assert found.min() >= 0.5 - 1e-9 and found.max() <= 1

    def apart(cdf):
        """The largest distance of two distribution functions."""
        return max(abs(i / len(found) - cdf(x)) for i, x in enumerate(found.tolist()))

    def normal(x):
        return 0.5 * (1 + math.erf((x - 0.55) / 0.25 / math.sqrt(2)))

    assert apart(lambda x: (normal(x) - normal(0.5)) / (normal(1.0) - normal(0.5))) < 0.015
    assert apart(lambda x: 2 * x - 1) > 0.05  # a control: the uniform one


def test_mask_ratios_that_are_fixed_or_exponential():
    assert (ratios(FixedRatio(0.25)) == 0.25).all()
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    by_hand = [(1 - math.exp(-5 * (1 - x))) / (1 - math.exp(-5)) for x in t.tolist()]
    assert mask_ratio("exponential", t).tolist() == pytest.approx(by_hand)
    assert mask_ratio("exponential", t)[[0, -1]].tolist() == [1, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TruncatedGaussian(5, 0.1, 0, 1),
        lambda: TruncatedGaussian(low=0.9, high=0.5),
        lambda: TruncatedGaussian(deviation=0.0),
        lambda: FixedRatio(0.0),
        lambda: FixedRatio(1.5),
        lambda: Replaced(0.6, 0.6),
        lambda: Replaced(-0.1),
        lambda: Replaced(visible_weight=-1.0),
        lambda: Progressive(1),
        lambda: Progressive(revise=2.0),
        lambda: Unrolled(0),
        lambda: Masked(label_smoothing=1.0),
    ],
)
def test_arguments_that_cannot_be_are_errors(wrong):
    with pytest.raises(UserError):
        wrong()


def test_replaced_shows_masks_random_and_true_tokens_in_the_stated_shares():
    network, given = Watched(), batch(2000)
    noise = Noise(0, torch.arange(2000), torch.float64)
    Replaced(0.2, 0.3, schedule=FixedRatio(0.5)).loss(network, given, noise, 1.0)
    state, chosen = network.states[0], network.reads[0]
    assert (chosen.sum(1) == 32).all()
    assert not (state.masked & ~chosen).any() and torch.equal(state.values[~chosen], given.tokens[~chosen])
    assert state.masked[chosen].float().mean() == pytest.approx(0.5, abs=0.01)
    seen = chosen & ~state.masked
    wrong = (state.values != given.tokens)[seen].float().mean().item()
    assert wrong == pytest.approx(0.2 * 6 / 7 / 0.5, abs=0.01)  # one random code in seven is the true one


def test_replaced_counts_visible_slots_as_much_as_it_says():
    network, given = Watched(), batch(16)
    noise = Noise(0, torch.arange(16), torch.float64)
    total = Replaced(visible_weight=0.25).loss(network, given, noise, 1.0)["loss"].total
    chosen = draw_masks(noise, "cosine", (8, 8))
    nll = network(network.states[0], None).nll(given.tokens)
    weights = torch.where(chosen, 1.0, 0.25).double()
    torch.testing.assert_close(total, ((nll * weights).sum(1) / weights.sum(1)).sum())


def test_bits_are_replaced_and_real_vectors_are_not():
    codec, text = ToyCodec("binary"), ToyText()
    torch.manual_seed(0)
    condition = text(["a"] * 8)
    bits = torch.randint(2, (8, 4, 3), dtype=torch.uint8)
    noise = Noise(0, torch.arange(8))
    network = ToyBinary(codec.spec, text.widths)
    for strategy in (Replaced(1.0, 0.0), Unrolled(2)):
        assert strategy.loss(network, TokenBatch(bits, condition), noise, 1.0)["loss"].total.isfinite()
    with pytest.raises(UserError, match="label_smoothing"):
        Masked(label_smoothing=0.1).loss(network, TokenBatch(bits, condition), noise, 1.0)
    with pytest.raises(UserError, match="real vectors"):
        spec = TokenSpec((4,), "continuous", 3)
        Replaced().state(TokenBatch(torch.zeros(8, 4, 3), condition), torch.ones(8, 4, dtype=torch.bool), noise, spec)


@pytest.mark.parametrize("fill", ["mode", "sample"])
@pytest.mark.parametrize("counted", ["hidden", "masked"])
def test_later_passes_read_what_earlier_ones_said(fill, counted):
    network, given = Watched(), batch(32)
    noise = Noise(0, torch.arange(32), torch.float64)
    terms = Unrolled(3, fill, counted).loss(network, given, noise, 1.0)
    first, second, third = network.states
    hidden = first.masked
    for state, before in ((second, first), (third, second)):
        assert (state.masked <= hidden).all() and state.masked.any(1).all()  # some of the hidden ones, masked again
        assert torch.equal(state.values[~hidden], given.tokens[~hidden])
        assert not torch.equal(state.values[hidden], before.values[hidden])
    assert (second.masked != hidden).any() and (second.masked != third.masked).any()
    said = network(first, None, hidden)
    wanted = said.logits.argmax(-1) if fill == "mode" else said.sample(noise.at(0, hidden)).values
    assert torch.equal(second.values[hidden], wanted)
    assert not second.values.requires_grad
    assert set(terms) == {"loss", "loss_1", "loss_2", "loss_3"}
    torch.testing.assert_close(terms["loss"].total, sum(terms[f"loss_{i}"].total for i in (1, 2, 3)))
    assert torch.equal(terms["loss_1"].total, Masked().loss(network, given, noise, 1.0)["loss"].total)
    assert torch.equal(network.reads[1], hidden if counted == "hidden" else second.masked)


def test_stages_part_all_slots_by_their_error():
    from nar_t2i.learning.progressive import stage_of

    error = batch(50).error
    stages = stage_of(error, 4)
    assert all((stages == stage).sum(1).eq(16).all() for stage in range(4))
    for row, stage in zip(error, stages):
        highest, lowest = ([row[stage == s].max() for s in range(3)], [row[stage == s].min() for s in range(1, 4)])
        assert all(high <= low for high, low in zip(highest, lowest))
    assert stage_of(torch.rand(1, 10), 4).flatten().bincount().tolist() == [3, 2, 3, 2]


@pytest.mark.parametrize("first", ["low", "high"])
def test_a_stage_is_predicted_from_the_ones_before_it(first):
    from nar_t2i.learning.progressive import stage_of

    network, given = Watched(), batch(400)
    noise = Noise(0, torch.arange(400), torch.float64)
    Progressive(4, first, revise=0.2).loss(network, given, noise, 1.0)
    (state,), (read,) = network.states, network.reads
    stages = stage_of(given.error if first == "low" else -given.error, 4)
    drawn = torch.where(state.masked, stages, 9).amin(1)
    assert drawn.bincount().tolist() == pytest.approx([100] * 4, abs=30)
    assert torch.equal(state.masked, stages >= drawn[:, None])
    assert torch.equal(read & state.masked, stages == drawn[:, None])
    wrong = read & ~state.masked
    assert wrong[~state.masked].double().mean() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(state.values[~state.masked & ~wrong], given.tokens[~state.masked & ~wrong])
    assert (state.values[wrong] != given.tokens[wrong]).double().mean() == pytest.approx(6 / 7, abs=0.05)
    with pytest.raises(UserError, match="quantisation error"):
        Progressive().loss(network, TokenBatch(given.tokens, given.condition), noise, 1.0)


def test_a_stage_and_what_is_to_be_mended_count_alike():
    network, given = Watched(), batch(64)
    terms = Progressive(4, revise=0.2).loss(network, given, Noise(0, torch.arange(64), torch.float64), 1.0)
    (state,), (read,) = network.states, network.reads
    nll = -network(state, None).logits.log_softmax(-1).gather(-1, given.tokens.unsqueeze(-1)).squeeze(-1)  # of the true tokens
    torch.testing.assert_close(terms["loss"].total, ((nll * read).sum(1) / read.sum(1)).sum())
    assert len(read.sum(1).unique()) > 1 and terms["loss"].weight == 64


def test_later_passes_hide_by_the_schedule():
    network = Watched()
    lost(Unrolled(2, schedule=FixedRatio(0.5)), network)
    first, second = network.states
    assert (first.masked.sum(1) == 32).all() and (second.masked.sum(1) == 16).all()


def test_more_stages_than_tokens_are_refused():
    with pytest.raises(UserError, match="65 stages of 64 tokens leave some empty"):
        lost(Progressive(65))
    assert lost(Progressive(64)).isfinite()


def test_no_gradient_flows_through_the_draws():
    """The gradient of two passes is that of two losses with the second's input held fixed."""
    network, given = Watched(), batch(16)
    noise = Noise(0, torch.arange(16), torch.float64)
    Unrolled(2).loss(network, given, noise, 1.0)["loss"].total.backward()
    found, states, read = network.weight.grad.clone(), network.states[:2], network.states[0].masked
    network.weight.grad = None
    for state in states:
        nll = network(state, None, read).nll(given.tokens[read])
        rows = read.nonzero()[:, 0]
        (nll / read.sum(1)[rows]).sum().backward()
    torch.testing.assert_close(network.weight.grad, found)


def test_a_masked_network_learns_by_each_of_them():
    """Tokens that follow from the caption: a hundred steps must bring the loss down by half."""
    codec, text = ToyCodec("categorical"), ToyText()
    words = ["red", "blue", "green", "dark"]
    for strategy in (Masked(), Masked(label_smoothing=0.05), Replaced(), Unrolled(2)):
        torch.manual_seed(0)
        network = ToyMasked(codec.spec, text.widths)
        optimizer = torch.optim.Adam([*network.parameters(), *text.parameters()], 2e-2)
        losses = []
        for step in range(100):
            ids = torch.arange(step * 32, step * 32 + 32)
            condition = text([words[i % 4] for i in ids.tolist()])
            tokens = (ids[:, None] % 4).expand(-1, 4)
            terms = strategy.loss(network, TokenBatch(tokens, condition), Noise(0, ids), 1.0)
            loss = terms["loss"].total / terms["loss"].weight
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2, type(strategy).__name__
