"""Masked token modelling (MaskGIT, arXiv 2202.04200; Emage's first pass): hide some tokens, predict them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import MaskSchedule, mask_ratio
from nar_t2i.types import LearningStrategy, Term, TokenBatch, TokenNetwork, TokenState


def draw_masks(
    noise: Noise,
    schedule: MaskSchedule,
    shape: tuple[int, ...],
    ceiling: float = 1.0,
    regions: float = 0.0,
    everything: float = 0.0,
) -> Tensor:
    """(B, N), True = masked, for tokens laid out as `shape`. The masked count is the schedule's ratio at a uniform time,
    times `ceiling`; at least one. See Masked for `regions` and `everything`."""
    length = math.prod(shape)
    count = ceiling * mask_ratio(schedule, noise.uniform("mask ratio")) * length
    if everything:
        count = count.where(noise.uniform("mask everything") >= everything, ceiling * length)
    order = noise.uniform("mask positions", shape=(length,))
    if regions:
        inside = distances(noise.uniform("mask center", shape=(len(shape),)), shape) + order / 2
        order = order.where((noise.uniform("mask region") >= regions)[:, None], inside)
    rank = order.argsort(dim=1).argsort(dim=1)
    return rank < count.round().clamp(min=1)[:, None]


def distances(center: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, N) distances, in slots, of all slots from a point. center: (B, dimensions), 0 to 1 along each."""
    size = torch.tensor(shape, device=center.device)
    places = torch.cartesian_prod(*(torch.arange(n, device=center.device) for n in shape)).view(-1, len(shape))
    return (places - (center * size - 0.5)[:, None]).square().sum(-1).sqrt()


def image_means(values: Tensor, masked: Tensor) -> Tensor:
    """(B,) means over each image's masked slots. values: (R,), those of the True slots of `masked`, in row order."""
    rows = masked.nonzero()[:, 0]
    sums = torch.zeros(len(masked), dtype=values.dtype, device=values.device).index_add(0, rows, values)
    return sums / masked.sum(1)


@part
class Masked(LearningStrategy):
    """Cross-entropy at masked slots. schedule: of the mask ratio. The head is evaluated at masked slots alone.

    curriculum: the share of training during which the largest mask ratio grows, linearly from `first_ceiling` to 1. With
    most tokens in sight, what the codes mean is learned sooner (our choice); 0 = the whole range from the start.
    regions: the share of images whose masked slots are those nearest to a random point instead of scattered ones. What
    stood there is then gone as a whole, and only the text tells. everything: the share of images that are masked as far
    as the ceiling allows, as they are when decoding begins. Both are our choice.
    """

    def __init__(
        self,
        schedule: MaskSchedule = "cosine",
        curriculum: float = 0.0,
        first_ceiling: float = 0.4,
        regions: float = 0.0,
        everything: float = 0.0,
    ):
        super().__init__()
        if not (0 <= curriculum <= 1 and 0 < first_ceiling <= 1):
            raise UserError(f"Masked: curriculum {curriculum} must be 0 to 1, first_ceiling {first_ceiling} above 0, to 1")
        if not (0 <= regions <= 1 and 0 <= everything <= 1):
            raise UserError(f"Masked: the shares regions {regions} and everything {everything} must be 0 to 1")
        self.schedule, self.curriculum, self.first_ceiling = schedule, curriculum, first_ceiling
        self.regions, self.everything = regions, everything

    def ceiling(self, progress: float) -> float:
        """The largest mask ratio at a time of training, 0 to 1."""
        if progress >= self.curriculum:
            return 1.0
        return self.first_ceiling + (1 - self.first_ceiling) * progress / self.curriculum

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        masked = draw_masks(
            noise, self.schedule, network.spec.shape, self.ceiling(progress), self.regions, self.everything
        )
        state = TokenState(batch.tokens, masked)
        prediction = network(state, network.prepare(batch.condition), read=masked)
        nll = prediction.nll(batch.tokens[masked], noise.at(0, masked))
        per_image = image_means(nll, masked)
        count = torch.tensor(len(per_image), device=nll.device)
        return {"loss": Term(per_image.sum(), count)}
