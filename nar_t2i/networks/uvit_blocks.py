"""The layers of aMUSEd's U-ViT (Patil et al., arXiv 2401.01808): none has a bias, and norms are RMS norms but for one.

What follows from the text and the micro-conditions alone, the keys and values of every cross-attention and the scale and
shift of every adaptive norm, each layer makes in its `prepare`, once a generation.

Shapes: B images, N tokens, C channels, L words, D the width of the condition's vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.networks.attention import CrossAttention, SelfAttention

EPS = 1e-6  # of all norms


class Affine(NamedTuple):
    """What a normalised x becomes: x · gain + shift. Both (B, 1, C)."""

    gain: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(x.dtype), x, self.gain.to(x.dtype))


KeysAndValues = tuple[Tensor, Tensor]  # (B, heads, L, C / heads) each


def rms_normalised(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x over the root of its mean square along the last dimension, times `weight`. On a CPU torch has no kernel of its own for
    it, and a norm that accumulates in fp32 reads x twice instead of writing copies of it."""
    weight = None if weight is None else weight.to(x.dtype)
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.rms_norm(x, x.shape[-1:], weight, EPS)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    normalised = x * torch.rsqrt(norm.square() / x.shape[-1] + EPS).to(x.dtype)
    return normalised if weight is None else normalised * weight


class RMSNorm(nn.Module):
    """A learned gain on `rms_normalised`."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalised(x, self.weight)


class AdaptiveNorm(nn.Module):
    """The learned gain of a norm, and a scale and shift that the condition's vector gives: of x normalised, with gain g, scale
    s and shift t, it makes x · g · (1 + s) + t. The scale and shift start at zero (our choice)."""

    def __init__(self, channels: int, condition_width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.scale_and_shift = ScaleAndShift(channels, condition_width)

    def forward(self, vector: Tensor) -> Affine:
        """vector: (B, D)."""
        gain, shift = self.scale_and_shift(vector)
        return Affine(self.weight * gain, shift)


class ScaleAndShift(nn.Module):
    """The condition's vector, (B, D) → 1 + scale and shift of C channels."""

    def __init__(self, channels: int, condition_width: int):
        super().__init__()
        self.linear = nn.Linear(condition_width, 2 * channels, bias=False)

    def forward(self, vector: Tensor) -> Affine:
        scale, shift = self.linear(F.silu(vector)).unsqueeze(1).chunk(2, dim=-1)
        return Affine(1 + scale, shift.contiguous())


class GatedMLP(nn.Module):
    """value · GELU(gate), from one width to another and back (GEGLU, arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.value = nn.Linear(channels, hidden, bias=False)
        self.gate = nn.Linear(channels, hidden, bias=False)
        self.out = nn.Linear(hidden, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(x) * F.gelu(self.gate(x)))


class PreparedLayer(NamedTuple):
    """norm_self, norm_cross, norm_mlp: of a TransformerLayer. keys_and_values: of its cross-attention."""

    norm_self: Affine
    norm_cross: Affine
    norm_mlp: Affine
    keys_and_values: KeysAndValues


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention and a gated MLP, each after an adaptive norm; the MLP's is a layer norm."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_mlp = (AdaptiveNorm(width, width) for _ in range(3))
        self.self_attention = SelfAttention(width, heads, bias=False)
        self.cross_attention = CrossAttention(width, heads, bias=False)
        self.mlp = GatedMLP(width, mlp_width)

    def prepare(self, text: Tensor, vector: Tensor) -> PreparedLayer:
        norms = (norm(vector) for norm in (self.norm_self, self.norm_cross, self.norm_mlp))
        return PreparedLayer(*norms, self.cross_attention.keys_and_values(text))

    def forward(self, x: Tensor, prepared: PreparedLayer, mask: Tensor) -> Tensor:
        x = x + self.self_attention(prepared.norm_self(rms_normalised(x)))
        x = x + self.cross_attention(prepared.norm_cross(rms_normalised(x)), prepared.keys_and_values, mask)
        return x + self.mlp(prepared.norm_mlp(F.layer_norm(x, x.shape[-1:], eps=EPS)))


def norm_over_tokens(x: Tensor) -> Tensor:
    """(B, N, C) → (B, 1, C). On a CPU torch's norm along a dimension that is not the last takes several times what a sum takes."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.square().sum(dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).sqrt().to(x.dtype)


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808, equations 1 to 3): x · (γ · n + 1) + β, where n is a
    channel's norm over the whole image, over the mean of all channels'."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C)."""
        norm = norm_over_tokens(x)
        relative = norm / (norm.mean(dim=-1, keepdim=True) + EPS)
        return torch.addcmul(self.beta.to(x.dtype), x, (1 + self.gamma * relative).to(x.dtype))


