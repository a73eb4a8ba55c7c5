"""What every strategy promises, and that the fast code is the plain one."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nar_t2i.errors import UserError
from nar_t2i.inference import (
    Autoregressive,
    BestOf,
    Confidence,
    CriticGuided,
    CriticScore,
    EntropyBounded,
    GibbsSweeps,
    Halton,
    Moment,
    OneStep,
    Particles,
    ProgressiveStages,
    Purity,
    RandomOrder,
)
from nar_t2i.inference.halton import halton_order, mirrored
from nar_t2i.inference.scheduled import Scheduled
from nar_t2i.networks import CausalDecoder, TokenCritic
from nar_t2i.networks.predictions import Bernoulli, Categorical
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import Known, TokenNetwork, TokenSpec
from tests.inference import test_confidence
from tests.inference.eager import Eager
from tests.inference.test_confidence import SPEC, Watched, make_condition
from tests.networks import test_prefix

SCHEDULED = [
    Confidence(5), Confidence(4, "linear", 0.7, 2.0, final_temperature=0.2, top_k=3), Confidence(6, top_p=0.8), OneStep(),
    Purity(5), Purity(4, sharpness=0.0), Moment(5), RandomOrder(5), RandomOrder(4, temperature=0.0), Halton(5, "square"),
]  # fmt: skip
ADAPTIVE = [EntropyBounded(1.5), EntropyBounded(0.0, most_steps=5)]
SWEEPS = [GibbsSweeps(Confidence(3), sweeps=2, block=5), GibbsSweeps(Halton(4), block=16)]
STAGES = [ProgressiveStages(4), ProgressiveStages(5, "cosine", revise=0.0)]
STRATEGIES = SCHEDULED + ADAPTIVE + SWEEPS + STAGES


def critic():
    torch.manual_seed(2)
    network = TokenCritic(SPEC, (8,), width=16, depth=1, heads=2).double()
    torch.nn.init.normal_(network.head.logits.weight)
    return network


# Whose plain code is in eager_judged.py; tests/inference/test_best_of.py compares them.
JUDGED = [
    CriticGuided(critic(), 4), CriticGuided(critic(), 4, persistent=0.5), BestOf(Confidence(3), 3),
    BestOf(Halton(4), 2, CriticScore(critic())),
]  # fmt: skip


def make_network(dtype):
    """One that is sure of nothing, and says something else in each place."""
    network = test_confidence.make_network(dtype)
    torch.manual_seed(1)
    torch.nn.init.normal_(network.embedding.position, std=1.0)
    torch.nn.init.normal_(network.embedding.value.weight, std=1.0)
    torch.nn.init.normal_(network.head.logits.weight, std=0.3)
    return network


def named(strategy):
    return type(strategy).__name__


def decoded(strategy, rows=3, network=None, scale=2.0, known=None, dtype=torch.float64, on_step=None):
    condition, null = make_condition(rows, dtype)
    noise = Noise(0, torch.arange(rows), dtype)
    return strategy.decode(network or make_network(dtype), condition, null, noise, Guidance(scale), known, on_step)


def some_known(rows=3):
    mask = torch.rand(rows, 16, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.3], [0.9], [0.5]])[:rows]
    return Known(mask, torch.randint(SPEC.size, (rows, 16), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
def test_it_is_the_plain_strategy(strategy, given):
    network, known = make_network(torch.float64), some_known() if given else None
    tokens = decoded(strategy, network=network, known=known).tokens
    condition, null = make_condition(3, torch.float64)
    for row in range(3):
        part = slice(row, row + 1)
        one = [c.map(lambda x, part=part: x[part]) for c in (condition, null)]
        eager = Eager(network, *one, Noise(0, torch.tensor([row]), torch.float64), Guidance(2.0))
        plain = eager.decode(strategy, known and Known(known.mask[part], known.tokens[part]))
        assert torch.equal(tokens[row], plain), f"row {row}"


@pytest.mark.parametrize("strategy", STRATEGIES + JUDGED, ids=named)
def test_known_tokens_stay_and_no_mask_remains(strategy):
    known, steps = some_known(), []
    found = decoded(strategy, known=known, on_step=steps.append)
    assert torch.equal(found.tokens[known.mask], known.tokens[known.mask])
    assert all(torch.equal(step.tokens[known.mask], known.tokens[known.mask]) for step in steps)
    assert not steps[-1].masked.any()
    assert (found.tokens >= 0).all() and (found.tokens < SPEC.size).all()
    everything = Known(torch.ones(3, 16, dtype=torch.bool), known.tokens)
    nothing_to_do = decoded(strategy, known=everything)
    assert torch.equal(nothing_to_do.tokens, known.tokens) and nothing_to_do.passes == 0


@pytest.mark.parametrize("strategy", SCHEDULED + SWEEPS + STAGES, ids=named)
def test_it_makes_the_calls_that_it_promises(strategy):
    first = strategy.first if isinstance(strategy, GibbsSweeps) else strategy
    promised = first.steps
    if isinstance(strategy, GibbsSweeps):
        promised += strategy.sweeps * -(-16 // strategy.block)
    network = Watched(make_network(torch.float64))
    network.reads_unknown_alone = strategy not in STAGES  # these look at what stands, too
    found = decoded(strategy, network=network)
    assert network.calls == found.passes == promised and found.rows == 2 * promised


@pytest.mark.parametrize("strategy", STRATEGIES + JUDGED, ids=named)
def test_an_image_is_the_same_alone_and_in_a_batch(strategy):
    condition, null = make_condition(5, torch.float64)
    together = decoded(strategy, rows=5).tokens
    for row in range(5):
        one = [c.map(lambda x, row=row: x[row : row + 1]) for c in (condition, null)]
        noise = Noise(0, torch.tensor([row]), torch.float64)
        alone = strategy.decode(make_network(torch.float64), *one, noise, Guidance(2.0))
        assert torch.equal(alone.tokens[0], together[row])


@pytest.mark.parametrize("strategy", [Confidence(12, "linear"), RandomOrder(12, "linear"), Halton(12, "linear")], ids=named)
def test_passes_end_when_nothing_is_left(strategy):
    mask = torch.ones(3, 16, dtype=torch.bool)
    for row, unknown in enumerate((2, 5, 0)):
        mask[row, :unknown] = False
    known = Known(mask, torch.zeros(3, 16, dtype=torch.long))
    assert decoded(strategy, known=known).passes == 5


@pytest.mark.parametrize(
    "strategy",
    [Confidence(12, temperature=0.9, final_temperature=0.1), RandomOrder(12, temperature=0.9, final_temperature=0.1)],
    ids=named,
)
def test_where_few_tokens_are_unknown_settings_run_their_course(strategy, monkeypatch):
    """And an image of few in a batch with others is the one that it is alone; steps tell of all images."""
    known, steps, scales, temperatures = some_known(), [], [], []
    together = decoded(strategy, known=known, on_step=steps.append)
    assert [step.step for step in steps] == list(range(together.passes)) and together.passes == 11
    assert steps[-1].tokens.equal(together.tokens) and not steps[-1].masked.any()
    assert all((one.masked | ~other.masked).all() for one, other in itertools.pairwise(steps))
    at, temperature_at = Guidance.at, Scheduled.temperature_at
    monkeypatch.setattr(Guidance, "at", lambda self, progress: scales.append(at(self, progress)) or scales[-1])
    monkeypatch.setattr(
        Scheduled, "temperature_at", lambda self, step: temperatures.append(temperature_at(self, step)) or temperatures[-1]
    )
    condition, null = make_condition(3, torch.float64)
    for row, unknown in enumerate((~known.mask).sum(1).tolist()):
        part = slice(row, row + 1)
        one = [c.map(lambda x, part=part: x[part]) for c in (condition, null)]
        scales.clear()
        temperatures.clear()
        ramp, plain = (
            strategy.decode(
                make_network(torch.float64),
                *one,
                Noise(0, torch.tensor([row]), torch.float64),
                guidance,
                Known(known.mask[part], known.tokens[part]),
            )
            for guidance in (Guidance(2.0, ramp="linear"), Guidance(2.0))
        )
        assert plain.tokens[0].equal(together.tokens[row])
        last = ramp.passes - 1
        assert last + 1 == min(unknown, 12) and len(scales) == len(temperatures) == 2 * ramp.passes
        if last:
            assert (scales[0], scales[last]) == (1, 2) and (temperatures[0], temperatures[last]) == pytest.approx((0.9, 0.1))


def test_no_strategy_is_another_one():
    traces, prefixes, twin = {}, test_prefix.make_network(), CausalDecoder(SPEC, (8,), width=16, depth=1, heads=2).double()
    torch.nn.init.normal_(twin.head.logits.weight)
    ordered = [
        (Particles(4), prefixes),
        (Particles(4, temperature=0.5), prefixes),
        (Autoregressive(), twin),
        (Autoregressive(0.5), twin),
    ]
    for strategy, network in [(strategy, None) for strategy in STRATEGIES + JUDGED] + ordered:
        steps = []
        found = decoded(strategy, network=network, on_step=steps.append)
        traces[f"{named(strategy)} {len(traces)}"] = torch.cat(
            [torch.stack([s.masked for s in steps]).flatten().long(), found.tokens.flatten()]
        )
    for (one, a), (other, b) in itertools.combinations(traces.items(), 2):
        assert a.shape != b.shape or not torch.equal(a, b), f"{one} and {other} decode alike"


class Oracle(TokenNetwork):
    """Knows the answer to each text; the null caption's rows say any of them."""

    spec = SPEC
    texts = make_condition(3, torch.float64)[0].states[0][:, 0]
    answer = torch.randint(SPEC.size, (3, 16), generator=torch.Generator().manual_seed(5))

    def prepare(self, condition):
        return torch.cdist(condition.states[0][:, 0], self.texts).argmin(1)

    def forward(self, state, prepared, read=None, cache=None):
        rows = self.answer[prepared]
        return Categorical(60.0 * torch.nn.functional.one_hot(rows if read is None else rows.gather(1, read), SPEC.size))


