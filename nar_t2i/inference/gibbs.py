"""Sweeps that draw tokens anew (generative masked language models, arXiv 2407.21046, with blocks of k tokens)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nar_t2i.errors import UserError
from nar_t2i.inference.confidence import Confidence
from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.inference.scheduled import fill
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance
from nar_t2i.types import Condition, Decoded, InferenceStrategy, Known, Step, TokenNetwork, TokenState


@part
class GibbsSweeps(InferenceStrategy):
    """Another strategy's tokens, of which each is then drawn again given the others, `sweeps` times, `block` at once.

    A sweep goes over all unknown slots in an order of its own, ⌈N / block⌉ passes. A network gives the marginals of a
    block's tokens, so that with more than one a pass this is the parallel product sampler, not Gibbs sampling of the
    block: its equilibrium is another one than the model's, and further off the larger the blocks are.
    """

    def __init__(self, first: InferenceStrategy = Confidence(), sweeps: int = 1, block: int = 16, temperature: float = 1.0):
        if not (sweeps >= 1 and block >= 1 and temperature >= 0):
            raise UserError(f"GibbsSweeps: sweeps {sweeps} and block {block} must be at least 1, temperature {temperature} 0")
        self.static = first.static
        self.first, self.sweeps, self.block, self.temperature = first, sweeps, block, temperature

    @torch.no_grad()
    def decode(
        self,
        network: TokenNetwork,
        condition: Condition,
        null: Condition,
        noise: Noise,
        guidance: Guidance,
        known: Known | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Decoded:
        drawn = self.first.decode(network, condition, null, noise, guidance, known, on_step)
        guided = GuidedNetwork(network, condition, null, guidance)
        tokens, unknown = drawn.tokens, start_state(network.spec, len(noise.ids), noise.ids.device, known)[1]
        length, step = network.spec.length, drawn.passes
        for sweep in range(self.sweeps):
            order = noise.uniform("gibbs order", sweep, (length,)) + ~unknown  # given slots come last
            queue = order.argsort(dim=1)
            for start in range(0, length if known is None else int(unknown.sum(1).max()), self.block):
                slots = queue[:, start : start + self.block]
                again = unknown.gather(1, slots)
                masked = torch.zeros_like(unknown).scatter(1, slots, again)
                # All but a block is settled: guidance stands where it stands at the end.
                prediction = guided(TokenState(tokens, masked), 1.0, slots)
                draws = noise.at(-1 - sweep * length - start, slots)  # apart from the first strategy's, whatever its passes
                values = prediction.sample(draws, self.temperature).values
                tokens, masked = fill(tokens, masked, slots, values, again)
                if on_step:
                    on_step(Step(step, tokens, masked))
                step += 1
        return Decoded(tokens, drawn.passes + guided.passes, drawn.rows + guided.rows)