class ConvolutionBlock(nn.Module):
    """A ConvNeXt V2 block on a grid of tokens, of which the condition's vector scales and shifts the sum."""

    def __init__(self, channels: int, condition_width: int, ratio: int = 4):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = RMSNorm(channels)
        self.into = nn.Linear(channels, ratio * channels, bias=False)
        self.response = ResponseNorm(ratio * channels)
        self.out = nn.Linear(ratio * channels, channels, bias=False)
        self.scale_and_shift = ScaleAndShift(channels, condition_width)

    def forward(self, x: Tensor, prepared: Affine, grid: tuple[int, int]) -> Tensor:
        """x: (B, N, C), of which N = grid[0] · grid[1]."""
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)  # a view, channels last
        local = self.depthwise(image).permute(0, 2, 3, 1).flatten(1, 2)
        return prepared(x + self.out(self.response(F.gelu(self.into(self.norm(local))))))


class PreparedStage(NamedTuple):
    """affine: of a Stage's convolution. first, second: keys and values of its cross-attentions."""

    affine: Affine
    first: KeysAndValues
    second: KeysAndValues


class Stage(nn.Module):
    """A ConvolutionBlock and two cross-attentions to the text; nothing else lets its tokens see each other.

    Where text and channels differ in width, the text is brought to the channels' by SiLU and a projection.
    """

    def __init__(self, channels: int, heads: int, width: int):
        super().__init__()
        self.convolution = ConvolutionBlock(channels, width)
        self.text = nn.Sequential(nn.SiLU(), nn.Linear(width, channels, bias=False)) if width != channels else nn.Identity()
        self.norm_first, self.norm_second = RMSNorm(channels), RMSNorm(channels)
        self.first, self.second = (CrossAttention(channels, heads, bias=False) for _ in range(2))

    def prepare(self, text: Tensor, vector: Tensor) -> PreparedStage:
        text = self.text(text)
        read = [attention.keys_and_values(text) for attention in (self.first, self.second)]
        return PreparedStage(self.convolution.scale_and_shift(vector), *read)

    def forward(self, x: Tensor, prepared: PreparedStage, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.convolution(x, prepared.affine, grid)
        x = x + self.first(self.norm_first(x), prepared.first, mask)
        return x + self.second(self.norm_second(x), prepared.second, mask)


class Halving(nn.Module):
    """Norm, then a 2 × 2 convolution of stride 2, which is one matrix on four tokens at once: (B, h · w, C) → (B, h · w / 4, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels)
        self.linear = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        fours = self.norm(x).view(len(x), grid[0] // 2, 2, grid[1] // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        return self.linear(fours.flatten(3).flatten(1, 2))


class Doubling(nn.Module):
    """Norm, then a transposed 2 × 2 convolution of stride 2: (B, h · w, C) → (B, 4 · h · w, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels)
        self.linear = nn.Linear(channels, 4 * channels, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        fours = self.linear(self.norm(x)).view(len(x), *grid, 2, 2, -1)
        return fours.permute(0, 1, 3, 2, 4, 5).reshape(len(x), 4 * grid[0] * grid[1], -1)
