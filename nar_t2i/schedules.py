"""Schedules that both learning and inference need: mask ratios and guidance.

A mask-ratio schedule maps t in [0, 1] to the share of tokens that is masked: 1 at t = 0, 0 at t = 1. Training draws
t uniformly (MaskGIT, arXiv 2202.04200, section 3.1); decoding walks t from 0 to 1.
"""

from __future__ import annotations

import math
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
}
MaskSchedule = Literal["cosine", "linear", "square", "arccos"]


def mask_ratio(schedule: MaskSchedule, t: Tensor) -> Tensor:
    """The masked share at time t in [0, 1]. Drawn at uniform t, "linear" gives uniform mask ratios."""
    return MASK_SCHEDULES[schedule](t)


def masked_counts(schedule: MaskSchedule, steps: int, unknown: Tensor) -> list[Tensor]:
    """How many tokens stay masked after each of `steps` decoding steps.

    unknown: (B,) tokens to fill. Returns `steps` tensors (B,): strictly falling while tokens remain, the last 0; so
    every step fills at least one token and no step is idle unless there are more steps than tokens.
    """
    counts, left = [], unknown
    for step in range(1, steps + 1):
        ratio = mask_ratio(schedule, torch.tensor(step / steps, dtype=torch.float64)).item()
        wanted = torch.floor(unknown * ratio + 1e-9).long()
        left = torch.minimum(wanted, left - 1).clamp(min=0) if step < steps else torch.zeros_like(unknown)
        counts.append(left)
    return counts


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance `u + s·(c − u)`.

    scale: s; 1 is the conditional model and evaluates no unconditional rows.
    start, stop: the part of decoding, 0 to 1, inside of which guidance acts; outside, no unconditional rows are evaluated.
    ramp: how s grows from 1 to `scale` over decoding.
    """

    scale: float = 3.0
    start: float = 0.0
    stop: float = 1.0
    ramp: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"guidance scale must be a finite number, not {self.scale}")

    def at(self, progress: float) -> float:
        """s at a point of decoding, 0 = first step, 1 = last step."""
        if self.scale == 1 or not self.start <= progress <= self.stop:
            return 1.0
        weight = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[self.ramp]
        return 1 + (self.scale - 1) * weight
