"""Schedules that both learning and inference need: mask ratios and guidance.

A mask-ratio schedule maps t in [0, 1] to the share of tokens that is masked: 1 at t = 0, 0 at t = 1. Training draws
t uniformly (MaskGIT, arXiv 2202.04200, section 3.1); decoding walks t from 0 to 1. A mask-ratio distribution is one that
training alone can draw from: it need not reach 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nar_t2i.errors import UserError

MASK_SCHEDULES = {
    "cosine": lambda t: torch.cos(t * (math.pi / 2)),
    "linear": lambda t: 1 - t,
    "square": lambda t: 1 - t**2,
    "arccos": lambda t: torch.arccos(t) / (math.pi / 2),
    "exponential": lambda t: torch.expm1(-5 * (1 - t)) / math.expm1(-5),  # eMIGM, arXiv 2503.07197, scaled to reach 1
}
MaskSchedule = Literal["cosine", "linear", "square", "arccos", "exponential"]


@dataclass(frozen=True)
class TruncatedGaussian:
    """Mask ratios of a normal distribution, cut off (MAGE, arXiv 2211.09117: mean 0.55, deviation 0.25, from 0.5 to 1;
    MAR, arXiv 2406.11838: 1, 0.25, from 0.7 to 1)."""

    mean: float = 0.55
    deviation: float = 0.25
    low: float = 0.5
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high <= 1 and self.deviation > 0):
            raise UserError(f"{self}: needs 0 <= low < high <= 1 and a deviation above 0")
        if not self.low - 7 * self.deviation <= self.mean <= self.high + 7 * self.deviation:
            raise UserError(
                f"{self}: the mean lies more than 7 deviations outside, where next to nothing of the distribution is left"
            )

    def ratio(self, t: Tensor) -> Tensor:
        """The inverse of the distribution function at 1 − t, in double precision."""
        low, high = (0.5 * (1 + math.erf((x - self.mean) / self.deviation / math.sqrt(2))) for x in (self.low, self.high))
        area = high - (high - low) * t.double()
        drawn = self.mean + self.deviation * math.sqrt(2) * torch.erfinv(2 * area - 1)
        return drawn.clamp(self.low, self.high).to(t.dtype)


@dataclass(frozen=True)
class FixedRatio:
    """The same share of every image, as masked autoencoders and BERT have it (0.15 in BERT's case)."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"FixedRatio: the share must be above 0, to 1, not {self.share}")

    def ratio(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.share)


def mask_ratio(schedule: MaskSchedule | TruncatedGaussian | FixedRatio, t: Tensor) -> Tensor:
    """The masked share at time t in [0, 1]. Drawn at uniform t, "linear" gives uniform mask ratios."""
    if not isinstance(schedule, str):
        return schedule.ratio(t)
    if schedule not in MASK_SCHEDULES:
        raise UserError(f"schedule {schedule!r} is none of {', '.join(MASK_SCHEDULES)}")
    return MASK_SCHEDULES[schedule](t)


def masked_counts(schedule: MaskSchedule, steps: int, unknown: Tensor) -> list[Tensor]:
    """How many tokens stay masked after each of `steps` decoding steps.

    unknown: (B,) tokens to fill. Returns `steps` tensors (B,): strictly falling while tokens remain, the last 0; so
    every step fills at least one token and no step is idle unless there are more steps than tokens.
    """
    counts, left = [], unknown
    for step in range(1, steps + 1):
        ratio = mask_ratio(schedule, torch.tensor(step / steps, dtype=torch.float64)).item()
        wanted = torch.floor(unknown.double() * ratio + 1e-9).long()
        left = torch.minimum(wanted, left - 1).clamp(min=0) if step < steps else torch.zeros_like(unknown)
        counts.append(left)
    return counts


RAMPS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance `u + s·(c − u)`.

    scale: s; 1 is the conditional model and evaluates no unconditional rows.
    start, stop: the part of decoding, 0 to 1, inside of which guidance acts; outside, no unconditional rows are evaluated.
    ramp: how s grows from 1 to `scale` over decoding. Where there is only one pass, it has all of `scale`.
    """

    scale: float = 3.0
    start: float = 0.0
    stop: float = 1.0
    ramp: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"guidance scale must be a finite number, not {self.scale}")
        if not 0 <= self.start <= self.stop <= 1:
            raise UserError(f"guidance acts from a start to a stop, 0 to 1 of decoding, not from {self.start} to {self.stop}")
        if self.ramp not in RAMPS:
            raise UserError(f"guidance ramp {self.ramp!r} is none of {', '.join(RAMPS)}")

    def at(self, progress: float | None) -> float:
        """s at a point of decoding: see `pass_progress`."""
        if progress is None:
            return self.scale
        if self.scale == 1 or not self.start <= progress <= self.stop:
            return 1.0
        return 1 + (self.scale - 1) * RAMPS[self.ramp](progress)


def pass_progress(step: int, steps: int) -> float | None:
    """0 at the first of several passes, 1 at the last, None where there is only one."""
    return step / (steps - 1) if steps > 1 else None
