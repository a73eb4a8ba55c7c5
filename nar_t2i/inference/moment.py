"""Slots are chosen first and their tokens drawn afterwards (moment sampler, arXiv 2510.04525)."""

from __future__ import annotations

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.inference.scheduled import Scheduled
from nar_t2i.networks.predictions import Categorical
from nar_t2i.noise import SlotNoise, gumbel
from nar_t2i.parts import part
from nar_t2i.schedules import MaskSchedule
from nar_t2i.types import Prediction, Sampled


@part
class Moment(Scheduled):
    """What Confidence does in the limit of many tokens, at temperature 1, without its draws that are thrown away.

    Slots are drawn without replacement in proportion to Σ p^β, and their tokens in proportion to p^β, with
    β = 1 + 1 / choice_temperature, which falls as Confidence's does: both are sharp at the end. In the last pass, where
    Confidence has nothing to choose and draws from p, tokens stay as sharp as in the one before; another temperature sharpens
    tokens, not slots (both our choice).
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
        if not choice_temperature > 0:
            raise UserError(f"Moment: choice_temperature must be above 0, not {choice_temperature}")
        self.choice_temperature = choice_temperature

    def exponent(self, step: int) -> float:
        """β; at the last step, where nothing is left to choose, that of the step before it."""
        return 1 + 1 / (self.choice_temperature * max(1 - (step + 1) / self.steps, 1 / self.steps))

    def draw(self, prediction: Prediction, draws: SlotNoise, step: int) -> Sampled:
        return prediction.sample(draws, self.temperature_at(step) / self.exponent(step), **self.truncation)

    def score(self, prediction: Prediction, sampled: Sampled, draws: SlotNoise, step: int) -> Tensor:
        if not isinstance(prediction, Categorical):
            raise UserError("Moment needs tokens that are codes; this network predicts others")
        moment = torch.logsumexp(self.exponent(step) * prediction.logits.log_softmax(dim=-1), dim=-1)
        return moment + gumbel(draws.uniform("choice"))
