"""Particles: exact with many, apart with one, and the plain code without a cache."""

import itertools

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.inference import Autoregressive, BestOf, Confidence, Particles
from nar_t2i.inference.particles import resampled
from nar_t2i.networks.predictions import Categorical
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import Known, TokenSpec, TokenState
from tests.inference.test_confidence import make_condition
from tests.inference.test_confidence import make_network as make_masked
from tests.networks.test_prefix import make_network

TINY = TokenSpec((2, 2), "categorical", 3)  # 81 images


def decode(strategy, network, rows=3, scale=2.0, known=None, on_step=None, ids=None):
    condition, null = make_condition(rows, torch.float64)
    noise = Noise(0, torch.arange(rows) if ids is None else ids, torch.float64)
    return strategy.decode(network, condition, null, noise, Guidance(scale), known, on_step)


def plainly(strategy, network, row, rows=3, scale=2.0, known=None):
    """One image, its candidates one after another, all predictions anew from the network's whole layouts."""
    condition, null = (c.map(lambda x: x[row : row + 1]) for c in make_condition(rows, torch.float64))
    noise, count = Noise(0, torch.tensor([row]), torch.float64), strategy.candidates
    draws, order = noise.copies(count), network.order.tolist()
    stages = [*network.stages, network.spec.length - sum(network.stages)]

    def guided(tokens, ranks, seen):
        """Logits at some ranks given the first `seen` tokens, the last of which asks about the one that follows."""
        slots = torch.tensor([order[:seen] + [order[rank] for rank in ranks]])
        asked = torch.arange(slots.shape[1])[None] >= seen
        entries = [seen - 1 if seen and rank == seen else seen + i for i, rank in enumerate(ranks)]
        c, u = (network(TokenState(tokens[slots], asked, slots), network.prepare(x)).logits[0, entries] for x in (condition, null))
        return u + scale * (c - u)

    def log_prob(logits, value):
        return (logits / strategy.temperature).log_softmax(-1)[value].item()

    candidates = [torch.zeros(network.spec.length, dtype=torch.long) for _ in range(count)]
    start, owed, told = 0, [0.0] * count, [0.0] * count
    for step, size in enumerate(stages):
        if step and stages[step - 1] > 1:
            before = start - stages[step - 1]
            weights = []
            for number, tokens in enumerate(candidates):
                weight = owed[number]
                apart = guided(tokens, range(before, start), before)
                for rank in range(before + 1, start):
                    value = tokens[order[rank]]
                    weight += log_prob(guided(tokens, [rank], rank)[0], value)
                    if known is None or not known.mask[row, order[rank]]:
                        weight -= log_prob(apart[rank - before], value)
                weights.append(weight)
            rows_kept = resampled(torch.tensor([weights], dtype=torch.float64), noise.uniform("resampled", step)).tolist()
            candidates, owed = [candidates[i].clone() for i in rows_kept], [0.0] * count
        for number, tokens in enumerate(candidates):
            logits = guided(tokens, range(start, start + size), start)
            slots = torch.tensor([order[start : start + size]])
            temperature = strategy.final_temperature if step == len(stages) - 1 else strategy.temperature
            each = [Noise(0, draws.ids[i : i + 1], torch.float64) for i in range(count)]
            for i, one in enumerate(each):
                one._keys = draws._keys[i : i + 1]
            drawn = Categorical(logits[None]).sample(each[number].at(step, slots), temperature, **strategy.truncation).values[0]
            for place, slot in enumerate(slots[0].tolist()):
                given = known is not None and known.mask[row, slot]
                tokens[slot] = known.tokens[row, slot] if given else drawn[place]
                if given and place == 0 and step < len(stages) - 1:
                    owed[number] += log_prob(logits[0], tokens[slot])
                if given and step == len(stages) - 1:
                    told[number] += log_prob(logits[place], tokens[slot])
        start += size
    if not strategy.likeliest:
        shares = torch.tensor(told, dtype=torch.float64).softmax(0).cumsum(0)
        return candidates[int((shares < noise.uniform("kept")).sum())]
    total = [
        told[number] + sum(log_prob(guided(tokens, [rank], rank)[0], tokens[order[rank]]) for rank in range(sum(network.stages)))
        for number, tokens in enumerate(candidates)
    ]
    return candidates[max(range(count), key=lambda i: total[i])]


SETTINGS = [
    Particles(1),
    Particles(5),
    Particles(6, likeliest=False),
    Particles(4, temperature=0.6, final_temperature=0.0, top_k=3),
]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("strategy", SETTINGS)
def test_the_fast_code_is_the_plain_one(strategy, given):
    network = make_network(stages=[1, 1, 3, 2], std=0.6)  # so sure of much that resampling matters
    known = given and Known(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.4, torch.full((3, 16), 2))
    found = decode(strategy, network, known=known or None).tokens
    for row in range(3):
        assert found[row].equal(plainly(strategy, network, row, known=known or None)), row


