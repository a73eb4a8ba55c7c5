"""Tokens into a transformer and out of it: embeddings with a mask vector, position embeddings, heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.networks.predictions import Bernoulli, Categorical
from nar_t2i.types import Prediction, TokenSpec, TokenState


class CodeVectors(nn.Module):
    """What the tokenizer knows of its codes: the codebook's vectors, (K, width), which say which codes look alike.

    Beside a free embedding of each code, a projection of these lets what is learned of one code hold for its like (our
    choice). They are taken over from the codec once, by `adopt`, saved with the network, and by `init_from` left as they are.
    """

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(codes, width))

    def adopt(self, vectors: Tensor) -> None:
        """Take over a codec's vectors, scaled to unit mean square. UserError where their number or width differs."""
        if vectors.shape != self.vectors.shape:
            raise UserError(f"code_width: the tokenizer has codes {tuple(vectors.shape)}, not {tuple(self.vectors.shape)}")
        self.vectors.copy_(vectors / vectors.square().mean().sqrt())
        self.vectors.of_tokenizer = True


class TokenEmbedding(nn.Module):
    """A TokenState → (B, N, D). Masked slots get a learned vector; every slot gets its position.

    codes: vectors of the codes, of which a projection is added to each code's own embedding; None = no projection.
    self_conditioning: masked slots get an embedding of what was guessed for them, too, which starts at zero.
    """

    def __init__(self, spec: TokenSpec, width: int, codes: CodeVectors | None = None, self_conditioning: bool = False):
        super().__init__()
        if self_conditioning and spec.kind != "categorical":
            raise UserError("self_conditioning needs tokens that are codes")
        self.guess = nn.Embedding(spec.size + 1, width) if self_conditioning else None  # the first row: nothing guessed
        if self.guess is not None:
            nn.init.zeros_(self.guess.weight)
        self.codes = [codes] if codes else []  # in a list: it belongs to the network
        self.project = nn.Linear(codes.vectors.shape[1], width, bias=False) if codes else None
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
        if self.spec.kind != "categorical":
            values = values.to(self.mask.dtype)
        if self.spec.kind == "binary":
            values = 2 * values - 1
        embedded = self.value(values)
        for codes in self.codes:
            embedded = embedded + F.embedding(values, self.project(codes.vectors.to(self.project.weight.dtype)))
        mask = self.mask
        if self.guess is not None:  # read in every pass, so that all ranks run the same modules
            guess = torch.full_like(values, -1) if state.guess is None else state.guess
            mask = mask + self.guess(guess + 1)
        x = torch.where(state.masked.unsqueeze(-1), mask, embedded.to(self.mask.dtype))
        return x + (self.position if state.positions is None else self.position[state.positions])


class TokenHead(nn.Module):
    """Hidden states → a prediction of the tokens' kind. codes: see TokenEmbedding."""

    def __init__(self, spec: TokenSpec, width: int, codes: CodeVectors | None = None):
        super().__init__()
        if spec.kind == "continuous":
            raise UserError("continuous tokens need a network with a diffusion head; this one has logits")
        self.kind = spec.kind
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, spec.size)
        self.codes = [codes] if codes else []
        self.project = nn.Linear(width, codes.vectors.shape[1], bias=False) if codes else None

    def forward(self, x: Tensor) -> Prediction:
        x = self.norm(x)
        logits = self.logits(x)
        for codes in self.codes:
            projected = self.project(x)
            logits = logits + F.linear(projected, codes.vectors.to(projected.dtype))
        return Categorical(logits) if self.kind == "categorical" else Bernoulli(logits)


def select(x: Tensor, read: Tensor | None) -> Tensor:
    """The hidden states of the slots that are read: (B, N, D) → (B, N, D), (B, M, D) or (R, D), see TokenNetwork."""
    if read is None:
        return x
    if read.dtype == torch.bool:
        read = read.flatten().nonzero()[:, 0]
    if read.ndim == 1:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # from here on shapes move: see `nar_t2i.training.compiling.compiled`
        return x.flatten(0, 1).index_select(0, read)
    return x.gather(1, read.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