@pytest.mark.parametrize("strategy", STRATEGIES + JUDGED, ids=named)
def test_a_network_that_knows_the_answer_is_believed(strategy):
    assert torch.equal(decoded(strategy, network=Oracle()).tokens, Oracle.answer)


@pytest.mark.parametrize("strategy", [OneStep(), Halton(1), EntropyBounded(most_steps=1), Purity(1)], ids=named)
@pytest.mark.parametrize("ramp", ["constant", "linear", "cosine"])
def test_a_single_pass_is_guided_whatever_the_ramp(strategy, ramp):
    condition, null = make_condition(3, torch.float64)
    found = [strategy.decode(make_network(torch.float64), condition, null, Noise(0, torch.arange(3), torch.float64), guidance)
             for guidance in (Guidance(4.0, ramp=ramp), Guidance(4.0), Guidance(1.0))]  # fmt: skip
    assert torch.equal(found[0].tokens, found[1].tokens) and not torch.equal(found[0].tokens, found[2].tokens)
    assert [decoded.rows for decoded in found] == [2, 2, 1]


def test_entropy_decides_how_many_tokens_a_pass_fills():
    counts = {}
    for bound in (0.0, 3.0, 8.0, 1e9):
        steps = []
        found = decoded(EntropyBounded(bound, most_steps=100), on_step=steps.append)
        counts[bound] = found.passes
        assert len(steps) == found.passes <= 16
    assert counts[0.0] == 16 and counts[1e9] == 1 and 16 > counts[3.0] > counts[8.0] > 1
    assert decoded(EntropyBounded(0.0, most_steps=5)).passes == 5
    assert decoded(EntropyBounded(1.0), network=Oracle()).passes == 1  # all is certain


