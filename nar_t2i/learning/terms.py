"""What learning strategies share: which slots are hidden, and what a loss is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.networks.predictions import Categorical
from nar_t2i.noise import Noise, SlotNoise
from nar_t2i.schedules import FixedRatio, MaskSchedule, TruncatedGaussian, mask_ratio
from nar_t2i.types import Prediction, Term, grid_places


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
    places = grid_places(shape, center.device)
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
    return Term(
        per_image.sum(), torch.full((), len(per_image), device=per_image.device)
    )  # filled there: a copy would be waited for
