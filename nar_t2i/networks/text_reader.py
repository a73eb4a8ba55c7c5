"""What the text alone says of each slot: one cross-attention, to teach a text encoder before a network reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nar_t2i.networks.attention import CrossAttention
from nar_t2i.networks.encoder_decoder import initialise, states_and_mask
from nar_t2i.networks.tokens import TokenHead, select
from nar_t2i.parts import part
from nar_t2i.types import Condition, KVCache, Prediction, TokenNetwork, TokenSpec, TokenState


@part
class TextReader(TokenNetwork):
    """Each slot, by a query of its own, reads the words in one cross-attention and foretells its token; tokens in sight
    are not read at all. Shapes as in EncoderDecoder.

    A step costs a fraction of a deep network's, so a text encoder meets many more captions in the same time. Words that
    say where something is, which a masked network meets as a faint signal behind all that its visible tokens tell, are
    learned so (our choice). `init_from` then takes the text encoder over into a network that draws.

    spec: the tokens. text_widths: one a text stream. width, heads: of the attention.
    """

    def __init__(self, spec: TokenSpec, text_widths: Sequence[int], width: int = 256, heads: int = 4):
        super().__init__()
        self.spec = spec
        self.text = nn.ModuleList(nn.Linear(w, width) for w in text_widths)
        self.text_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(spec.length, width))
        self.queries.no_decay = True
        self.queries.position_grid = spec.shape
        self.cross_attention = CrossAttention(width, heads)
        self.predict = TokenHead(spec, width)
        initialise(self, (), depth=1)
        nn.init.zeros_(self.predict.logits.weight)

    def prepare(self, condition: Condition) -> tuple[tuple[Tensor, Tensor], Tensor]:
        text, mask = states_and_mask(self.text, self.text_norm, condition)
        return self.cross_attention.keys_and_values(text), mask

    def forward(
        self,
        state: TokenState,
        prepared: tuple[tuple[Tensor, Tensor], Tensor],
        read: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Prediction:
        queries = self.queries[None] if state.positions is None else self.queries[state.positions]
        x = self.cross_attention(queries, *prepared)
        return self.predict(select(x, read))