class Reads(TorchDispatchMode):
    """Counts how often a number is taken out of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_an_adaptive_strategy_reads_one_number_a_pass():
    for bound in (0.0, 3.0):
        with Reads() as reads:
            found = decoded(EntropyBounded(bound))
        assert 1 < found.passes <= 16 and reads.count == found.passes + 1  # the last one says that nothing is left


def test_the_halton_order_spreads():
    assert [mirrored(n, 2, 8) for n in range(5)] == [0, 4, 2, 6, 1]
    assert [mirrored(n, 3, 9) for n in range(6)] == [0, 3, 6, 1, 4, 7]  # all on an edge
    for shape in ((8, 8), (5, 7), (128,), (2, 2), (32, 32)):
        order = halton_order(shape)
        assert sorted(order) == list(range(len(order)))

    def nearest(slots):
        """The mean distance of 8 slots of an 8 × 8 grid to the nearest other."""
        points = torch.tensor([[slot // 8, slot % 8] for slot in slots]).double()
        return torch.cdist(points, points).add(100 * torch.eye(len(slots))).amin(1).mean()

    spread = nearest(halton_order((8, 8))[:8])
    random = torch.stack([nearest(torch.randperm(64, generator=torch.Generator().manual_seed(i))[:8].tolist()) for i in range(200)])
    assert spread > random.mean() + 1.5 * random.std()


def test_ordered_strategies_predict_only_what_they_fill():
    for strategy in (RandomOrder(4, "linear"), Halton(4, "linear")):
        network = Watched(make_network(torch.float64))
        decoded(strategy, network=network)
        assert [read.shape[1] for read in network.reads] == [4, 4, 4, 4]
    network = Watched(make_network(torch.float64))
    decoded(Confidence(4, "linear"), network=network)
    assert [read.shape[1] for read in network.reads] == [16, 12, 8, 4]


def test_revision_mends_errors_that_are_put_in_early():
    class Corrupting(Oracle):
        """Knows the answer, but says something else in its first pass."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, state, prepared, read=None, cache=None):
            self.calls += 1
            said = super().forward(state, prepared, read)
            return Categorical(said.logits.roll(1, -1)) if self.calls == 1 else said

    wrong = {}
    for revise in (0.0, 0.3, 1.0):
        found = decoded(ProgressiveStages(4, revise=revise), network=Corrupting(), scale=1.0)
        wrong[revise] = int((found.tokens != Oracle.answer).sum())
        assert found.passes == 4
    assert wrong[0.0] == 12 > wrong[0.3] and wrong[1.0] == 0  # a quarter of 3 × 16 was filled wrongly


