"""Reranking: what is drawn, what is kept, and what it costs."""

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.inference import (
    Autoregressive,
    BestOf,
    Confidence,
    CriticGuided,
    CriticScore,
    EntropyBounded,
    Halton,
    Likelihood,
)
from nar_t2i.inference.best_of import Scorer
from nar_t2i.networks import CausalDecoder, TokenCritic
from nar_t2i.networks.predictions import Bernoulli
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import Known, TokenNetwork, TokenState
from tests.inference.eager import Eager
from tests.inference.eager_judged import EagerCritic, eager_best_of
from tests.inference.test_confidence import SPEC, Watched, make_condition
from tests.inference.test_strategies import decoded, make_network, some_known


def make_critic():
    torch.manual_seed(3)
    critic = TokenCritic(SPEC, (8,), width=16, depth=1, heads=2).double()
    torch.nn.init.normal_(critic.head.logits.weight)
    return critic


def plainly(kind, network, known, decode):
    """What the plain code makes of three images, one at a time."""
    condition, null = make_condition(3, torch.float64)
    found = []
    for row in range(3):
        part = slice(row, row + 1)
        one = [c.map(lambda x, part=part: x[part]) for c in (condition, null)]
        eager = kind(network, *one, Noise(0, torch.tensor([row]), torch.float64), Guidance(2.0))
        found.append(decode(eager, known and Known(known.mask[part], known.tokens[part])))
    return torch.stack(found)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("first", [Confidence(4), Halton(3), EntropyBounded(2.0)], ids=lambda first: type(first).__name__)
def test_reranking_is_the_plain_one(first, splits, given):
    network, known = make_network(torch.float64), some_known() if given else None
    strategy = BestOf(first, candidates=3, scorer=Likelihood(splits=splits))
    expected = plainly(Eager, network, known, lambda eager, given: eager_best_of(strategy, eager, given))
    tokens = decoded(strategy, network=network, known=known).tokens
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, decoded(first, network=network, known=known).tokens)  # another candidate was kept
    if given:
        assert torch.equal(tokens[known.mask], known.tokens[known.mask])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"persistent": 0.5}, {"choice_temperature": 2.0, "temperature": 0.5}], ids=str)
def test_a_critics_guidance_is_the_plain_one(options, given):
    network, known = make_network(torch.float64), some_known() if given else None
    strategy = CriticGuided(make_critic(), steps=5, **options)
    expected = plainly(EagerCritic, network, known, lambda eager, given: eager.decode(strategy, given))
    assert torch.equal(decoded(strategy, network=network, known=known).tokens, expected)


def test_one_candidate_changes_nothing_and_costs_nothing():
    one, plain = decoded(BestOf(Confidence(4), candidates=1)), decoded(Confidence(4))
    assert torch.equal(one.tokens, plain.tokens) and (one.passes, one.rows) == (plain.passes, plain.rows)


def test_candidates_differ_and_cost_rows_but_no_passes():
    noise = Noise(7, torch.arange(3), torch.float64)
    copies = noise.copies(4).uniform("value", shape=(50,)).view(3, 4, 50)
    assert torch.equal(copies[:, 0], noise.uniform("value", shape=(50,)))
    assert len({tuple(row) for row in copies.flatten(0, 1).tolist()}) == 12
    twice = noise.copies(2).copies(3).uniform("value", shape=(50,))
    assert len({tuple(row) for row in twice.tolist()}) == 18 and torch.equal(twice[::6], noise.uniform("value", shape=(50,)))
    network = Watched(make_network(torch.float64))
    network.reads_unknown_alone = False  # the scorer reads all
    found = decoded(BestOf(Confidence(4), candidates=5, scorer=Likelihood(3, splits=2)), network=network)
    assert network.calls == found.passes == 4 + 1 and found.rows == 5 * (2 * 4 + 3 * 2)
    everything = Known(torch.ones(3, 16, dtype=torch.bool), some_known().tokens)
    untouched = decoded(BestOf(Confidence(4)), known=everything)
    assert untouched.passes == 0 and torch.equal(untouched.tokens, everything.tokens)


def test_what_is_kept_is_what_the_scorer_likes_and_what_steps_tell_of():
    class Small(Scorer):
        def score(self, network, condition, tokens, free, noise):
            return -tokens.sum(1).double()

    steps = []
    kept = decoded(BestOf(Confidence(4), candidates=8, scorer=Small()), on_step=steps.append).tokens
    alone = decoded(Confidence(4)).tokens
    assert (kept.sum(1) <= alone.sum(1)).all() and (kept.sum(1) < alone.sum(1)).any()
    assert len(steps) == 4 and torch.equal(steps[-1].tokens, kept)
    stood = ~steps[1].masked
    assert torch.equal(steps[1].tokens[stood], kept[stood])


