"""Emage's network (arXiv 2312.14988): a bidirectional image-token decoder that reads the text by cross-attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.networks.attention import MLP, CrossAttention, SelfAttention, mask_for
from nar_t2i.networks.recomputed import recomputed
from nar_t2i.networks.tokens import CodeVectors, TokenEmbedding, TokenHead, select
from nar_t2i.parts import part
from nar_t2i.types import Condition, KVCache, Prediction, TokenNetwork, TokenSpec, TokenState

ROUND_TO = 16  # words: attention of other lengths takes up to twice the time on a CPU, and copies of its mask on a GPU


class PreparedText(NamedTuple):
    """keys_and_values: a pair (B, heads, L, d) a layer. mask: (B, 1, 1, L), see `mask_for`."""

    keys_and_values: list[tuple[Tensor, Tensor]]
    mask: Tensor


class GridConvolution(nn.Module):
    """A depthwise 3×3 convolution over the token grid, added to the tokens, (B, N, width).

    Positions relative to one's neighbours without learning each pair of places (conditional positional encodings,
    Chu et al., arXiv 2102.10882; in every block and trained from zero: our choice).
    """

    def __init__(self, grid: tuple[int, int], width: int):
        super().__init__()
        self.grid = grid
        self.convolution = nn.Conv2d(width, width, 3, padding=1, groups=width)
        nn.init.zeros_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)

    def forward(self, x: Tensor) -> Tensor:
        image = x.unflatten(1, self.grid).permute(0, 3, 1, 2)  # a view, channels last
        return x + self.convolution(image).permute(0, 2, 3, 1).flatten(1, 2)


class DecoderBlock(nn.Module):
    """(B, N, width) → the same: grid convolution where there is a grid; then, pre-norm, self-attention, cross-attention, MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: str, grid: tuple[int, int] | None):
        super().__init__()
        self.local = nn.Identity() if grid is None else GridConvolution(grid, width)
        self.norm_self, self.norm_cross, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = SelfAttention(width, heads)
        self.cross_attention = CrossAttention(width, heads)
        self.mlp = MLP(width, mlp_ratio, activation)

    def forward(self, x: Tensor, keys_and_values: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = self.local(x)
        x = x + self.self_attention(self.norm_self(x))
        x = x + self.cross_attention(self.norm_cross(x), keys_and_values, mask)
        return x + self.mlp(self.norm_mlp(x))

    @property
    def last_layers(self) -> tuple[nn.Linear, ...]:
        """Those whose outputs are added to the tokens."""
        return self.self_attention.out, self.cross_attention.out, self.mlp[-1]


def initialise(module: nn.Module, last_layers: Iterable[nn.Linear], depth: int) -> None:
    """Weights of unit gain; smaller ones in the layers that end a residual branch, of which there are 3 a block."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in last_layers:
        nn.init.normal_(layer.weight, std=(layer.in_features * 3 * depth) ** -0.5)


def states_and_mask(projections: nn.ModuleList, norm: nn.LayerNorm, condition: Condition) -> tuple[Tensor, Tensor]:
    """(B, L, width), the text streams projected and side by side, and (B, 1, 1, L), True = a word: with padding up to the next
    multiple of ROUND_TO. UserError where a stream has not the width that it is projected from."""
    reads, given = [projection.in_features for projection in projections], [states.shape[-1] for states in condition.states]
    if reads != given:
        raise UserError(
            f"the network reads text states of the widths {reads}, and is given such of {given}: it was trained beside another "
            "text encoder"
        )
    text = torch.cat([project(s) for project, s in zip(projections, condition.states, strict=True)], dim=1)
    mask, missing = torch.cat(condition.masks, dim=1), -text.shape[1] % ROUND_TO
    return F.pad(norm(text), (0, 0, 0, missing)), F.pad(mask, (0, missing))[:, None, None, :]


@part
class EncoderDecoder(TokenNetwork):
    """Tokens + text states → logits at the slots that are read.

    spec: the tokens. text_widths: one a text stream; the streams are projected and concatenated along the length.
    width, depth, heads, mlp_ratio: of the decoder; pre-norm, learned positions (our choice: the paper gives no widths).
    grid_convolution: a depthwise 3×3 convolution in every block, for tokens on a grid (see GridConvolution).
    code_width: of the tokenizer's code vectors, which are then used beside free embeddings (see CodeVectors); 0 = not.
    activation_checkpointing: recompute each block in the backward pass, for memory. self_conditioning: masked slots show
    what an earlier pass guessed for them (see `nar_t2i.learning.SelfConditioned`).
    """

    def __init__(
        self,
        spec: TokenSpec,
        text_widths: Sequence[int],
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        activation: Literal["gelu", "silu", "relu"] = "gelu",
        grid_convolution: bool = False,
        code_width: int = 0,
        activation_checkpointing: bool = False,
        self_conditioning: bool = False,
    ):
        super().__init__()
        self.spec = spec
        self.activation_checkpointing, self.self_conditioning = activation_checkpointing, self_conditioning
        self.codes = CodeVectors(spec.size, code_width) if code_width else None
        self.embedding = TokenEmbedding(spec, width, self.codes, self_conditioning)
        self.text = nn.ModuleList(nn.Linear(w, width) for w in text_widths)
        self.text_norm = nn.LayerNorm(width)
        if grid_convolution and len(spec.shape) != 2:
            raise UserError(f"grid_convolution needs tokens on a grid, not of the shape {spec.shape}")
        self.on_grid = grid_convolution
        grid = spec.shape if grid_convolution else None
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, mlp_ratio, activation, grid) for _ in range(depth))
        self.head = TokenHead(spec, width, self.codes)
        initialise(self, [layer for b in self.blocks for layer in b.last_layers], depth)
        nn.init.zeros_(self.head.logits.weight)
        if self.codes:
            nn.init.zeros_(self.head.project.weight)

    def prepare(self, condition: Condition) -> PreparedText:
        text, mask = states_and_mask(self.text, self.text_norm, condition)
        keys_and_values = [block.cross_attention.keys_and_values(text) for block in self.blocks]
        return PreparedText(keys_and_values, mask_for(mask, keys_and_values[0][0].dtype))

    @property
    def stack(self) -> Sequence[nn.Module]:
        return self.blocks

    def check_positions(self, state: TokenState) -> None:
        if state.positions is not None and self.on_grid:
            raise ValueError("a network with grid_convolution reads all tokens in their order, not chosen positions")

    def forward(
        self, state: TokenState, prepared: PreparedText, read: Tensor | None = None, cache: KVCache | None = None
    ) -> Prediction:
        self.check_positions(state)
        x = self.embedding(state)
        for block, keys_and_values in zip(self.blocks, prepared.keys_and_values, strict=True):
            x = recomputed(block, x, keys_and_values, prepared.mask, active=self.activation_checkpointing)
        return self.head(select(x, read))
