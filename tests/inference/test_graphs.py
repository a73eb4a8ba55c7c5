"""What can be recorded reads nothing from the device and copies nothing to it; recordings decode as the strategy does."""

import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nar_t2i.inference import (
    Autoregressive,
    BestOf,
    Confidence,
    CriticGuided,
    CriticScore,
    EntropyBounded,
    GibbsSweeps,
    Halton,
    Particles,
)
from nar_t2i.inference.best_of import Scorer
from nar_t2i.inference.graphs import Graphs, padded
from nar_t2i.inference.halton import halton_rank
from nar_t2i.networks import CausalDecoder, EncoderDecoder, PrefixDecoder, TokenCritic, TwoWayDecoder
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from tests.inference.test_best_of import make_critic
from tests.inference.test_confidence import SPEC, make_condition
from tests.inference.test_strategies import ADAPTIVE, SCHEDULED, STAGES, SWEEPS, make_network, named

STATIC = [*SCHEDULED, *SWEEPS, *STAGES, BestOf(Confidence(3), candidates=3)]


class NothingCrosses(TorchFunctionMode):
    """Fails where a tensor comes to the meta device from the host. (Reading from it fails by itself: there is no memory.)
    Numbers in arithmetic are no copies: a kernel takes them as arguments."""

    MADE = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
    MOVED = {
        torch.Tensor.to,
        torch.Tensor.cuda,
        torch.Tensor.copy_,
        torch.Tensor.type_as,
        torch.Tensor.__getitem__,
        torch.Tensor.__setitem__,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        meta = isinstance(found, torch.Tensor) and found.is_meta
        if meta and function in self.MADE:
            raise AssertionError(f"{function.__name__} makes a tensor of host values on the device")
        parts = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
        if (meta or function is torch.Tensor.__setitem__) and function in self.MOVED:
            if any(isinstance(x, torch.Tensor) and not x.is_meta for x in parts):
                raise AssertionError(f"{function.__name__} copies to the device")
        return found


def test_the_guard_sees_copies():
    there = torch.zeros(3, device="meta")
    for copy in (lambda: torch.tensor(5, device="meta"), lambda: torch.zeros(2).to("meta"), lambda: there.copy_(torch.zeros(3)),
                 lambda: there[torch.tensor([1])], lambda: torch.tensor(1.0).to("meta")):  # fmt: skip
        with pytest.raises(AssertionError), NothingCrosses():
            copy()
    with NothingCrosses():
        assert (torch.full((3,), 2.0, device="meta") * 3 + there).is_meta


def decode_without_memory(strategy, network):
    condition, null = (c.map(lambda x: x.to("meta")) for c in make_condition(3, torch.float32))
    network, ids = network.to("meta"), torch.zeros(3, dtype=torch.long, device="meta")
    with NothingCrosses():  # the noise is made within a recording, too
        return strategy.decode(network, condition, null, Noise(0, ids), Guidance(2.0))


@pytest.mark.parametrize("strategy", STATIC, ids=named)
def test_static_strategies_touch_no_value(strategy):
    assert strategy.static
    halton_rank(SPEC.shape, torch.device("meta"))  # made once for a device, and copied to it then
    found = decode_without_memory(strategy, make_network(torch.float32))
    assert found.tokens.shape == (3, 16) and found.passes > 0


def test_a_critic_and_one_token_at_a_time_touch_no_value(monkeypatch):
    # Autocast knows no such device.
    monkeypatch.setattr("nar_t2i.inference.critic_guided.beside", lambda network, condition: network)
    critic = TokenCritic(SPEC, (8,), width=16, depth=1, heads=2).to("meta")
    assert decode_without_memory(CriticGuided(critic, steps=4, persistent=0.5), make_network(torch.float32)).passes == 7
    assert decode_without_memory(BestOf(Confidence(3), 2, CriticScore(critic)), make_network(torch.float32)).passes == 4
    for grid in (False, True):
        causal = CausalDecoder(SPEC, (8,), width=16, depth=1, heads=2, grid_convolution=grid)
        assert decode_without_memory(Autoregressive(), causal).passes == 16
        prefix = PrefixDecoder(SPEC, (8,), width=16, depth=2, heads=2, grid_convolution=grid)
        for likeliest in (False, True):
            assert decode_without_memory(Particles(3, likeliest), prefix).passes == 4
        assert decode_without_memory(BestOf(Particles(3), 2), prefix).passes == 5


def test_what_reads_values_is_not_recorded():
    """Neither by a strategy, nor a network, nor a scorer of its own."""

    class Own(Scorer):
        def score(self, network, condition, tokens, free, noise):
            return tokens.sum(1).double()

    two_way = TwoWayDecoder(SPEC, (8,), width=16, depth=2, heads=2).double()
    torch.nn.init.normal_(two_way.head.logits.weight)
    condition, null = texts(3, 5)
    for strategy, network in ((Confidence(4), two_way), (BestOf(Confidence(4), 2, Own()), make_network(torch.float64)),
                              (EntropyBounded(), make_network(torch.float64))):  # fmt: skip
        tape, noise = Tape(), Noise(0, torch.arange(3), torch.float64)
        graphs, plain = Graphs(record=tape), strategy.decode(network, condition, null, noise, Guidance(2.0)).tokens
        for _ in range(3):
            assert torch.equal(graphs.decode(strategy, network, condition, null, noise, Guidance(2.0)).tokens, plain)
        assert tape.made == 0


def test_what_cannot_be_recorded_is_launched_plainly():
    def refuse(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, network, (condition, null) = Graphs(record=refuse), make_network(torch.float64), texts(3, 5)
    noise = Noise(0, torch.arange(3), torch.float64)
    plain = Confidence(4).decode(network, condition, null, noise, Guidance(2.0)).tokens

    def decode():
        return graphs.decode(Confidence(4), network, condition, null, noise, Guidance(2.0)).tokens

    assert torch.equal(decode(), plain)
    with pytest.warns(UserWarning, match="Confidence is launched pass by pass"):
        assert torch.equal(decode(), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(), plain)  # and not tried again


@pytest.mark.parametrize("strategy", [*ADAPTIVE, GibbsSweeps(EntropyBounded()), BestOf(EntropyBounded())], ids=named)
def test_adaptive_strategies_say_so_and_do_read(strategy):
    assert not strategy.static
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        decode_without_memory(strategy, make_network(torch.float32))


class Tape:
    """Stands for CUDA's graph: a replay does again what was written down, into the same memory."""

    def __init__(self):
        self.made = 0

    def __call__(self, run, device):
        self.made += 1
        result = run()
        return lambda: result.tokens.copy_(run().tokens), result


def texts(rows, length):
    condition, null = make_condition(rows, torch.float64)
    longer = padded(condition, length)
    generator = torch.Generator().manual_seed(length)
    states = longer.states[0] + torch.randn(longer.states[0].shape, generator=generator, dtype=torch.float64)
    return longer._replace(states=(states,), masks=(torch.ones_like(longer.masks[0]),)), null


@pytest.mark.parametrize("strategy", [Confidence(4), Halton(3), BestOf(Confidence(3))], ids=named)
def test_recordings_decode_as_the_strategy_does(strategy):
    tape, network = Tape(), make_network(torch.float64)
    graphs = Graphs(record=tape)
    for call, (length, first) in enumerate([(5, 0), (9, 3), (20, 100), (7, 50)]):
        condition, null = texts(3, length)
        noise = Noise(0, torch.arange(first, first + 3), torch.float64)
        found = graphs.decode(strategy, network, condition, null, noise, Guidance(2.0))
        plain = strategy.decode(network, condition, null, noise, Guidance(2.0))
        assert torch.equal(found.tokens, plain.tokens) and found[1:] == plain[1:], f"call {call}"
    assert tape.made == 1  # texts of up to 32 words share one


def test_what_differs_is_recorded_apart_and_the_oldest_is_forgotten():
    tape, network, (condition, null) = Tape(), make_network(torch.float64), texts(3, 5)
    graphs, noise = Graphs(keep=2, record=tape), Noise(0, torch.arange(3), torch.float64)

    def decode(strategy, scale=2.0):
        expected = strategy.decode(network, condition, null, noise, Guidance(scale)).tokens
        before = tape.made
        for _ in range(3):
            assert torch.equal(graphs.decode(strategy, network, condition, null, noise, Guidance(scale)).tokens, expected)
        return tape.made - before

    assert decode(Confidence(4)) == 1 and decode(Confidence(4)) == 0  # another object of the same settings
    assert decode(Confidence(5)) == 1 and decode(Confidence(4)) == 0
    assert decode(Confidence(4), scale=3.0) == 1  # forgets the one of 5 steps
    assert decode(Confidence(4)) == 0 and decode(Confidence(5)) == 1
    critics = CriticGuided(make_critic(), steps=3), CriticGuided(make_critic(), steps=3)
    assert [decode(strategy) for strategy in (*critics, critics[1])] == [1, 1, 0]


def test_results_stay_when_others_are_drawn():
    graphs, network = Graphs(record=Tape()), make_network(torch.float64)
    condition, null = texts(3, 5)

    def decode(first):
        return graphs.decode(
            Confidence(4), network, condition, null, Noise(0, torch.arange(first, first + 3), torch.float64), Guidance(2.0)
        ).tokens

    decode(0)
    drawn = decode(3)
    kept = drawn.clone()
    assert not torch.equal(decode(9), kept) and torch.equal(drawn, kept)


def test_what_is_decoded_once_is_not_recorded():
    tape, network, (condition, null) = Tape(), make_network(torch.float64), texts(3, 5)
    graphs = Graphs(record=tape)
    for steps in (2, 3, 4):
        graphs.decode(Confidence(steps), network, condition, null, Noise(0, torch.arange(3), torch.float64), Guidance(2.0))
    assert tape.made == 0


def test_padding_changes_nothing():
    condition, null = texts(3, 5)
    network = EncoderDecoder(SPEC, (8,), width=16, depth=1, heads=2).double()
    torch.nn.init.normal_(network.head.logits.weight)
    noise = Noise(0, torch.arange(3), torch.float64)
    plain = Confidence(4).decode(network, condition, null, noise, Guidance(2.0))
    more = Confidence(4).decode(network, padded(condition, 32), padded(null, 16), noise, Guidance(2.0))
    assert torch.equal(plain.tokens, more.tokens)
