"""Iterative parallel decoding by confidence (MaskGIT, arXiv 2202.04200, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.noise import Noise, gumbel
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance, MaskSchedule, masked_counts
from nar_t2i.types import Condition, Decoded, InferenceStrategy, Known, Step, TokenNetwork, TokenState


def lowest_first(score: Tensor) -> Tensor:
    """(B, M) rank of each entry, 0 = lowest; equal scores in order of place."""
    return score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)


@part
class Confidence(InferenceStrategy):
    """Predict every unknown token, keep the most confident ones, mask the rest again.

    steps: passes. schedule: of the share that stays masked. temperature: of the token draws, 0 = the mode.
    choice_temperature: of the Gumbel noise on confidences, which falls linearly to 0 over the steps (MaskGIT's 4.5).
    Predictions without a log-probability (diffusion heads) are kept in random order.
    """

    def __init__(
        self,
        steps: int = 16,
        schedule: MaskSchedule = "cosine",
        temperature: float = 1.0,
        choice_temperature: float = 4.5,
    ):
        if steps < 1:
            raise UserError(f"steps must be at least 1, not {steps}")
        if not (temperature >= 0 and choice_temperature >= 0):
            raise UserError(f"temperatures must be at least 0, not {temperature} and {choice_temperature}")
        self.steps, self.schedule = steps, schedule
        self.temperature, self.choice_temperature = temperature, choice_temperature

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
        guided = GuidedNetwork(network, condition, null, guidance)
        tokens, masked = start_state(network.spec, len(noise.ids), noise.ids.device, known)
        unknown = torch.full((len(tokens),), network.spec.length) if known is None else masked.sum(1).cpu()
        for step, left in enumerate(masked_counts(self.schedule, self.steps, unknown)):
            most = int(unknown.max())
            if most == 0:
                break
            slots = masked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
            progress = step / max(self.steps - 1, 1)
            prediction = guided(TokenState(tokens, masked), progress, slots)
            draws = noise.at(step, slots)
            sampled = prediction.sample(draws, self.temperature)
            confidence = gumbel(draws.uniform("choice"))
            if sampled.log_prob is not None:
                confidence = sampled.log_prob + self.choice_temperature * (1 - (step + 1) / self.steps) * confidence
            open_slots = masked.gather(1, slots)
            filled = lowest_first(-confidence.masked_fill(~open_slots, float("-inf")))
            filled = (filled < (unknown - left).to(filled.device)[:, None]) & open_slots
            tokens, masked = _fill(tokens, masked, slots, sampled.values, filled)
            unknown = left
            if on_step:
                on_step(Step(step, tokens, masked))
        return Decoded(tokens, guided.passes, guided.rows)


def _fill(tokens: Tensor, masked: Tensor, slots: Tensor, values: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """Write `values` where `filled`, leave every other slot as it is."""
    masked = masked.scatter(1, slots, masked.gather(1, slots) & ~filled)
    place = slots.view(*slots.shape, *[1] * (values.ndim - 2)).expand_as(values)
    keep = filled.view(*filled.shape, *[1] * (values.ndim - 2))
    return tokens.scatter(1, place, torch.where(keep, values, tokens.gather(1, place))), masked
