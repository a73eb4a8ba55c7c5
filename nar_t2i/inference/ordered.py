"""Decoding in an order that no prediction changes: what such strategies share, and an order at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.inference.scheduled import Scheduled, a_row, fill, lowest_first, to_fill
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance, pass_progress
from nar_t2i.types import Condition, Decoded, Known, Step, TokenNetwork, TokenSpec, TokenState


class Ordered(Scheduled):
    """A subclass gives the order. Only the slots that a pass fills are predicted. The rest: see Scheduled."""

    def order(self, spec: TokenSpec, noise: Noise) -> Tensor:
        """(B, N) numbers, all different in a row: slots of small ones come first."""
        raise NotImplementedError

    def _decode(
        self,
        network: TokenNetwork,
        condition: Condition,
        null: Condition,
        noise: Noise,
        guidance: Guidance,
        known: Known | None,
        on_step: Callable[[Step], None] | None,
    ) -> Decoded:
        guided = GuidedNetwork(network, condition, null, guidance)
        tokens, masked = start_state(network.spec, len(noise.ids), noise.ids.device, known)
        unknown = to_fill(masked, known)
        order = lowest_first(self.order(network.spec, noise))
        # Given slots come last, and rows with fewer unknown ones read some of these along.
        queue = (order + masked.logical_not() * network.spec.length).argsort(dim=1)
        total = unknown
        for step, left in enumerate(self.counts(unknown)):
            if int(unknown.max()) == 0:
                break
            start, end = (int(x) for x in ((total - unknown).min(), (total - left).max()))
            slots = queue[:, start:end]
            prediction = guided(TokenState(tokens, masked), pass_progress(step, self.steps), slots)
            sampled = self.draw(prediction, noise.at(step, slots), step)
            place = torch.arange(start, end, device=slots.device)
            filled = (place >= a_row(total - unknown, known, slots.device)) & (place < a_row(total - left, known, slots.device))
            tokens, masked = fill(tokens, masked, slots, sampled.values, filled.expand_as(slots))
            unknown = left
            if on_step:
                on_step(Step(step, tokens, masked))
        return Decoded(tokens, guided.passes, guided.rows)


@part
class RandomOrder(Ordered):
    """Each image in a random order of its own: the baseline that shows what confidence is worth."""

    def order(self, spec: TokenSpec, noise: Noise) -> Tensor:
        return noise.uniform("order", shape=(spec.length,))
