"""Next-token prediction in raster order, for causal networks."""

from __future__ import annotations

import torch

from nar_t2i.learning.terms import term
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.types import LearningStrategy, Term, TokenBatch, TokenNetwork, TokenState


@part
class Causal(LearningStrategy):
    """The mean negative log-likelihood of each token given the ones before it."""

    causal = True

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        slots = torch.arange(network.spec.length, device=batch.tokens.device).expand(len(batch.tokens), -1)
        state = TokenState(batch.tokens, torch.zeros_like(slots, dtype=torch.bool))
        prediction = network(state, network.prepare(batch.condition))
        per_image = prediction.nll(batch.tokens, noise.at(0, slots)).mean(dim=1)
        return {"loss": term(per_image)}
