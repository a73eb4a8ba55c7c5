"""An encoder-decoder in which text and image read each other, so that each phrase can see whether it is drawn already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from nar_t2i.networks.attention import MLP, CrossAttention, Words
from nar_t2i.networks.encoder_decoder import DecoderBlock, EncoderDecoder, initialise, states_and_mask
from nar_t2i.networks.recomputed import recomputed
from nar_t2i.networks.tokens import select
from nar_t2i.parts import part
from nar_t2i.types import Condition, KVCache, Prediction, TokenSpec, TokenState


class TextStates(NamedTuple):
    """states: (R, width), the rows of the words. words: where these are. mask: (B, 1, 1, L)."""

    states: Tensor
    words: Words
    mask: Tensor


class TextBlock(nn.Module):
    """Pre-norm: text states read the image tokens by cross-attention; MLP. All tokens may be read, masked ones too."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: str):
        super().__init__()
        self.norm_text, self.norm_image, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.cross_attention = CrossAttention(width, heads)
        self.mlp = MLP(width, mlp_ratio, activation)

    def forward(self, text: Tensor, words: Words, image: Tensor) -> Tensor:
        """text: (R, width), the rows of the words. image: (B, N, width)."""
        attention = self.cross_attention
        keys_and_values = attention.keys_and_values(self.norm_image(image))
        read = attention.read(words.padded(attention.q(self.norm_text(text))), keys_and_values)
        text = text + attention.out(words.rows(read))
        return text + self.mlp(self.norm_mlp(text))


@part
class TwoWayDecoder(EncoderDecoder):
    """EncoderDecoder whose text states read the image tokens after every block but the last.

    By cross-attention alone, an image token has to find out by itself which of the things that the text names stand in
    the picture already. Here each word looks, and says so to the next block (the two-way attention of SAM's decoder,
    Kirillov et al., arXiv 2304.02643, appendix A; for text and image, and without self-attention among the words: our
    choice). The price: keys and values of the text are made anew in every pass and cannot be prepared once.

    text_mlp_ratio: of the MLPs that text states pass. The other arguments are EncoderDecoder's.
    """

    static = False  # how many words there are decides shapes

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
        text_mlp_ratio: float = 2.0,
    ):
        super().__init__(
            spec, text_widths, width, depth, heads, mlp_ratio, activation, grid_convolution, code_width,
            activation_checkpointing,
        )  # fmt: skip
        self.text_blocks = nn.ModuleList(TextBlock(width, heads, text_mlp_ratio, activation) for _ in range(depth - 1))
        self.text_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth - 1))
        for block in self.text_blocks:
            initialise(block, (block.cross_attention.out, block.mlp[-1]), depth)

    def prepare(self, condition: Condition) -> TextStates:
        states, mask = states_and_mask(self.text, self.text_norm, condition)
        words = Words(mask[:, 0, 0])
        return TextStates(words.rows(states), words, mask)

    def forward(
        self, state: TokenState, prepared: TextStates, read: Tensor | None = None, cache: KVCache | None = None
    ) -> Prediction:
        self.check_positions(state)
        x, text = self.embedding(state), prepared.states
        norms = [nn.Identity(), *self.text_norms]  # the states are normalised when they come
        text_blocks = [*self.text_blocks, None]
        for block, norm, text_block in zip(self.blocks, norms, text_blocks, strict=True):
            arguments = (block, norm, text_block, x, text, prepared.words, prepared.mask)
            x, text = recomputed(_both, *arguments, active=self.activation_checkpointing)
        return self.head(select(x, read))


def _both(
    block: DecoderBlock, norm: nn.Module, text_block: TextBlock | None, x: Tensor, text: Tensor, words: Words, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The image reads the text, then the text the image."""
    x = block(x, block.cross_attention.keys_and_values(norm(text), words), mask)
    return x, text if text_block is None else text_block(text, words, x)
