"""Masked token modelling (MaskGIT, arXiv 2202.04200; Emage's first pass): hide some tokens, predict them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.networks.predictions import Categorical
from nar_t2i.noise import Noise, SlotNoise
from nar_t2i.parts import part
from nar_t2i.schedules import FixedRatio, MaskSchedule, TruncatedGaussian, mask_ratio
from nar_t2i.types import LearningStrategy, Prediction, Term, TokenBatch, TokenNetwork, TokenSpec, TokenState


def draw_masks(
    noise: Noise,
    schedule: MaskSchedule | TruncatedGaussian | FixedRatio,
    shape: tuple[int, ...],
    ceiling: float = 1.0,
    regions: float = 0.0,
    everything: float = 0.0,
    step: int = 0,
    among: Tensor | None = None,
) -> Tensor:
    """(B, N), True = masked, for tokens laid out as `shape`. The masked count is the schedule's ratio at a uniform time,
    times `ceiling`; at least one. See Masked for `regions` and `everything`. step: another one draws anew. among: (B, N),
    the slots that may be masked, of which the ratio is; None = all."""
    length = math.prod(shape)
    most = ceiling * (length if among is None else among.sum(1))
    count = mask_ratio(schedule, noise.uniform("mask ratio", step)) * most
    if everything:
        count = count.where(noise.uniform("mask everything", step) >= everything, most)
    order = noise.uniform("mask positions", step, (length,))
    if regions:
        inside = distances(noise.uniform("mask center", step, (len(shape),)), shape) + order / 2
        order = order.where((noise.uniform("mask region", step) >= regions)[:, None], inside)
    if among is not None:
        order = order.masked_fill(~among, math.inf)
    rank = order.argsort(dim=1).argsort(dim=1)
    return rank < count.round().clamp(min=1)[:, None]


def distances(center: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, N) distances, in slots, of all slots from a point. center: (B, dimensions), 0 to 1 along each."""
    places = torch.cartesian_prod(*(torch.arange(n, device=center.device) for n in shape)).view(-1, len(shape))
    size = places[-1] + 1
    return (places - (center * size - 0.5)[:, None]).square().sum(-1).sqrt()


def image_means(values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """(B,) means over each image's slots. values, rows: (R,), one a slot, and of which image it is. counts: (B,) slots of each."""
    return torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add(0, rows, values) / counts


def slot_nll(prediction: Prediction, target: Tensor, noise: SlotNoise, label_smoothing: float) -> Tensor:
    """(*slots) nll; smoothed, that of a target that is spread evenly over all codes by that share (Szegedy et al. 2016)."""
    nll = prediction.nll(target, noise)
    if not label_smoothing:
        return nll
    if not isinstance(prediction, Categorical):
        raise UserError("label_smoothing needs tokens that are codes; this network predicts others")
    spread = -prediction.logits.log_softmax(dim=-1).mean(dim=-1)
    return (1 - label_smoothing) * nll + label_smoothing * spread


def term(per_image: Tensor) -> Term:
    """(B,) losses, one an image."""
    return Term(per_image.sum(), torch.full((), len(per_image), device=per_image.device))  # filled there: a copy would be waited for


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
