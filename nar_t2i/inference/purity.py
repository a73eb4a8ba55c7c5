"""Decoding by purity (Improved VQ-Diffusion, arXiv 2205.16007, section 3.3)."""

from __future__ import annotations

from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.inference.scheduled import Scheduled
from nar_t2i.networks.predictions import Categorical
from nar_t2i.noise import SlotNoise, gumbel
from nar_t2i.parts import part
from nar_t2i.schedules import MaskSchedule
from nar_t2i.types import Prediction, Sampled


@part
class Purity(Scheduled):
    """Where one code stands out, a token is drawn sooner, and more sharply.

    Purity is the probability of a slot's likeliest code. Slots are drawn without replacement in proportion to it, and
    tokens in proportion to p^(1 + sharpness · purity). The rest: see Scheduled.
    """

    def __init__(
        self,
        steps: int = 16,
        schedule: MaskSchedule = "linear",
        temperature: float = 1.0,
        sharpness: float = 1.0,
        final_temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        super().__init__(steps, schedule, temperature, final_temperature, top_k, top_p)
        if not sharpness >= 0:
            raise UserError(f"sharpness must be at least 0, not {sharpness}")
        self.sharpness = sharpness

    def draw(self, prediction: Prediction, draws: SlotNoise, step: int) -> Sampled:
        temperature = self.temperature_at(step)
        if temperature == 0:
            return prediction.sample(draws, 0.0)
        sharper = 1 + self.sharpness * purity(prediction)
        return prediction.sample(draws, temperature / sharper.unsqueeze(-1), **self.truncation)

    def score(self, prediction: Prediction, sampled: Sampled, draws: SlotNoise, step: int) -> Tensor:
        # The largest of log-weights with Gumbel noise are a draw without replacement.
        return purity(prediction).log() + gumbel(draws.uniform("choice"))


def purity(prediction: Prediction) -> Tensor:
    """(*slots) the probability of the likeliest code."""
    if not isinstance(prediction, Categorical):
        raise UserError("Purity needs tokens that are codes; this network predicts others")
    return prediction.logits.softmax(dim=-1).amax(dim=-1)
