"""Teaching a critic on what a frozen generator draws (TCTS, arXiv 2304.01515, section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch

from nar_t2i.errors import UserError
from nar_t2i.folders import frozen_network
from nar_t2i.learning.terms import draw_masks, term
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import FixedRatio, MaskSchedule, TruncatedGaussian
from nar_t2i.types import LearningStrategy, Term, TokenBatch, TokenNetwork, TokenState, beside, over_values


@part
class CriticOf(LearningStrategy):
    """A network with one logit a slot (TokenCritic) learns which tokens a generator drew, or drew wrongly.

    Some tokens are hidden, the generator draws them all in one pass, and the critic, which sees the result and the text,
    is asked about each. generator: a model folder (as `save_pretrained` writes it), or its network; it is frozen and in no
    checkpoint. The text encoder beside must be the generator's own, frozen, since both read the same states: start from
    its run with `init_from`. schedule: of the share that is hidden. temperature: of the draws. label: "drawn", hidden
    tokens are wrong whatever was drawn (both papers'); "changed", those that differ from the truth (our choice). redraw:
    "hidden", visible tokens stay (Token-Critic's); "all", they are drawn too (TCTS's, for generators that have learned to
    predict visible tokens). A critic is never asked without a caption: it is trained with caption_dropout 0, so that its generator
    is shown no null caption but its own.
    """

    draws = False
    passes = 4 / 3  # the generator's, without a gradient, is taken for one of a network of the critic's size

    def __init__(
        self,
        generator: str | TokenNetwork,
        schedule: MaskSchedule | TruncatedGaussian | FixedRatio = "linear",
        temperature: float = 1.0,
        label: Literal["drawn", "changed"] = "drawn",
        redraw: Literal["hidden", "all"] = "hidden",
    ):
        super().__init__()
        self._generator = [frozen_network(generator)]  # in a list: no part of this module
        if self._generator[0].causal:
            raise UserError(
                "CriticOf: the generator draws hidden tokens from all visible ones at once, and this one sees only what stands "
                "before"
            )
        self.schedule, self.temperature, self.label, self.redraw = schedule, temperature, label, redraw

    @torch.no_grad()
    def drawn(self, batch: TokenBatch, noise: Noise, masked: torch.Tensor) -> torch.Tensor:
        """(B, N, …), what the generator makes of the tokens of which some are hidden."""
        generator = beside(self._generator[0], batch.condition)
        read = torch.ones_like(masked) if self.redraw == "all" else masked
        draws = noise.at(0, read)
        prediction = generator(TokenState(batch.tokens, masked), generator.prepare(batch.condition), read=draws.places)
        values = prediction.sample(draws, self.temperature).values
        return batch.tokens.masked_scatter(over_values(read, batch.tokens), values)

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        if self._generator[0].spec != network.spec:
            raise UserError(f"CriticOf: the generator draws {self._generator[0].spec}, the critic reads {network.spec}")
        masked = draw_masks(noise, self.schedule, network.spec.shape)
        tokens = self.drawn(batch, noise, masked)
        wrong = masked
        if self.label == "changed":
            differs = tokens != batch.tokens
            wrong = differs if differs.ndim == 2 else differs.flatten(2).any(-1)
        prediction = network(TokenState(tokens, torch.zeros_like(masked)), network.prepare(batch.condition))
        nll = prediction.nll(wrong.unsqueeze(-1))
        right = ((prediction.logits.squeeze(-1) > 0) == wrong).float()
        return {"loss": term(nll.mean(1)), "critic_accuracy": term(right.mean(1))}