@pytest.mark.parametrize(
    ("top_k", "top_p", "left"), [(0, 1.0, [0, 1, 2, 3]), (2, 1.0, [0, 2]), (0, 0.5, [0]), (0, 0.75, [0, 2]), (3, 0.5, [0])]
)
def test_truncation_draws_only_the_likeliest(top_k, top_p, left):
    probabilities = torch.tensor([0.5, 0.1, 0.3, 0.1], dtype=torch.float64)
    count = 20_000
    prediction = Categorical(probabilities.log().expand(count, 1, 4))
    slots = torch.zeros(count, 1, dtype=torch.long)
    drawn = prediction.sample(Noise(0, torch.arange(count), torch.float64).at(0, slots), 1.0, top_k, top_p)
    shares = torch.bincount(drawn.values.flatten(), minlength=4) / count
    wanted = torch.zeros(4, dtype=torch.float64)
    wanted[left] = probabilities[left] / probabilities[left].sum()
    torch.testing.assert_close(shares.double(), wanted, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.log_prob, probabilities.log()[drawn.values])  # the untempered, whole distribution's


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Confidence(0),
        lambda: Confidence(temperature=-1.0),
        lambda: Confidence(top_p=0.0),
        lambda: Confidence(top_k=-1),
        lambda: Purity(sharpness=-1.0),
        lambda: Moment(choice_temperature=0.0),
        lambda: EntropyBounded(-1.0),
        lambda: EntropyBounded(most_steps=0),
        lambda: ProgressiveStages(revise=1.5),
        lambda: GibbsSweeps(sweeps=0),
        lambda: GibbsSweeps(block=0),
        lambda: Halton(0),
        lambda: Confidence(final_temperature=-0.1),
        lambda: Confidence(4.5),
        lambda: Confidence(choice_temperature=float("nan")),
    ],
)
def test_arguments_that_cannot_be_are_errors(wrong):
    with pytest.raises(UserError):
        wrong()


@pytest.mark.parametrize("strategy", [Purity(2), Moment(2), EntropyBounded()], ids=named)
def test_what_needs_codes_says_so(strategy):
    class Bits(TokenNetwork):
        spec = TokenSpec((4,), "binary", 3)

        def prepare(self, condition):
            return None

        def forward(self, state, prepared, read=None, cache=None):
            return Bernoulli(torch.zeros(*read.shape, 3))

    with pytest.raises(UserError, match="codes"):
        decoded(strategy, network=Bits())
