"""Tokens into a transformer and out of it: embeddings with a mask vector, position embeddings, heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.networks.predictions import Bernoulli, Categorical
from nar_t2i.types import Prediction, TokenSpec, TokenState


class TokenEmbedding(nn.Module):
    """A TokenState → (B, N, D). Masked slots get a learned vector; every slot gets its position."""

    def __init__(self, spec: TokenSpec, width: int):
        super().__init__()
        self.spec = spec
        self.value = nn.Embedding(spec.size, width) if spec.kind == "categorical" else nn.Linear(spec.size, width)
        self.mask = nn.Parameter(0.02 * torch.randn(width))
        self.position = nn.Parameter(0.02 * torch.randn(spec.length, width))
        self.mask.no_decay = self.position.no_decay = True
        self.position.position_grid = spec.shape
        if spec.kind == "categorical":
            nn.init.normal_(self.value.weight, std=0.02)

    def forward(self, state: TokenState) -> Tensor:
        values = state.values
        if self.spec.kind == "binary":
            values = 2 * values.to(self.mask.dtype) - 1
        x = torch.where(state.masked.unsqueeze(-1), self.mask, self.value(values).to(self.mask.dtype))
        return x + (self.position if state.positions is None else self.position[state.positions])


class TokenHead(nn.Module):
    """Hidden states → a prediction of the tokens' kind."""

    def __init__(self, spec: TokenSpec, width: int):
        super().__init__()
        if spec.kind == "continuous":
            raise UserError("continuous tokens need a network with a diffusion head; this one has logits")
        self.kind = spec.kind
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, spec.size)

    def forward(self, x: Tensor) -> Prediction:
        logits = self.logits(self.norm(x))
        return Categorical(logits) if self.kind == "categorical" else Bernoulli(logits)


def select(x: Tensor, read: Tensor | None) -> Tensor:
    """The hidden states of the slots that are read: (B, N, D) → (B, N, D), (B, M, D) or (R, D), see TokenNetwork."""
    if read is None:
        return x
    if read.dtype == torch.bool:
        return x[read]
    return x.gather(1, read.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
