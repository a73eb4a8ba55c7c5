"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.evaluation.metrics.metric import Compared, Metric, blocks, squared_distances


def radii(features: Tensor, neighbours: int) -> Tensor:
    """(n, D) → (n,): the squared distance of each sample to its k-th nearest other one."""
    everything = features.double()
    rows = [squared_distances(part, everything).kthvalue(neighbours + 1, dim=1).values for part in blocks(features)]
    return torch.cat(rows)


def covered(samples: Tensor, others: Tensor, reach: Tensor) -> float:
    """The share of `samples` that lie within `reach` of at least one of the `others`."""
    everything = others.double()
    inside = [(squared_distances(part, everything) <= reach[None]).any(1) for part in blocks(samples)]
    return float(torch.cat(inside).double().mean())


@dataclass(frozen=True)
class PrecisionRecall(Metric):
    """Precision: drawn pictures that lie among the real ones; recall: the other way round. neighbours: k, 3 in the paper, whose
    features are VGG-16's and whose sets are 50,000 pictures each."""

    neighbours: int = 3
    name: ClassVar[str] = "precision_recall"
    features: ClassVar[str] = "inception"
    about: ClassVar[str] = "shares of the samples within the distance of the k-th nearest neighbour of a sample of the other kind"

    def check(self, drawn: int, real: int | None) -> None:
        super().check(drawn, real)
        if not 1 <= self.neighbours < min(drawn, real):
            raise UserError(
                f"precision_recall: {self.neighbours} neighbours need more than the {min(drawn, real)} samples that there are"
            )

    def numbers(self, found: Compared) -> dict[str, float]:
        return {
            "precision": covered(found.drawn, found.real, radii(found.real, self.neighbours)),
            "recall": covered(found.real, found.drawn, radii(found.drawn, self.neighbours)),
        }
