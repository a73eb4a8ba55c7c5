"""Iterative decoding: what it promises about masks, passes and batches."""

import pytest
import torch

from nar_t2i.inference import Confidence, OneStep
from nar_t2i.networks import EncoderDecoder
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import Condition, Known, TokenNetwork, TokenSpec, TokenState

SPEC = TokenSpec((4, 4), "categorical", 11)


def make_network(dtype: torch.dtype = torch.float32) -> EncoderDecoder:
    torch.manual_seed(0)
    network = EncoderDecoder(SPEC, (8,), width=16, depth=2, heads=2).eval()
    torch.nn.init.normal_(network.head.logits.weight, std=1.0)
    return network.to(dtype)


def make_condition(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Condition, Condition]:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(rows, 5, 8, generator=generator).to(dtype)
    mask = torch.arange(5) < torch.arange(2, 2 + rows).clamp(max=5)[:, None]
    null = torch.zeros(rows, 1, 8, dtype=dtype)
    return Condition((states,), (mask,)), Condition((null,), (torch.ones(rows, 1, dtype=torch.bool),))


class Watched(TokenNetwork):
    """Counts calls and prepared texts of another network, and keeps what it was given."""

    def __init__(self, network: TokenNetwork):
        super().__init__()
        self.network, self.spec = network, network.spec
        self.calls, self.prepared, self.rows, self.reads = 0, 0, [], []
        self.reads_unknown_alone = True

    def prepare(self, condition):
        self.prepared += 1
        return self.network.prepare(condition)

    def forward(self, state, prepared, read=None, cache=None):
        self.calls += 1
        self.rows.append(len(state.values))
        self.reads.append(read)
        unknown = state.masked.gather(1, read).any(dim=0)
        assert unknown.all() or not self.reads_unknown_alone, "a column of slots is read in which none is unknown"
        return self.network(state, prepared, read, cache)


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_masked_count_falls_to_zero_in_the_promised_passes(steps: int) -> None:
    network, counts = Watched(make_network()), []
    condition, null = make_condition(3)
    decoded = Confidence(steps).decode(
        network, condition, null, Noise(0, torch.arange(3)), Guidance(2.0),
        on_step=lambda step: counts.append(step.masked.sum(1)),
    )  # fmt: skip
    assert network.calls == decoded.passes == steps and decoded.rows == 2 * steps
    assert network.rows == [6] * steps
    history = torch.stack([torch.full((3,), 16), *counts])
    assert (history.diff(dim=0) < 0).all() and (history[-1] == 0).all()
    assert decoded.tokens.min() >= 0 and decoded.tokens.max() < SPEC.size


def test_filled_tokens_stay() -> None:
    condition, null = make_condition(2)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    Confidence(8).decode(
        make_network(), condition, null, Noise(0, torch.arange(2)), Guidance(1.0),
        on_step=lambda step: seen.append((step.tokens.clone(), step.masked.clone())),
    )  # fmt: skip
    for (tokens, masked), (later, _) in zip(seen, seen[1:]):
        assert torch.equal(tokens[~masked], later[~masked])


def test_scale_one_evaluates_no_unconditional_rows_and_an_interval_skips_them() -> None:
    condition, null = make_condition(2)
    plain = Watched(make_network())
    decoded = Confidence(4).decode(plain, condition, null, Noise(0, torch.arange(2)), Guidance(1.0))
    assert plain.rows == [2] * 4 and decoded.rows == 4 and plain.prepared == 1
    part = Watched(make_network())
    decoded = Confidence(4).decode(part, condition, null, Noise(0, torch.arange(2)), Guidance(3.0, start=0.5))
    assert part.rows == [2, 2, 4, 4] and decoded.rows == 6


