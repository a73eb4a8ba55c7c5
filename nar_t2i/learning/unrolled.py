"""Passes that read what the one before has said: Emage's second forward pass, and any number of them."""

from __future__ import annotations

from typing import Literal

import torch

from nar_t2i.errors import UserError
from nar_t2i.learning.masked import Masked
from nar_t2i.learning.terms import draw_masks, image_means, term
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import FixedRatio, MaskSchedule, TruncatedGaussian
from nar_t2i.types import Term, TokenBatch, TokenNetwork, TokenState, over_values


@part
class Unrolled(Masked):
    """Masked training in `stages` passes (2: Emage, arXiv 2312.14988; any number: PaDIR, arXiv 2407.21046).

    In each later pass the slots that were hidden at first hold what the pass before has drawn for them, and a part of
    them is masked again, by a ratio drawn anew. The network thus meets its own mistakes, as it does when it decodes. No
    gradient flows through the draws. The losses of all passes are added up; `stages` 1 is Masked.

    fill: the draw, "mode" (PaDIR's) or "sample". counted: slots of the later losses: "hidden", those hidden at first,
    where wrong draws that stand in sight are to be mended; or "masked", those masked again alone. The paper of Emage
    is silent about all but the number of passes; what is here is our choice. The rest: see Masked.
    """

    def __init__(
        self,
        stages: int = 2,
        fill: Literal["mode", "sample"] = "sample",
        counted: Literal["hidden", "masked"] = "hidden",
        schedule: MaskSchedule | TruncatedGaussian | FixedRatio = "cosine",
        curriculum: float = 0.0,
        first_ceiling: float = 0.4,
        regions: float = 0.0,
        everything: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(schedule, curriculum, first_ceiling, regions, everything, label_smoothing)
        if stages < 1:
            raise UserError(f"Unrolled: stages must be at least 1, not {stages}")
        self.stages, self.fill, self.counted = stages, fill, counted
        self.passes = stages

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        hidden = masked = self.masks(noise, network.spec, progress)
        values, prepared, terms = batch.tokens, network.prepare(batch.condition), {}
        for stage in range(self.stages):
            if stage:
                masked = draw_masks(noise, self.schedule, network.spec.shape, step=stage, among=hidden)
            read = hidden if self.counted == "hidden" else masked
            draws = noise.at(stage, read)
            prediction = network(TokenState(values, masked), prepared, read=draws.places)
            nll = self.nll(prediction, draws.of(batch.tokens), draws)
            terms[f"loss_{stage + 1}"] = term(image_means(nll, draws.rows, read.sum(1)))
            if stage + 1 < self.stages:
                with torch.no_grad():
                    drawn = prediction.sample(draws, 0.0 if self.fill == "mode" else 1.0).values
                values = values.masked_scatter(over_values(read, values), drawn)
        total = sum(value.total for value in terms.values())
        return {"loss": Term(total, terms["loss_1"].weight), **(terms if self.stages > 1 else {})}
