"""An image decoder that predicts any slot from any prefix of an order that goes from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.networks.attention import attend, merge_heads
from nar_t2i.networks.encoder_decoder import DecoderBlock, EncoderDecoder, PreparedText
from nar_t2i.networks.recomputed import recomputed
from nar_t2i.networks.tokens import select
from nar_t2i.parts import part
from nar_t2i.types import KVCache, Prediction, TokenSpec, TokenState, grid_places


def lattice_order(shape: tuple[int, ...]) -> list[int]:
    """The slots of a grid or a sequence, coarse to fine: every other row and column comes before the rest, and of these again
    every other one (Bayer's ordered dither, 1973; on a sequence, the bits of the place mirrored)."""
    bits = max(1, max(shape) - 1).bit_length()

    def rank(place: tuple[int, ...]) -> int:
        number = 0
        for bit in range(bits):
            digits = [x >> bit & 1 for x in place]
            # On a grid the diagonal neighbour is the second of four.
            digit = (digits[0] ^ digits[1]) << 1 | digits[0] if len(digits) == 2 else digits[0]
            number = number << len(digits) | digit
        return number

    places = grid_places(shape).tolist()
    return sorted(range(len(places)), key=lambda slot: rank(tuple(places[slot])))


def lattice_stages(length: int) -> list[int]:
    """1, 3, 4, 8, 16, … slots, together half of `length` or, where that is no power of two, less: each but the first doubles what
    stands, and on a grid the last stage has neighbours on all sides."""
    stages = [1]
    while (more := 3 if len(stages) == 1 else sum(stages)) + sum(stages) <= length // 2:
        stages.append(more)
    return stages


class Layout(NamedTuple):
    """Entries of a sequence. slots: (M,) where they stand on the grid. asked: (M,), True = a question, which asks about its
    slot and is seen by no other; False = its token is read, and it asks about the next slot of the order. questions: the
    entries that are each stage's questions, as ranges, in the order of the stages.
    """

    slots: Tensor
    asked: Tensor
    questions: tuple[range, ...]

    def take(self, entries: Tensor) -> Layout:
        return Layout(self.slots[entries], self.asked[entries], ())


def training_layout(order: Sequence[int], stages: Sequence[int]) -> Layout:
    """All that drawing by stages asks: each slot of a stage from what stood before the stage, and from the token before it."""
    ranks, asked, questions = [0], [True], []
    start = 0
    for size in (*stages, len(order) - sum(stages)):
        questions.append(range(len(ranks), len(ranks) + size - 1))  # about the first of a stage asks the token before
        ranks += range(start + 1, start + size)
        asked += [True] * (size - 1)
        start += size
        if start < len(order):
            ranks += range(start - size, start)
            asked += [False] * size
    return Layout(torch.tensor([order[rank] for rank in ranks]), torch.tensor(asked), tuple(questions))


class Places(NamedTuple):
    """How the M entries of a sequence stand to what they may see, the same for all rows.

    told: which entries are tokens, (T,); None = any may be. near: (M, K) by how far the slot that an entry asks about lies from the
    tokens, those in a cache first, as indices of SeenConvolution's weights. apart: (M, S) by how far it lies from all that may
    be a token, as indices of PrefixBlock's biases. unseen: (M, S), True = may not be seen.
    """

    told: Tensor | None
    near: Tensor
    apart: Tensor
    unseen: Tensor


class SeenConvolution(nn.Module):
    """A depthwise convolution over the tokens that an entry sees, by how far they stand from the slot it asks about, added to the
    entry: up to two slots away along each side. Trained from zero, as GridConvolution is."""

    REACH = 2

    def __init__(self, sides: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((2 * self.REACH + 1) ** sides, width))
        self.weight.no_decay = True

    @classmethod
    def window(cls, shape: tuple[int, ...]) -> Tensor:
        """(N, N) index of the weight by which slot i reads slot j; one past the last where that is too far away."""
        side = 2 * cls.REACH + 1
        apart = offsets(shape) + cls.REACH
        return flat(apart, [side] * len(shape)).where(((apart >= 0) & (apart < side)).all(-1), side ** len(shape))

    def forward(self, x: Tensor, tokens: Tensor, near: Tensor) -> Tensor:
        """x: (B, M, D). tokens: (B, K, D). near: see Places; one past the last weight reads nothing."""
        weight = F.pad(self.weight, (0, 0, 0, 1))[near]
        return x + torch.einsum("bkd,mkd->bmd", tokens, weight.to(tokens.dtype))


class PrefixBlock(DecoderBlock):
    """DecoderBlock whose entries see tokens that stand before, and, on a grid, learn from how far away: by a convolution, and by a
    bias of the self-attention (Swin's, Liu et al., arXiv 2103.14030)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: str, grid: tuple[int, ...] | None):
        super().__init__(width, heads, mlp_ratio, activation, grid=None)
        self.local = self.nearness = None
        if grid is not None:
            self.local = SeenConvolution(len(grid), width)
            self.nearness = nn.Parameter(torch.zeros(math.prod(2 * n - 1 for n in grid), heads))
            self.nearness.no_decay = True

    def forward(
        self, x: Tensor, keys_and_values: tuple[Tensor, Tensor], mask: Tensor, places: Places, cache: KVCache | None, layer: int
    ) -> Tensor:
        if self.local is not None:
            tokens = x if places.told is None else x[:, places.told]
            if cache is not None:
                tokens = cache.append_states(layer, tokens)
            x = self.local(x, tokens, places.near)
        attention = self.self_attention
        q, k, v = attention.heads_of(attention.qkv(self.norm_self(x)))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        seen = ~places.unseen
        if self.nearness is not None:
            seen = self.nearness[places.apart].permute(2, 0, 1).masked_fill(places.unseen, -math.inf).to(q.dtype)
        x = x + attention.out(merge_heads(attend(q, k, v, seen)))
        x = x + self.cross_attention(self.norm_cross(x), keys_and_values, mask)
        return x + self.mlp(self.norm_mlp(x))


def offsets(shape: tuple[int, ...]) -> Tensor:
    """(N, N, sides) how far slot i lies behind slot j along each side."""
    places = grid_places(shape)
    return places[:, None] - places[None]


def flat(digits: Tensor, sizes: Sequence[int]) -> Tensor:
    """(…, sides) digits, each below its size → (…) numbers."""
    number = torch.zeros_like(digits[..., 0])
    for side, size in enumerate(sizes):
        number = number * size + digits[..., side]
    return number


@part
class PrefixDecoder(EncoderDecoder):
    """EncoderDecoder whose tokens come in a fixed order, from coarse to fine, in stages.

    A sequence holds tokens that are read, each of which sees those before it and asks about the next slot of the order, and
    questions, which see the tokens before them, are seen by none, and ask about slots further on (with any-subset models, Guo &
    Ermon, arXiv 2504.20456, it shares that one pass draws many tokens and also says how likely they are together). So one pass of
    training asks about every slot from the prefix that it is drawn from and from all that comes before it. Like CausalDecoder's,
    positions are those of the slots that are asked about. Order, stages and biases: our choice.

    stages: slots of each stage but the last, which is the rest; None = see `lattice_stages`. Tokens of the last stage are
    never read: each is drawn from the earlier stages alone. The other arguments are EncoderDecoder's.
    """

    causal = staged = True
    stack = ()  # what its blocks read grows from pass to pass

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
        stages: Sequence[int] | None = None,
    ):
        super().__init__(
            spec, text_widths, width, depth, heads, mlp_ratio, activation, code_width=code_width,
            activation_checkpointing=activation_checkpointing,
        )  # fmt: skip
        self.stages = list(stages or lattice_stages(spec.length))
        if min(self.stages) < 1 or sum(self.stages) >= spec.length:
            raise UserError(f"stages {self.stages}: each needs a slot, and the last stage too, of {spec.length}")
        order = lattice_order(spec.shape)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        apart = offsets(spec.shape) + torch.tensor(spec.shape) - 1  # from 0 along each side
        self.register_buffer("apart", flat(apart, [2 * n - 1 for n in spec.shape]), persistent=False)
        self.register_buffer("near", SeenConvolution.window(spec.shape), persistent=False)
        following = torch.tensor(order).scatter(0, torch.tensor(order), torch.tensor([*order[1:], order[-1]]))
        self.register_buffer("following", following, persistent=False)  # the slot that comes after each
        lesson = training_layout(order, self.stages)
        self.register_buffer("lesson_slots", lesson.slots, persistent=False)
        self.register_buffer("lesson_asked", lesson.asked, persistent=False)
        self.questions = lesson.questions
        plain, grid = self.blocks, spec.shape if grid_convolution else None
        self.blocks = nn.ModuleList(PrefixBlock(width, heads, mlp_ratio, activation, grid) for _ in plain)
        self.blocks.load_state_dict(plain.state_dict(), strict=False)  # they are initialised

    @property
    def lesson(self) -> Layout:
        """See `training_layout`."""
        return Layout(self.lesson_slots, self.lesson_asked, self.questions)

    @property
    def scan(self) -> Layout:
        """Each slot from all tokens before it, and those behind the first of the last stage from these alone: entry i asks about
        slot i of the order."""
        read = sum(self.stages)
        ranks = torch.arange(self.spec.length, device=self.order.device)
        asked = (ranks == 0) | (ranks > read)
        return Layout(self.order[torch.where(asked, ranks, ranks - 1)], asked, ())

    def about(self, slots: Tensor, asked: Tensor) -> Tensor:
        """The slots that entries ask about."""
        return torch.where(asked, slots, self.following[slots])

    def along(self, layout: Layout, values: Tensor) -> TokenState:
        """The tokens of whole images (B, N, …) as a sequence."""
        slots = layout.slots.expand(len(values), -1)
        return TokenState(values[:, layout.slots], layout.asked.expand_as(slots), slots)

    def forward(
        self, state: TokenState, prepared: PreparedText, read: Tensor | None = None, cache: KVCache | None = None
    ) -> Prediction:
        """Without `positions`: whole images, each slot from those before it. With them: a sequence, the same in all rows, of
        tokens in their order and, anywhere behind the tokens that they see, questions (`masked`); predictions are of the slots
        that the entries ask about. With a cache: tokens of the order that follow on those in the cache, then questions; the
        caller crops the cache to the tokens."""
        if state.positions is None:
            told = torch.arange(1, 1 + sum(self.stages), device=self.order.device)
            x = self._hidden(self.along(self.scan, state.values), prepared, None, told)[:, self.order.argsort()]
        else:  # to find the tokens is less work, but a GPU's host would wait for it
            find = cache is None and state.masked.device.type == "cpu"
            x = self._hidden(state, prepared, cache, (~state.masked[0]).nonzero()[:, 0] if find else None)
        return self.head(select(x, read))

    def _hidden(self, state: TokenState, prepared: PreparedText, cache: KVCache | None, told: Tensor | None) -> Tensor:
        """told: the entries that are tokens; None = they stand anywhere."""
        about = self.about(state.positions, state.masked)
        places = self._places(state.positions[0], state.masked[0], about[0], 0 if cache is None else cache.length, told)
        x = self.embedding(state._replace(positions=about))
        for layer, (block, keys_and_values) in enumerate(zip(self.blocks, prepared.keys_and_values, strict=True)):
            arguments = (x, keys_and_values, prepared.mask, places, cache, layer)
            x = recomputed(block, *arguments, active=self.activation_checkpointing)
        return x

    def _places(self, slots: Tensor, asked: Tensor, about: Tensor, old: int, told: Tensor | None) -> Places:
        """Of entries behind the first `old` tokens of the order."""
        count = len(slots)
        every = torch.ones(count, old, dtype=torch.bool, device=slots.device)
        tokens_seen = torch.cat([every, every.new_ones(count, count).tril() & ~asked], dim=1)
        itself = torch.cat([every.new_zeros(count, old), torch.eye(count, dtype=torch.bool, device=slots.device)], dim=1)
        standing = torch.cat([self.order[:old], slots])
        apart, near = self.apart[about][:, standing], self.near[about][:, standing]
        near = near.where(tokens_seen, (2 * SeenConvolution.REACH + 1) ** len(self.spec.shape))
        return Places(told, near if told is None else near[:, told], apart, ~(tokens_seen | itself))
