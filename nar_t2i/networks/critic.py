"""A network that says of each token whether it stands there rightly (TCTS, arXiv 2304.01515; Token-Critic, 2209.04439)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from nar_t2i.networks.encoder_decoder import EncoderDecoder
from nar_t2i.networks.predictions import Bernoulli
from nar_t2i.parts import part
from nar_t2i.types import TokenSpec


class Doubt(nn.Module):
    """Hidden states → one logit a slot, of the token being wrong."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Bernoulli:
        return Bernoulli(self.logits(self.norm(x)))


@part
class TokenCritic(EncoderDecoder):
    """EncoderDecoder that reads tokens and text and predicts one bit a slot: 1 = wrong. The arguments are EncoderDecoder's."""

    judges = True

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
            spec, text_widths, width, depth, heads, mlp_ratio, activation, grid_convolution, code_width,
            activation_checkpointing,
        )  # fmt: skip
        self.head = Doubt(width)
