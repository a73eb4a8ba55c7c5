"""Coarse to fine: a network learns to fill tokens stage by stage (progressive text-to-image, arXiv 2210.02291)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.learning.replaced import random_values
from nar_t2i.learning.terms import slot_nll, term
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.types import LearningStrategy, Term, TokenBatch, TokenNetwork, TokenState


def stage_of(scores: Tensor, stages: int) -> Tensor:
    """(B, N) scores → (B, N) stages from 0, each of as many slots as any other, give or take one; low scores first, and of
    equal ones (patches of a plain background) those that stand first."""
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (rank * stages).div(scores.shape[1], rounding_mode="floor")


@part
class Progressive(LearningStrategy):
    """The slots are sorted by their quantisation error into stages; a stage is predicted from the ones before it.

    Of each image one stage is drawn, each as likely as any: those before it are in sight, and it and all later ones are
    hidden. stages: 2 or more. first: whether slots of "low" error come first (what the codebook says well: our reading of
    "coarse to fine", on which the paper is silent) or of "high". revise: the share of the tokens in sight that are
    replaced by random ones; the loss counts these slots too, so that early errors are learned to be mended.
    label_smoothing: see `slot_nll`. Needs quantisation errors: images, or a token cache made with --errors.
    """

    reads_errors = True

    def __init__(self, stages: int = 4, first: Literal["low", "high"] = "low", revise: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        if stages < 2 or not (0 <= revise <= 1 and 0 <= label_smoothing < 1):
            raise UserError(f"Progressive: stages {stages} must be at least 2, revise {revise} and label_smoothing "
                            f"{label_smoothing} 0 to 1")  # fmt: skip
        self.stages, self.first, self.revise, self.label_smoothing = stages, first, revise, label_smoothing

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        if batch.error is None:
            raise UserError("Progressive sorts tokens by their quantisation error, and this tokenizer gives none")
        if self.stages > network.spec.length:
            raise UserError(f"Progressive: {self.stages} stages of {network.spec.length} tokens leave some empty")
        stages = stage_of(batch.error if self.first == "low" else -batch.error, self.stages)
        drawn = noise.integers("stage", self.stages)[:, None]
        masked = stages >= drawn
        wrong = ~masked & (noise.uniform("revise", shape=(network.spec.length,)) < self.revise)
        values = batch.tokens
        if self.revise:
            shown = wrong.view(*wrong.shape, *[1] * len(network.spec.value_shape))
            values = torch.where(shown, random_values(noise, network.spec, "revision"), values)
        read = (stages == drawn) | wrong
        draws = noise.at(0, read)
        prediction = network(TokenState(values, masked), network.prepare(batch.condition), read=draws.places)
        found = slot_nll(prediction, draws.of(batch.tokens), draws, self.label_smoothing)
        nll = torch.zeros(read.shape, device=read.device, dtype=found.dtype).index_put((draws.rows, draws.positions), found)
        return {"loss": term(nll.sum(1) / read.sum(1))}
