"""Emage's twin that draws one token at a time: the same blocks, seeing only what stands before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_t2i.networks.attention import attend, merge_heads
from nar_t2i.networks.encoder_decoder import DecoderBlock, EncoderDecoder, GridConvolution, PreparedText
from nar_t2i.networks.recomputed import recomputed
from nar_t2i.networks.tokens import select
from nar_t2i.parts import part
from nar_t2i.types import KVCache, Prediction, TokenSpec, TokenState


class CausalGridConvolution(GridConvolution):
    """GridConvolution of which a slot sees the row above, its neighbour on the left and itself (PixelCNN's mask, van den Oord
    et al., arXiv 1601.06759)."""

    def __init__(self, grid: tuple[int, int], width: int):
        super().__init__(grid, width)
        self.register_buffer("seen", torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, n, D), the first n slots."""
        whole = F.pad(x, (0, 0, 0, self.grid[0] * self.grid[1] - x.shape[1]))
        image = whole.unflatten(1, self.grid).permute(0, 3, 1, 2)
        convolution = self.convolution
        weight = (convolution.weight * self.seen).to(x.dtype)
        out = F.conv2d(image, weight, convolution.bias.to(x.dtype), padding=1, groups=convolution.groups)
        return x + out.permute(0, 2, 3, 1).flatten(1, 2)[:, : x.shape[1]]


@part
class CausalDecoder(EncoderDecoder):
    """EncoderDecoder whose slots are predicted in raster order, each from the tokens before it and the text.

    As many weights as EncoderDecoder, so that autoregressive and parallel decoding compare at equal size: what the mask
    vector is there, stands before the first token here. The arguments are EncoderDecoder's; a grid convolution sees what
    was drawn (CausalGridConvolution), for which a cache also keeps what each block reads.
    """

    causal = True
    stack = ()  # its blocks are called in parts

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
    ):
        super().__init__(
            spec, text_widths, width, depth, heads, mlp_ratio, activation, grid_convolution, code_width, activation_checkpointing
        )
        if grid_convolution:
            for block in self.blocks:
                block.local = CausalGridConvolution(spec.shape, width)

    def forward(
        self, state: TokenState, prepared: PreparedText, read: Tensor | None = None, cache: KVCache | None = None
    ) -> Prediction:
        before, slots = state.values, state.positions
        if cache is None:
            slots = torch.arange(self.spec.length, device=before.device).expand(len(before), -1)
            before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], dim=1)
        x = self.embedding(TokenState(before, slots == 0, slots))
        for layer, (block, keys_and_values) in enumerate(zip(self.blocks, prepared.keys_and_values, strict=True)):
            arguments = (block, layer, x, keys_and_values, prepared.mask, slots, cache)
            x = recomputed(_block, *arguments, active=self.activation_checkpointing)
        return self.head(select(x, read))


def _block(
    block: DecoderBlock, layer: int, x: Tensor, keys_and_values: tuple[Tensor, Tensor], mask: Tensor, slots: Tensor,
    cache: KVCache | None,
) -> Tensor:  # fmt: skip
    """A block whose self-attention sees the slots up to its own, of which all rows hold the same."""
    if isinstance(block.local, CausalGridConvolution):
        new = x.shape[1]
        before = x if cache is None else cache.append_states(layer, x)
        x = block.local(before)[:, -new:]
    attention = block.self_attention
    q, k, v = attention.heads_of(attention.qkv(block.norm_self(x)))
    if cache is not None:
        k, v = cache.append(layer, k, v)
    if q.shape[2] == 1:
        seen = None  # the newest slot sees all
    else:
        seen = torch.arange(k.shape[2], device=x.device) <= slots[0].unsqueeze(-1)
    x = x + attention.out(merge_heads(attend(q, k, v, seen)))
    x = x + block.cross_attention(block.norm_cross(x), keys_and_values, mask)
    return x + block.mlp(block.norm_mlp(x))
