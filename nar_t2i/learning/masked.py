"""Masked token modelling (MaskGIT, arXiv 2202.04200; Emage's first pass): hide some tokens, predict them."""

from __future__ import annotations

from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.learning.terms import draw_masks, image_means, slot_nll, term
from nar_t2i.noise import Noise, SlotNoise
from nar_t2i.parts import part
from nar_t2i.schedules import FixedRatio, MaskSchedule, TruncatedGaussian
from nar_t2i.types import LearningStrategy, Prediction, Term, TokenBatch, TokenNetwork, TokenSpec, TokenState


@part
class Masked(LearningStrategy):
    """Cross-entropy at masked slots. schedule: of the mask ratio. The head is evaluated at masked slots alone.

    curriculum: the share of training during which the largest mask ratio grows, linearly from `first_ceiling` to 1. With
    most tokens in sight, what the codes mean is learned sooner (our choice); 0 = the whole range from the start.
    regions: the share of images whose masked slots are those nearest to a random point instead of scattered ones. What
    stood there is then gone as a whole, and only the text tells. everything: the share of images that are masked as far
    as the ceiling allows, as they are when decoding begins. Both are our choice. label_smoothing: see `slot_nll`.
    """

    def __init__(
        self,
        schedule: MaskSchedule | TruncatedGaussian | FixedRatio = "cosine",
        curriculum: float = 0.0,
        first_ceiling: float = 0.4,
        regions: float = 0.0,
        everything: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        if not (0 <= curriculum <= 1 and 0 < first_ceiling <= 1):
            raise UserError(f"Masked: curriculum {curriculum} must be 0 to 1, first_ceiling {first_ceiling} above 0, to 1")
        if not (0 <= regions <= 1 and 0 <= everything <= 1 and 0 <= label_smoothing < 1):
            raise UserError(f"Masked: the shares regions {regions}, everything {everything} and label_smoothing "
                            f"{label_smoothing} must be 0 to 1")  # fmt: skip
        self.schedule, self.curriculum, self.first_ceiling = schedule, curriculum, first_ceiling
        self.regions, self.everything, self.label_smoothing = regions, everything, label_smoothing

    def ceiling(self, progress: float) -> float:
        """The largest mask ratio at a time of training, 0 to 1."""
        if progress >= self.curriculum:
            return 1.0
        return self.first_ceiling + (1 - self.first_ceiling) * progress / self.curriculum

    def masks(self, noise: Noise, spec: TokenSpec, progress: float) -> Tensor:
        """(B, N), True = hidden."""
        return draw_masks(noise, self.schedule, spec.shape, self.ceiling(progress), self.regions, self.everything)

    def nll(self, prediction: Prediction, target: Tensor, noise: SlotNoise) -> Tensor:
        return slot_nll(prediction, target, noise, self.label_smoothing)

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        masked = self.masks(noise, network.spec, progress)
        state = TokenState(batch.tokens, masked)
        draws = noise.at(0, masked)
        prediction = network(state, network.prepare(batch.condition), read=draws.places)
        return {"loss": term(image_means(self.nll(prediction, draws.of(batch.tokens), draws), draws.rows, masked.sum(1)))}