def test_an_image_is_the_same_alone_and_in_a_batch():
    strategy = BestOf(Confidence(4), candidates=3)
    together = decoded(strategy, rows=5).tokens
    condition, null = make_condition(5, torch.float64)
    for row in range(5):
        one = [c.map(lambda x, row=row: x[row : row + 1]) for c in (condition, null)]
        alone = strategy.decode(make_network(torch.float64), *one, Noise(0, torch.tensor([row]), torch.float64), Guidance(2.0))
        assert torch.equal(alone.tokens[0], together[row])


def test_a_critic_keeps_what_looks_right_where_it_was_drawn():
    class Odd(TokenNetwork):
        """Finds odd tokens wrong, and given ones, about which it should not be asked, more so."""

        spec = SPEC

        def prepare(self, condition):
            return None

        def forward(self, state, prepared, read=None, cache=None):
            return Bernoulli(torch.where(state.values % 2 == 1, 5.0, -5.0).unsqueeze(-1))

    known = Known(torch.zeros(3, 16, dtype=torch.bool), torch.ones(3, 16, dtype=torch.long))
    known.mask[:, :4] = True
    odd = lambda tokens: int((tokens[:, 4:] % 2).sum())  # noqa: E731
    kept = decoded(BestOf(Confidence(4), 8, CriticScore(Odd())), known=known)
    assert odd(kept.tokens) < odd(decoded(Confidence(4), known=known).tokens)
    assert kept.passes == 5 and kept.rows == 8 * (2 * 4 + 1)
    tokens = torch.tensor([[0, 1, 0, 1] * 4, [1, 1, 1, 1] + [0] * 12])
    free = torch.ones(2, 16, dtype=torch.bool)
    free[1, :4] = False
    scores = CriticScore(Odd()).score(Odd(), make_condition(2, torch.float64)[0], tokens, free, None)
    right, wrong = torch.nn.functional.logsigmoid(torch.tensor([5.0, -5.0]))
    assert scores.tolist() == pytest.approx([float((right + wrong) / 2), float(right)])


def test_a_causal_network_says_how_likely_its_tokens_are():
    torch.manual_seed(0)
    network = CausalDecoder(SPEC, (8,), width=16, depth=1, heads=2).double()
    torch.nn.init.normal_(network.head.logits.weight)
    found = decoded(BestOf(Autoregressive(), candidates=4), network=network)
    assert found.passes == 17 and found.rows == 4 * (2 * 16 + 1)

    condition, null = make_condition(1, torch.float64)
    noise = Noise(0, torch.tensor([0]), torch.float64)
    drawn = (
        Autoregressive()
        .decode(
            network,
            condition.map(lambda x: x.repeat(4, *[1] * (x.ndim - 1))),
            null.map(lambda x: x.repeat(4, *[1] * (x.ndim - 1))),
            noise.copies(4),
            Guidance(2.0),
        )
        .tokens
    )
    likely = []
    for tokens in drawn:
        one = torch.zeros(1, 16, dtype=torch.bool)
        logits = network(TokenState(tokens[None], one), network.prepare(condition)).logits[0].log_softmax(-1)
        likely.append(float(sum(logits[slot, tokens[slot]] for slot in range(16))))
    assert torch.equal(found.tokens[0], drawn[likely.index(max(likely))])


def test_a_causal_network_asks_given_tokens_too_which_tell_of_those_before_them():
    torch.manual_seed(0)
    network = CausalDecoder(SPEC, (8,), width=16, depth=1, heads=2).double()
    torch.nn.init.normal_(network.head.logits.weight)
    condition = make_condition(1, torch.float64)[0].map(lambda x: x.repeat(32, *[1] * (x.ndim - 1)))
    tokens = torch.randint(SPEC.size, (32, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 8:] = 3
    free = (torch.arange(16) < 8).expand(32, -1)
    scores = Likelihood().score(network, condition, tokens, free, Noise(0, torch.arange(32), torch.float64))
    masked = torch.zeros(32, 16, dtype=torch.bool)
    likely = -network(TokenState(tokens, masked), network.prepare(condition)).nll(tokens)
    torch.testing.assert_close(scores, likely.sum(1))
    assert not scores.argsort().equal(likely[:, :8].sum(1).argsort())  # the control


def test_bad_numbers_are_refused():
    with pytest.raises(UserError, match="candidates"):
        BestOf(candidates=0)
    with pytest.raises(UserError, match="groups"):
        Likelihood(0)


def test_each_split_hides_other_halves():
    network, condition = make_network(torch.float64), make_condition(3, torch.float64)[0]
    noise, prepared = Noise(0, torch.arange(3), torch.float64), network.prepare(condition)
    tokens, free = noise.integers("tokens", SPEC.size, shape=(16,)), torch.ones(3, 16, dtype=torch.bool)
    expected = torch.zeros(3, dtype=torch.float64)
    for number in range(3):
        first = noise.uniform("score", number, (16,)) < 0.5
        for hidden in (first, ~first):
            expected -= (network(TokenState(tokens, hidden), prepared).nll(tokens) * hidden).sum(1) / 3
    assert torch.allclose(Likelihood(splits=3).score(network, condition, tokens, free, noise), expected)
    assert not torch.allclose(Likelihood().score(network, condition, tokens, free, noise), expected)
