"""What can be recorded reads nothing from the device and copies nothing to it; recordings decode as the strategy does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nar_t2i.inference import Autoregressive, BestOf, Confidence, CriticGuided, EntropyBounded, GibbsSweeps, Halton
from nar_t2i.inference.graphs import Graphs, padded
from nar_t2i.inference.halton import halton_rank
from nar_t2i.networks import CausalDecoder, EncoderDecoder, TokenCritic
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from tests.inference.test_best_of import make_critic
from tests.inference.test_confidence import SPEC, make_condition
from tests.inference.test_strategies import ADAPTIVE, SCHEDULED, STAGES, SWEEPS, make_network, named

STATIC = [*SCHEDULED, *SWEEPS, *STAGES, BestOf(Confidence(3), candidates=3)]


class NothingCrosses(TorchDispatchMode):
    """Fails where a tensor comes to the meta device from the host. (Reading from it fails by itself: there is no memory.)"""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        moved = isinstance(found, torch.Tensor) and found.is_meta and function in (
            torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default,
        )  # fmt: skip
        if moved and any(isinstance(x, torch.Tensor) and not x.is_meta and x.ndim for x in args):
            raise AssertionError(f"{function} copies to the device")
        return found


def decode_without_memory(strategy, network):
    condition, null = (c.map(lambda x: x.to("meta")) for c in make_condition(3, torch.float32))
    network, ids = network.to("meta"), torch.zeros(3, dtype=torch.long, device="meta")
    with NothingCrosses():
        return strategy.decode(network, condition, null, Noise(0, ids), Guidance(2.0))


@pytest.mark.parametrize("strategy", STATIC, ids=named)
def test_static_strategies_touch_no_value(strategy):
    assert strategy.static
    halton_rank(SPEC.shape, torch.device("meta"))  # made once for a device, and copied to it then
    found = decode_without_memory(strategy, make_network(torch.float32))
    assert found.tokens.shape == (3, 16) and found.passes > 0


def test_a_critic_and_one_token_at_a_time_touch_no_value(monkeypatch):
    monkeypatch.setattr("nar_t2i.inference.critic_guided.beside", lambda network, condition: network)  # autocast has no meta
    critic = TokenCritic(SPEC, (8,), width=16, depth=1, heads=2).to("meta")
    assert decode_without_memory(CriticGuided(critic, steps=4, persistent=0.5), make_network(torch.float32)).passes == 7
    causal = CausalDecoder(SPEC, (8,), width=16, depth=1, heads=2)
    assert decode_without_memory(Autoregressive(), causal).passes == 16


@pytest.mark.parametrize("strategy", [*ADAPTIVE, GibbsSweeps(EntropyBounded()), BestOf(EntropyBounded())], ids=named)
def test_adaptive_strategies_say_so_and_do_read(strategy):
    assert not strategy.static
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        decode_without_memory(strategy, make_network(torch.float32))


class Tape:
    """Stands for CUDA's graph: a replay does again what was written down, into the same memory."""

    def __init__(self):
        self.made = 0

    def __call__(self, run):
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
        return graphs.decode(Confidence(4), network, condition, null, Noise(0, torch.arange(first, first + 3), torch.float64), Guidance(2.0)).tokens

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
