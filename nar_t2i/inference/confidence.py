"""Iterative parallel decoding by confidence (MaskGIT, arXiv 2202.04200, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.inference.scheduled import Scheduled
from nar_t2i.noise import SlotNoise, gumbel
from nar_t2i.parts import part
from nar_t2i.schedules import MaskSchedule
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
