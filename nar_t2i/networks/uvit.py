"""aMUSEd's network (Patil et al., arXiv 2401.01808): a U-ViT between two stages of convolutions, in a token's resolution.

It is MUSE's masked transformer (arXiv 2301.00704) in the shape of simple diffusion's U-ViT (arXiv 2301.11093). Published
weights are loaded by `nar_t2i.networks.uvit_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.networks.attention import mask_for
from nar_t2i.networks.encoder_decoder import initialise, states_and_mask
from nar_t2i.networks.predictions import Categorical
from nar_t2i.networks.recomputed import recomputed
from nar_t2i.networks.tokens import select
from nar_t2i.networks.uvit_blocks import (
    Doubling,
    Halving,
    PreparedLayer,
    PreparedStage,
    RMSNorm,
    Stage,
    TransformerLayer,
)
from nar_t2i.parts import part
from nar_t2i.types import Condition, KVCache, Prediction, TokenNetwork, TokenSpec, TokenState

# What aMUSEd is told beside the text, in its order: pixels of the original, of the crop, and LAION's aesthetic score (the
# micro-conditions of SDXL, arXiv 2307.01952). The values are those that its pipeline generates with, at 256 px.
MICRO_CONDITIONS = {
    "original_width": 256.0, "original_height": 256.0, "crop_top": 0.0, "crop_left": 0.0, "aesthetic_score": 6.0,
}  # fmt: skip


class PreparedCondition(NamedTuple):
    """mask: (B, 1, 1, L), see `mask_for`. down, up: of each stage. layers: of each transformer layer."""

    mask: Tensor
    down: list[PreparedStage]
    layers: list[PreparedLayer]
    up: list[PreparedStage]


class CodeEmbedding(nn.Module):
    """A TokenState → (B, N, channels). No positions: the convolutions see where the image ends."""

    def __init__(self, codes: int, width: int, channels: int):
        super().__init__()
        self.value = nn.Embedding(codes, width)
        self.mask = nn.Parameter(0.02 * torch.randn(width))
        self.mask.no_decay = True
        self.norm = RMSNorm(width)
        self.project = nn.Linear(width, channels, bias=False)
        nn.init.normal_(self.value.weight, std=0.02)

    def forward(self, state: TokenState) -> Tensor:
        return self.project(self.norm(torch.where(state.masked.unsqueeze(-1), self.mask, self.value(state.values))))


class CodeHead(nn.Module):
    """Hidden states (…, channels) → logits of the codes."""

    def __init__(self, codes: int, width: int, channels: int):
        super().__init__()
        self.project = nn.Linear(channels, width, bias=False)
        self.norm = RMSNorm(width)
        self.logits = nn.Linear(width, codes, bias=False)

    def forward(self, x: Tensor) -> Prediction:
        return Categorical(self.logits(self.norm(self.project(x))))


@part
class UVit(TokenNetwork):
    """Tokens on a grid, text states, a pooled state and micro-conditions → logits at the slots that are read.

    spec: a grid of codes; with `halving`, of even sides. text_widths: one a text stream; the streams are projected and
    concatenated along the length. pooled_width: of the pooled state, 0 = none is read. width, depth, heads, mlp_width: of
    the transformer. channels, channel_heads, stages: of the convolutions before and behind it, and of the attentions
    between them. embedding_width: of codes and of the head. halving: the transformer and the convolutions work on half the
    grid, with four tokens in one. micro_conditions: the scalars that are read, in this order, and the value of each where a
    sample or a prompt has none; None = aMUSEd's five, {} = none. micro_width: of a micro-condition's waves.
    activation_checkpointing: recompute each stage and layer in the backward pass, for memory.

    aMUSEd has these defaults: at 256 px 16 × 16 tokens, 603M parameters; at 512 px 32 × 32 tokens and halving, 608M.
    """

    def __init__(
        self,
        spec: TokenSpec,
        text_widths: Sequence[int],
        pooled_width: int = 768,
        width: int = 1024,
        depth: int = 22,
        heads: int = 16,
        mlp_width: int = 2816,
        channels: int = 768,
        channel_heads: int = 12,
        stages: int = 3,
        embedding_width: int = 768,
        halving: bool = False,
        micro_conditions: dict[str, float] | None = None,
        micro_width: int = 256,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if spec.kind != "categorical" or len(spec.shape) != 2 or (halving and any(side % 2 for side in spec.shape)):
            raise UserError(f"UVit needs codes on a grid{' of even sides' if halving else ''}, not {spec.kind} tokens {spec.shape}")
        if width % heads or channels % channel_heads or micro_width % 2:
            raise UserError(f"UVit: {heads} heads must divide width {width}, {channel_heads} channel_heads {channels} channels, "
                            f"and 2 micro_width {micro_width}")  # fmt: skip
        self.spec, self.activation_checkpointing = spec, activation_checkpointing
        self.grid = tuple(side // 2 for side in spec.shape) if halving else spec.shape
        self.micro_conditions = dict(MICRO_CONDITIONS if micro_conditions is None else micro_conditions)
        self.pooled_width, self.micro_width = pooled_width, micro_width
        told = pooled_width + micro_width * len(self.micro_conditions)
        if told == 0:
            raise UserError("UVit: its norms need a pooled state or micro-conditions, and there are neither")
        self.embedding = CodeEmbedding(spec.size, embedding_width, channels)
        self.text = nn.ModuleList(nn.Linear(w, width, bias=False) for w in text_widths)
        self.text_norm = RMSNorm(width)
        self.vector = nn.Sequential(nn.Linear(told, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False))
        self.halving = Halving(channels) if halving else None
        self.down = nn.ModuleList(Stage(channels, channel_heads, width) for _ in range(stages))
        self.into = nn.Sequential(RMSNorm(channels), nn.Linear(channels, width, bias=False))
        self.layers = nn.ModuleList(TransformerLayer(width, heads, mlp_width) for _ in range(depth))
        self.out = nn.Sequential(RMSNorm(width), nn.Linear(width, channels, bias=False))
        self.up = nn.ModuleList(Stage(channels, channel_heads, width) for _ in range(stages))
        self.doubling = Doubling(channels) if halving else None
        self.head = CodeHead(spec.size, embedding_width, channels)
        self._initialise(depth)

    @property
    def stack(self) -> Sequence[nn.Module]:
        return [*self.down, *self.layers, *self.up]

    def _initialise(self, depth: int) -> None:
        """Weights of unit gain; adaptive scales and shifts and the head start at zero (our choice)."""
        ends = [end for layer in self.layers for end in (layer.self_attention.out, layer.cross_attention.out, layer.mlp.out)]
        for stage in (*self.down, *self.up):
            ends += [stage.convolution.out, stage.first.out, stage.second.out]
        initialise(self, ends, depth + len(self.down) + len(self.up))
        nn.init.zeros_(self.head.logits.weight)
        for name, weight in self.named_parameters():
            if "scale_and_shift" in name:
                nn.init.zeros_(weight)

    def prepare(self, condition: Condition) -> PreparedCondition:
        text, mask = states_and_mask(self.text, self.text_norm, condition)
        vector = self.vector(self._told(condition, text.dtype))

        def prepared(parts: nn.ModuleList) -> list:
            return [part.prepare(text, vector) for part in parts]

        return PreparedCondition(mask_for(mask, text.dtype), prepared(self.down), prepared(self.layers), prepared(self.up))

    def _told(self, condition: Condition, dtype: torch.dtype) -> Tensor:
        """(B, pooled_width + micro_width · micro-conditions), the pooled state and the waves of the others."""
        states, told = condition.states[0], []
        if self.pooled_width:
            found = 0 if condition.pooled is None else condition.pooled.shape[-1]
            if found != self.pooled_width:
                raise UserError(f"UVit: pooled_width is {self.pooled_width}, and the text encoder's pooled state has {found}")
            told.append(condition.pooled.to(dtype))
        for name, usual in self.micro_conditions.items():
            value = condition.scalars.get(name)
            if value is None:  # filled there, not copied
                value = torch.full((len(states),), usual, device=states.device)
            told.append(waves(value.float().nan_to_num(nan=usual), self.micro_width).to(dtype))
        return torch.cat(told, dim=1)

    def forward(
        self, state: TokenState, prepared: PreparedCondition, read: Tensor | None = None, cache: KVCache | None = None
    ) -> Prediction:
        if state.positions is not None:
            raise ValueError("UVit reads all tokens in their order, not chosen positions")
        mask, grid = prepared.mask, self.grid
        x = self.embedding(state)
        if self.halving is not None:
            x = self.halving(x, self.spec.shape)
        for stage, of_text in zip(self.down, prepared.down, strict=True):
            x = self._run(stage, x, of_text, mask, grid)
        x = self.into(x)
        for layer, of_text in zip(self.layers, prepared.layers, strict=True):
            x = self._run(layer, x, of_text, mask)
        x = self.out(x)
        for stage, of_text in zip(self.up, prepared.up, strict=True):
            x = self._run(stage, x, of_text, mask, grid)
        if self.doubling is not None:
            x = self.doubling(x, grid)
        return self.head(select(x, read))

    def _run(self, module: nn.Module, *arguments: object) -> Tensor:
        return recomputed(module, *arguments, active=self.activation_checkpointing)


def waves(value: Tensor, width: int) -> Tensor:
    """(B,) → (B, width): cosines, then sines, of frequencies from 1 down to 1/10,000 (DDPM's, arXiv 2006.11239)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=value.device, dtype=torch.float32) * (-math.log(10000) / half))
    angles = value[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
