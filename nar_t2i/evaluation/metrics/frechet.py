"""Fréchet distances: FID (Heusel et al. 2017, arXiv 1706.08500), and the same distance over features of scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nar_t2i.evaluation.metrics.metric import Compared, Metric, blocks


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) → mean (D,) and covariance (D, D) with n − 1 below the line, in float64."""
    mean = sum(part.sum(0) for part in blocks(features)) / len(features)
    covariance = sum((part - mean).T @ (part - mean) for part in blocks(features)) / (len(features) - 1)
    return mean, covariance


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """The squared 2-Wasserstein distance of two Gaussians, |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

    With Σ = RᵀR the trace of the root is the sum of the singular values of R₁R₂ᵀ, which rounding spoils far less than the
    roots of the eigenvalues of Σ₁Σ₂, as torchmetrics takes them: of 300 samples of 512 features and themselves those give −1e-5,
    and this 0.
    """
    across = torch.linalg.svdvals(_root(covariance1) @ _root(covariance2).T).sum()
    value = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * across
    return max(float(value), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """R with RᵀR = Σ."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


@dataclass(frozen=True)
class Fid(Metric):
    """The Fréchet distance of Inception features. Compares with numbers of the same weights, resize and sample count only: it
    falls with more samples (Chong & Forsyth 2020, arXiv 1911.07023)."""

    name: ClassVar[str] = "fid"
    features: ClassVar[str] = "inception"
    about: ClassVar[str] = "Fréchet distance of Gaussians fitted to the features of drawn and of real pictures"

    def numbers(self, found: Compared) -> dict[str, float]:
        return {"value": frechet_distance(*moments(found.drawn), *moments(found.real))}


@dataclass(frozen=True)
class SceneFrechet(Fid):
    """The Fréchet distance of `nar_t2i.evaluation.scene_features`. It is not FID, and compares with nothing but itself."""

    name: ClassVar[str] = "scene_frechet"
    features: ClassVar[str] = "scene"
    about: ClassVar[str] = (
        "NOT FID: the Fréchet distance of the features of a small network that was trained on rendered scenes; compares with "
        "nothing but scene_frechet by the same weights"
    )
