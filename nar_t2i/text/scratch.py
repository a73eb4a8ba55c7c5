"""A transformer encoder over SentencePiece tokens, trained from scratch together with the generator."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.hashing import text_hash, weights_hash
from nar_t2i.networks.attention import MLP, SelfAttention, Words
from nar_t2i.parts import part
from nar_t2i.text.layers import choose_trained, copied, mean_state, readable
from nar_t2i.types import Condition, TextEncoder

ALIGNMENT = 32


class FlatConvolution(nn.Conv1d):
    """A convolution along a line, as one over an image one pixel high: the kernels for these are several times faster on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        weight, padding = self.weight.unsqueeze(2), (0, *self.padding)
        return F.conv2d(x.unsqueeze(2), weight, self.bias, padding=padding, groups=self.groups).squeeze(2)


class WordConvolution(nn.Module):
    """A depthwise convolution along the caption, added to the states of its tokens.

    What belongs together stands together ("two small red stars"); attention finds that out from learned positions, but
    late (short convolutions: Allen-Zhu 2025, "Canon layers"; width and place are our choice). Padding counts as zeros.
    """

    def __init__(self, width: int, reach: int):
        super().__init__()
        self.convolution = FlatConvolution(width, width, 2 * reach + 1, padding=reach, groups=width)
        nn.init.zeros_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.convolution((x * mask.unsqueeze(-1)).transpose(1, 2)).transpose(1, 2)


class EncoderBlock(nn.Module):
    """Word convolution where it reaches anywhere; then, pre-norm: self-attention, MLP."""

    def __init__(self, width: int, heads: int, reach: int):
        super().__init__()
        self.local = WordConvolution(width, reach) if reach else None
        self.norm_self, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, heads)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, words: Words) -> Tensor:
        """x: (R, width), the rows of the words."""
        if self.local is not None:
            x = words.rows(self.local(words.padded(x), words.mask))
        attention = self.self_attention
        read = attention.mix(words.padded(attention.qkv(self.norm_self(x))), words.mask[:, None, None, :])
        x = x + attention.out(words.rows(read))
        return x + self.mlp(self.norm_mlp(x))


@part
class ScratchTextEncoder(TextEncoder):
    """Captions → states (B, L, width); pooled is the mean of the states over real tokens.

    vocabulary: a SentencePiece model file (data_prep/train_sentencepiece.py makes one). max_length: tokens kept a
    caption, the end mark included; `truncated` counts the captions that were longer. word_reach: tokens to either side
    over which every block has a depthwise convolution (see WordConvolution); 0 = none. trainable: "none" keeps the
    weights as they are, which `init_from` has brought from another run; "last_2" trains the last two blocks and the norm
    behind them, "all" everything. mask_padding: see PretrainedTextEncoder.
    """

    assets = ("vocabulary",)  # arguments that name files, which travel with a saved pipeline

    def __init__(
        self,
        vocabulary: str,
        width: int = 192,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 40,
        word_reach: int = 0,
        trainable: str = "all",
        mask_padding: bool = True,
    ):
        super().__init__()
        if not Path(vocabulary).is_file():
            raise UserError(f"text encoder: vocabulary: there is no file {vocabulary}")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=vocabulary)
        except (RuntimeError, OSError) as error:
            raise UserError(f"text encoder: vocabulary: {vocabulary} is not a SentencePiece model") from error
        self.widths, self.pooled_width, self.max_length = (width,), width, max_length
        self.mask_padding = mask_padding
        self.embedding = nn.Embedding(self._pieces.get_piece_size(), width)
        self.position = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.position.no_decay = self.position.position_counts = True
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, word_reach) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        choose_trained(trainable, self, self.blocks, [self.norm])
        self._frozen = trainable == "none"
        for p in self.parameters():
            p.from_elsewhere = not p.requires_grad

    def vocabulary_hash(self) -> str:
        return text_hash(self._pieces.serialized_model_proto())

    def fingerprint(self) -> dict[str, str]:
        return {
            "kind": type(self).__name__,
            "weights": weights_hash(self),
            "vocabulary": self.vocabulary_hash(),
            "heads": str(self.blocks[0].self_attention.heads),
            "max_length": str(self.max_length),
            "mask_padding": str(self.mask_padding),
        }

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L) codes and the mask of real ones; L is the longest caption's length, rounded up to a multiple of 32
        (a softmax over 32 bf16 numbers takes a quarter of the time of one over 24) or to `max_length`."""
        rows = self._pieces.encode([readable(caption.lower()) for caption in captions], add_eos=True)
        self.count(len(rows), sum(len(row) > self.max_length for row in rows))
        rows = [row if len(row) <= self.max_length else row[: self.max_length - 1] + row[-1:] for row in rows]
        longest = max(map(len, rows)) if self.mask_padding else self.max_length
        length = min(-(-longest // ALIGNMENT) * ALIGNMENT, self.max_length)
        codes = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return codes, torch.arange(length) < lengths[:, None]

    def forward(self, captions: list[str]) -> Condition:
        codes, mask = self.tokenize(captions)
        places = Words(mask, padding_too=not self.mask_padding).places  # a GPU would be waited for to say how many there are
        codes, mask, places = copied(self.position.device, codes, mask, places)
        with torch.set_grad_enabled(not self._frozen and torch.is_grad_enabled()):
            words = Words(mask, places=places)
            x = self.embedding(words.rows(codes)) + self.position[words.places % codes.shape[1]]
            for block in self.blocks:
                x = block(x, words)
            x = words.padded(self.norm(x))
            pooled = mean_state(x, mask)
        return Condition((x,), (mask if self.mask_padding else torch.ones_like(mask),), pooled)