def distribution(strategy, rows=6000, known=None):
    """(drawn shares, true ones) of all images of a tiny network. known: {slot: code} that is given."""
    network = make_network(spec=TINY, stages=[3])
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    text = make_condition(1, torch.float64)[0]
    with torch.no_grad():
        prepared = network.prepare(text.map(lambda x: x.expand(len(every), *x.shape[1:])))
        true = -network(TokenState(every, torch.zeros_like(every, dtype=torch.bool)), prepared).nll(every).sum(1)
    many = text.map(lambda x: x.expand(rows, *x.shape[1:]))
    given = None
    for slot, code in (known or {}).items():
        true = true.masked_fill(every[:, slot] != code, -torch.inf)
        given = Known(torch.arange(4).expand(rows, -1) == slot, torch.full((rows, 4), code))
    drawn = strategy.decode(network, many, many, Noise(1, torch.arange(rows), torch.float64), Guidance(1.0), given).tokens
    which = (drawn * 3 ** torch.arange(3, -1, -1)).sum(1)
    return torch.bincount(which, minlength=81) / rows, true.softmax(0)


def apart(strategy, known=None):
    drawn, true = distribution(strategy, known=known)
    return (drawn - true).abs().sum().item() / 2


def test_many_particles_draw_the_joint_distribution_and_one_does_not():
    """The total variation distance of 6,000 exact draws is about 0.03 here."""
    distances = [apart(Particles(count, likeliest=False)) for count in (1, 6, 48)]
    assert distances[0] > 0.08 > 0.05 > distances[2] and distances[0] > distances[1] > distances[2]


def test_tokens_that_are_given_in_the_last_stage_tell_of_those_before():
    last = make_network(spec=TINY, stages=[3]).order[3].item()
    distances = [apart(Particles(count, likeliest=False), {last: 2}) for count in (1, 48)]
    assert distances[0] > 0.08 > 0.05 > distances[1]


def test_resampling_is_as_often_as_weights_say():
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]]).log()
    counts = torch.zeros(2, 4)
    for place in torch.linspace(0.001, 0.999, 200):
        rows = resampled(weights, place.expand(2)).view(2, 4) - torch.tensor([[0], [4]])
        counts += torch.stack([torch.bincount(row, minlength=4) for row in rows])
    torch.testing.assert_close(counts / 800, weights.exp(), atol=0.005, rtol=0)


def test_passes_rows_known_tokens_and_steps():
    network, steps = make_network(stages=[1, 1, 3, 2]), []
    known = Known(torch.arange(16).expand(3, -1) % 3 == 0, torch.full((3, 16), 5))
    found = decode(Particles(4), network, known=known, on_step=steps.append)
    assert found.passes == 5 and found.rows == 2 * 5 * 4
    assert (found.tokens[known.mask] == 5).all() and [s.masked.sum().item() for s in steps] == sorted(
        (s.masked.sum().item() for s in steps), reverse=True
    )
    assert not steps[-1].masked.any() and all(s.tokens.equal(found.tokens) for s in steps)
    assert decode(Particles(4), network, scale=1.0).rows == 5 * 4


def test_an_image_is_the_same_alone_as_in_a_batch():
    network, strategy = make_network(), Particles(4)
    together = decode(strategy, network).tokens
    condition, null = make_condition(3, torch.float64)
    alone = strategy.decode(
        network, *(c.map(lambda x: x[1:2]) for c in (condition, null)), Noise(0, torch.tensor([1]), torch.float64), Guidance(2.0)
    )
    assert alone.tokens[0].equal(together[1])


def test_the_likeliest_is_likelier_than_one_at_random():
    network = make_network()
    means = []
    for likeliest in (True, False):
        tokens = decode(Particles(16, likeliest=likeliest), network, rows=3, scale=1.0, ids=torch.arange(3)).tokens
        state = TokenState(tokens, torch.zeros_like(tokens, dtype=torch.bool))
        nll = network(state, network.prepare(make_condition(3, torch.float64)[0])).nll(tokens)
        means.append(nll[:, network.order[: sum(network.stages)]].sum().item())
    assert means[0] < means[1]


def test_a_best_of_judges_by_the_network_itself():
    found = decode(BestOf(Particles(1), candidates=3), make_network())
    assert found.passes == 5 and found.rows == 3 * (2 * 4 + 1)


def test_what_has_no_stages_is_refused():
    with pytest.raises(UserError, match="EncoderDecoder has no order"):
        decode(Particles(), make_masked(torch.float64))
    for wrong in (Confidence(), Autoregressive()):
        with pytest.raises(UserError, match="PrefixDecoder .*Particles"):
            decode(wrong, make_network())
    with pytest.raises(UserError, match="EncoderDecoder sees all slots"):
        decode(Autoregressive(), make_masked(torch.float64))


@pytest.mark.parametrize(
    "wrong", [{"candidates": 0}, {"temperature": 0.0}, {"final_temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="Particles|top_k"):
        Particles(**wrong)
