"""Masked training in which a network sees what it guessed a pass before (self-conditioning, arXiv 2208.04202)."""

from __future__ import annotations

import torch

from nar_t2i.errors import UserError
from nar_t2i.learning.masked import Masked
from nar_t2i.learning.terms import image_means, term
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import FixedRatio, MaskSchedule, TruncatedGaussian
from nar_t2i.types import Term, TokenBatch, TokenNetwork, TokenState


@part
class SelfConditioned(Masked):
    """A first pass without a gradient guesses the masked tokens, and a second one, which is shown the guesses, is learned.

    share: of the images that are shown their guesses (the paper's half); the others learn to do without, as the first
    decoding step has to. The network must read guesses (`self_conditioning: true`); strategies that draw all unknown slots
    in each pass (Confidence, Purity, Moment, EntropyBounded, ProgressiveStages, CriticGuided) then show each pass the draws of
    the one before. The others have none to show: those in a fixed order draw only what they fill, and GibbsSweeps draws
    tokens anew, given all others. For tokens, where the paper has bits: our choice. The rest: see Masked.
    """

    def __init__(
        self,
        share: float = 0.5,
        schedule: MaskSchedule | TruncatedGaussian | FixedRatio = "cosine",
        curriculum: float = 0.0,
        first_ceiling: float = 0.4,
        regions: float = 0.0,
        everything: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(schedule, curriculum, first_ceiling, regions, everything, label_smoothing)
        if not 0 <= share <= 1:
            raise UserError(f"SelfConditioned: share must be 0 to 1, not {share}")
        self.share, self.passes = share, 4 / 3  # a third of a pass is its forward half

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        if not network.self_conditioning:
            raise UserError("SelfConditioned: this network reads no guesses; set its self_conditioning to true")
        masked, prepared = self.masks(noise, network.spec, progress), network.prepare(batch.condition)
        draws = noise.at(0, masked)
        with torch.no_grad():
            guessed = network(TokenState(batch.tokens, masked), prepared, read=draws.places).sample(draws).values
        torch.clear_autocast_cache()  # weights that were cast without a gradient must not serve the pass that has one
        shown = noise.uniform("self-conditioning") < self.share
        guess = torch.full_like(batch.tokens, -1).masked_scatter(masked, guessed)
        guess = guess.masked_fill(~shown[:, None], -1)
        prediction = network(TokenState(batch.tokens, masked, guess=guess), prepared, read=draws.places)
        return {"loss": term(image_means(self.nll(prediction, draws.of(batch.tokens), draws), draws.rows, masked.sum(1)))}
