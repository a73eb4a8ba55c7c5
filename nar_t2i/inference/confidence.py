"""Iterative parallel decoding by confidence (MaskGIT, arXiv 2202.04200, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.inference.scheduled import Scheduled
from nar_t2i.noise import SlotNoise, gumbel
from nar_t2i.parts import part
from nar_t2i.schedules import MaskSchedule, mask_ratio
from nar_t2i.types import Prediction, Sampled


@part
class Confidence(Scheduled):
    """Predict every unknown token, keep the most confident ones, mask the rest again.

    choice_temperature: of the Gumbel noise on confidences, which falls linearly to 0 over the steps (MaskGIT's 4.5).
    Predictions without a log-probability (diffusion heads) are kept in random order. The rest: see Scheduled.
    """

    def __init__(
        self,
        steps: int = 16,
        schedule: MaskSchedule = "cosine",
        temperature: float = 1.0,
        choice_temperature: float = 4.5,
        final_temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        super().__init__(steps, schedule, temperature, final_temperature, top_k, top_p)
        if not choice_temperature >= 0:
            raise UserError(f"choice_temperature must be at least 0, not {choice_temperature}")
        self.choice_temperature = choice_temperature

    def score(self, prediction: Prediction, sampled: Sampled, draws: SlotNoise, step: int) -> Tensor:
        luck = gumbel(draws.uniform("choice"))
        if sampled.log_prob is None:
            return luck
        return sampled.log_prob + self.choice_temperature * (1 - (step + 1) / self.steps) * luck


@part
class AmusedConfidence(Confidence):
    """Confidence as aMUSEd decodes (Patil et al., arXiv 2401.01808), to the token as diffusers' AmusedScheduler does.

    choice_temperature: at the first pass, falling linearly to 0 at the last one. The schedule is taken in single precision: of
    12 passes by the cosine, the eighth leaves half of the tokens masked, and rounding takes one of them away.
    """

    def __init__(
        self,
        steps: int = 12,
        schedule: MaskSchedule = "cosine",
        temperature: float = 1.0,
        choice_temperature: float = 2.0,
    ):
        # Confidence's noise falls to 0 with the pass that is done, aMUSEd's with the one that begins, so that it is larger by this
        # factor; the last pass chooses nothing.
        super().__init__(steps, schedule, temperature, choice_temperature * steps / max(steps - 1, 1))

    def passes(self, unknown: int) -> int:
        return self.steps

    def ratios(self) -> Tensor:
        """(steps) float32, on the host: the share that stays masked after each pass."""
        return mask_ratio(self.schedule, torch.arange(1, self.steps + 1) / self.steps)

    def counts(self, unknown: Tensor) -> list[Tensor]:
        left, counts = unknown, []
        for ratio in self.ratios()[:-1]:
            left = torch.minimum(torch.minimum((unknown * ratio).floor().long(), left - 1).clamp(min=1), left)
            counts.append(left)
        return [*counts, torch.zeros_like(unknown)]
