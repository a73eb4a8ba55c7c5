"""Toy codecs, networks and text of four tokens: what the types must hold, from the first day.

Masked categorical, causal with a cache, binary, and continuous with a diffusion head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.networks.attention import SelfAttention, attend, merge_heads, split_heads
from nar_t2i.networks.predictions import Categorical
from nar_t2i.networks.tokens import TokenEmbedding, TokenHead, select
from nar_t2i.noise import SlotNoise
from nar_t2i.parts import part
from nar_t2i.text.layers import copied
from nar_t2i.types import (
    Condition,
    Encoded,
    KVCache,
    Prediction,
    Sampled,
    TextEncoder,
    TokenCodec,
    TokenNetwork,
    TokenSpec,
    TokenState,
)

WIDTH, HEADS = 16, 2


@part
class ToyCodec(TokenCodec):
    """2 × 2 patches. categorical: one of 4 brightness levels; binary: is each channel bright; continuous: channel means."""

    SPECS = {
        "categorical": TokenSpec((2, 2), "categorical", 4),
        "binary": TokenSpec((2, 2), "binary", 3),
        "continuous": TokenSpec((4,), "continuous", 3),
    }

    def __init__(self, kind: Literal["categorical", "binary", "continuous"] = "categorical", image_size: int = 16):
        super().__init__()
        self.spec, self.image_size = self.SPECS[kind], image_size
        self.register_buffer("gain", torch.ones(()))

    def encode(self, images: Tensor) -> Encoded:
        means = F.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)  # (B, 4, 3)
        if self.spec.kind == "categorical":
            return Encoded(((means.mean(-1) + 1) * 2).long().clamp(0, 3), None)
        return Encoded((means > 0).to(torch.uint8) if self.spec.kind == "binary" else means, None)

    def decode(self, tokens: Tensor, size: int | None = None, condition: Condition | None = None) -> Tensor:
        if self.spec.kind == "categorical":
            means = ((tokens.float() + 0.5) / 2 - 1).unsqueeze(-1).expand(-1, -1, 3)
        else:
            means = 2 * tokens.float() - 1 if self.spec.kind == "binary" else tokens
        side = size or self.image_size
        return F.interpolate(means.transpose(1, 2).unflatten(2, (2, 2)), size=(side, side))


@part
class ToyText(TextEncoder):
    """One state a word, by a hash of its letters."""

    def __init__(self) -> None:
        super().__init__()
        self.widths, self.pooled_width = (WIDTH,), WIDTH
        self.embedding = nn.Embedding(64, WIDTH)

    def forward(self, captions: list[str]) -> Condition:
        rows = [[sum(map(ord, word)) % 64 for word in caption.split()] or [0] for caption in captions]
        length = max(map(len, rows))
        codes = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
        codes, mask = copied(self.embedding.weight.device, codes, mask)
        states = self.embedding(codes)
        return Condition((states,), (mask,), (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class ToyTrunk(TokenNetwork):
    """One attention layer over tokens, told the pooled text."""

    def __init__(self, spec: TokenSpec, text_widths: Sequence[int]):
        super().__init__()
        self.spec = spec
        self.embedding = TokenEmbedding(spec, WIDTH)
        self.text = nn.Linear(text_widths[0], WIDTH)
        self.attention = SelfAttention(WIDTH, HEADS)
        self.head = self.make_head(spec)

    def make_head(self, spec: TokenSpec) -> nn.Module:
        return TokenHead(spec, WIDTH)

    def prepare(self, condition: Condition) -> Tensor:
        return self.text(condition.pooled).unsqueeze(1)

    def forward(self, state: TokenState, prepared: Tensor, read: Tensor | None = None, cache: KVCache | None = None) -> Prediction:
        x = self.embedding(state) + prepared
        return self.head(select(x + self.attention(x), read))


@part
class ToyMasked(ToyTrunk):
    """Categorical tokens."""

    def __init__(self, spec: TokenSpec, text_widths: Sequence[int]):
        super().__init__(spec, text_widths)


@part
class ToyBinary(ToyTrunk):
    """Bits."""

    def __init__(self, spec: TokenSpec, text_widths: Sequence[int]):
        super().__init__(spec, text_widths)


class ToyDiffusion:
    """A diffusion head's prediction: v-prediction at a slot's hidden state, five DDIM steps."""

    logits = None
    STEPS = 5

    def __init__(self, hidden: Tensor, head: ToyDiffusionHead, unconditional: Tensor | None = None, scale: float = 1.0):
        self.hidden, self.head, self.unconditional, self.scale = hidden, head, unconditional, scale

    def __getitem__(self, rows: slice) -> ToyDiffusion:
        return ToyDiffusion(self.hidden[rows], self.head)

    def nll(self, target: Tensor, noise: SlotNoise | None = None) -> Tensor:
        time = noise.uniform("diffusion time").unsqueeze(-1)
        error = noise.normal("diffusion noise", target.shape[-1:])
        signal, spread = torch.cos(time * math.pi / 2), torch.sin(time * math.pi / 2)
        v = self.head.v(self.hidden, signal * target + spread * error, time)
        return (v - (signal * error - spread * target)).square().sum(-1)

    def guide(self, unconditional: ToyDiffusion, scale: float | Tensor) -> ToyDiffusion:
        return ToyDiffusion(self.hidden, self.head, unconditional.hidden, scale)

    def sample(self, noise: SlotNoise, temperature: float | Tensor = 1.0) -> Sampled:
        x = temperature * noise.normal("value", (self.head.channels,))
        for step in range(self.STEPS):
            now, after = (torch.full_like(x[..., :1], 1 - (step + d) / self.STEPS) for d in (0, 1))
            v = self.head.v(self.hidden, x, now)
            if self.unconditional is not None:
                other = self.head.v(self.unconditional, x, now)
                v = other + self.scale * (v - other)
            signal, spread = torch.cos(now * math.pi / 2), torch.sin(now * math.pi / 2)
            clean, error = signal * x - spread * v, spread * x + signal * v
            x = torch.cos(after * math.pi / 2) * clean + torch.sin(after * math.pi / 2) * error
        return Sampled(x, None)


class ToyDiffusionHead(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(nn.Linear(WIDTH + channels + 1, 32), nn.SiLU(), nn.Linear(32, channels))

    def v(self, hidden: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self.layers(torch.cat([hidden, x, time], dim=-1))

    def forward(self, hidden: Tensor) -> ToyDiffusion:
        return ToyDiffusion(hidden, self)


@part
class ToyContinuous(ToyTrunk):
    """Real vectors, by a diffusion head."""

    def __init__(self, spec: TokenSpec, text_widths: Sequence[int]):
        super().__init__(spec, text_widths)

    def make_head(self, spec: TokenSpec) -> nn.Module:
        return ToyDiffusionHead(spec.size)


@part
class ToyCausal(TokenNetwork):
    """One causal attention layer with a cache; slot i is predicted from the values before it."""

    causal = True

    def __init__(self, spec: TokenSpec, text_widths: Sequence[int]):
        super().__init__()
        self.spec = spec
        self.value = nn.Embedding(spec.size + 1, WIDTH)  # the last row stands before slot 0
        self.position = nn.Parameter(torch.randn(spec.length, WIDTH))
        self.text = nn.Linear(text_widths[0], WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, spec.size)

    def prepare(self, condition: Condition) -> Tensor:
        return self.text(condition.pooled).unsqueeze(1)

    def forward(self, state: TokenState, prepared: Tensor, read: Tensor | None = None, cache: KVCache | None = None) -> Prediction:
        before, slots = state.values, state.positions
        if cache is None:
            slots = torch.arange(self.spec.length).expand(len(before), -1)
            before = F.pad(before[:, :-1], (1, 0))
        before = torch.where(slots == 0, self.spec.size, before)
        x = self.value(before) + self.position[slots] + prepared
        q, k, v = (split_heads(y, HEADS) for y in self.qkv(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.append(0, k, v)
        seen = torch.arange(k.shape[2]) <= slots[0].unsqueeze(-1)
        return Categorical(self.head(select(x + merge_heads(attend(q, k, v, seen)), read)))