def test_guidance_is_linear_in_the_logits() -> None:
    network = make_network()
    condition, null = make_condition(2)
    state = TokenState(torch.zeros(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.bool))
    c = network(state, network.prepare(condition)).logits
    u = network(state, network.prepare(null)).logits
    from nar_t2i.inference.guided import GuidedNetwork

    guided = GuidedNetwork(network, condition, null, Guidance(4.0))(state, 0.0).logits
    torch.testing.assert_close(guided, u + 4 * (c - u), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(guided, c, atol=1e-2)


@pytest.mark.parametrize("strategy", [Confidence(6), OneStep(), Confidence(5, "linear", 0.8, 1.0)])
def test_known_tokens_never_change_and_only_unknown_ones_count(strategy: Confidence) -> None:
    condition, null = make_condition(3)
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.3], [0.9], [1.0]])
    tokens = torch.randint(SPEC.size, (3, 16), generator=torch.Generator().manual_seed(1))
    steps = []
    decoded = strategy.decode(
        make_network(), condition, null, Noise(0, torch.arange(3)), Guidance(2.0), Known(mask, tokens), steps.append
    )
    assert torch.equal(decoded.tokens[mask], tokens[mask])
    assert all(torch.equal(step.tokens[mask], tokens[mask]) for step in steps)
    assert not steps[-1].masked.any()
    assert (decoded.tokens[0][~mask[0]] != 0).any()


def test_same_tokens_alone_and_in_a_batch_in_float64() -> None:
    network = make_network(torch.float64)
    condition, null = make_condition(7, torch.float64)
    noise = Noise(0, torch.arange(7), torch.float64)
    together = Confidence(8).decode(network, condition, null, noise, Guidance(3.0)).tokens
    for row in range(7):
        one = [c.map(lambda x, row=row: x[row : row + 1]) for c in (condition, null)]
        alone = Confidence(8).decode(network, *one, Noise(0, torch.tensor([row]), torch.float64), Guidance(3.0)).tokens
        assert torch.equal(alone[0], together[row])


def test_same_tokens_in_float32_wherever_the_margin_is_above_rounding() -> None:
    """A draw is decided by a uniform number between cumulated probabilities, a choice by the order of confidences."""
    network = make_network()
    condition, _ = make_condition(7)
    noise = Noise(0, torch.arange(7))
    slots = torch.arange(16).expand(7, 16)
    state = TokenState(torch.zeros(7, 16, dtype=torch.long), torch.ones(7, 16, dtype=torch.bool))
    logits = network(state, network.prepare(condition), slots).logits
    drawn = noise.at(0, slots).uniform("value").unsqueeze(-1)
    margin = (logits.softmax(-1).cumsum(-1) - drawn).abs().min(dim=-1).values
    together = network(state, network.prepare(condition), slots).sample(noise.at(0, slots)).values
    for row in range(7):
        one = condition.map(lambda x, row=row: x[row : row + 1])
        alone = network(TokenState(state.values[:1], state.masked[:1]), network.prepare(one), slots[:1])
        values = alone.sample(Noise(0, torch.tensor([row])).at(0, slots[:1])).values[0]
        safe = margin[row] > 1e-5
        assert safe.float().mean() > 0.9
        assert torch.equal(values[safe], together[row][safe])


def test_a_network_that_knows_the_answer_is_believed() -> None:
    answer = torch.randint(SPEC.size, (2, 16), generator=torch.Generator().manual_seed(5))

    class Oracle(TokenNetwork):
        spec = SPEC

        def prepare(self, condition):
            return None

        def forward(self, state, prepared, read=None, cache=None):
            from nar_t2i.networks.predictions import Categorical

            rows = answer.repeat(len(state.values) // 2, 1).gather(1, read)
            return Categorical(40.0 * torch.nn.functional.one_hot(rows, SPEC.size))

    condition, null = make_condition(2)
    for strategy in (Confidence(4), OneStep()):
        decoded = strategy.decode(Oracle(), condition, null, Noise(0, torch.arange(2)), Guidance(2.0))
        assert torch.equal(decoded.tokens, answer)
