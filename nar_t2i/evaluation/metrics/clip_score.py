"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from nar_t2i.evaluation.metrics.metric import Compared, Metric


@dataclass(frozen=True)
class ClipScore(Metric):
    """The mean of 100 · max(cos, 0), as most papers have it; Hessel's own factor is 2.5 in place of 100, and torchmetrics clamps
    the mean, not each cosine."""

    name: ClassVar[str] = "clip_score"
    features: ClassVar[str] = "clip"
    about: ClassVar[str] = "mean of 100 · max(cosine of the drawn picture's and its caption's CLIP embeddings, 0)"
    needs_real: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = True

    def numbers(self, found: Compared) -> dict[str, float]:
        scores = 100 * F.cosine_similarity(found.drawn.double(), found.texts.double(), dim=1).clamp(min=0)
        return {"value": float(scores.mean()), "standard_error": float(scores.std()) / math.sqrt(len(scores))}
