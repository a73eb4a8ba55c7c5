"""Maximum mean discrepancies (Gretton et al. 2012): KID with a cubic kernel, CMMD with a Gaussian one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.evaluation.metrics.metric import Compared, Metric, blocks, squared_distances

SIGMA, SCALE = 10.0, 1000.0  # of CMMD


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) → (n, m): (a·b / D + 1)³."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) → (n, m): exp(−|a − b|² / 2σ²)."""
    return torch.exp(squared_distances(a, b) / (-2 * SIGMA**2))


def unbiased_mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], paired: bool = False) -> float:
    """The squared MMD by its unbiased estimate, no sample compared with itself; may be negative. paired: the i-th of x depends on
    the i-th of y, so that these are not compared either."""
    n, m = len(x), len(y)
    own = [_total(s, s, kernel) - _diagonal(s, s, kernel) for s in (x, y)]
    cross = (_total(x, y, kernel) - _diagonal(x, y, kernel)) / (n * (n - 1)) if paired else _total(x, y, kernel) / (n * m)
    return own[0] / (n * (n - 1)) + own[1] / (m * (m - 1)) - 2 * cross


def biased_mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The squared MMD of the two samples themselves: 0 where they are the same."""
    n, m = len(x), len(y)
    return _total(x, x, kernel) / n**2 + _total(y, y, kernel) / m**2 - 2 * _total(x, y, kernel) / (n * m)


def _total(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    return sum(float(kernel(a, b).sum()) for a in blocks(x) for b in blocks(y))


def _diagonal(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    pairs = zip(blocks(x, 256), blocks(y, 256), strict=True)
    return sum(float(kernel(a, b).diagonal().sum()) for a, b in pairs)


@dataclass(frozen=True)
class Kid(Metric):
    """KID (Bińkowski et al. 2018, arXiv 1801.01401): of all samples, or the mean over random subsets, as papers have it.

    subsets: how many; 0 takes all samples at once. subset_size: samples of each kind in a subset. seed: of their choice.
    """

    subsets: int = 0
    subset_size: int = 1000
    seed: int = 0
    name: ClassVar[str] = "kid"
    features: ClassVar[str] = "inception"
    about: ClassVar[str] = "squared MMD of the features with the kernel (x·y/D + 1)³, unbiased"

    def check(self, drawn: int, real: int | None) -> None:
        super().check(drawn, real)
        if self.subsets and not 2 <= self.subset_size <= min(drawn, real):
            raise UserError(
                f"kid: subset_size {self.subset_size} must be between 2 and the {min(drawn, real)} samples that there are"
            )

    def numbers(self, found: Compared) -> dict[str, float]:
        if not self.subsets:
            return {"value": unbiased_mmd(found.drawn, found.real, cubic, found.paired)}
        values = []
        for subset in range(self.subsets):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, subset]))
            drawn = torch.from_numpy(rng.permutation(len(found.drawn))[: self.subset_size]).to(found.drawn.device)
            real = drawn
            if not found.paired:
                real = torch.from_numpy(rng.permutation(len(found.real))[: self.subset_size]).to(found.real.device)
            values.append(unbiased_mmd(found.drawn[drawn], found.real[real], cubic, found.paired))
        return {"value": float(np.mean(values)), "deviation": float(np.std(values))}


@dataclass(frozen=True)
class Cmmd(Metric):
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603): numbers of the paper are of CLIP ViT-L/14 at 336 px."""

    name: ClassVar[str] = "cmmd"
    features: ClassVar[str] = "clip"
    about: ClassVar[str] = (
        "1000 × squared MMD of CLIP's image embeddings of unit length, Gaussian kernel of σ = 10, biased estimate"
    )

    def numbers(self, found: Compared) -> dict[str, float]:
        return {"value": max(SCALE * biased_mmd(found.drawn, found.real, gaussian), 0.0)}
