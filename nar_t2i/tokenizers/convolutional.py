"""The convolutional encoder and decoder of a VQGAN (Esser et al., arXiv 2012.09841), with a space-to-depth stem.

The stem folds `patch` × `patch` pixels into channels before the first convolution and unfolds them after the last:
full-resolution feature maps cost most of the time and memory of the original and add little. For the same reason
GroupNorm stands at the coarsest stage alone. Both are our choice; `patch=1` is the original's shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.networks.attention import attend

GROUPS = 16  # of every GroupNorm


class ResidualBlock(nn.Module):
    """(B, C, H, W) → the same: SiLU, 3×3, SiLU, 3×3 (starts at zero), plus the input; a GroupNorm before, where asked for."""

    def __init__(self, channels: int, normalised: bool = False):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels) if normalised else nn.Identity()
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(F.silu(self.conv_in(F.silu(self.norm(x)))))


class SpatialAttention(nn.Module):
    """(B, C, H, W) → the same: self-attention over all positions of a feature map, at the coarsest resolution."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        y = attend(q, k, v)
        return x + self.out(y.transpose(-1, -2).reshape(b, c, h, w))


def _coarse_blocks(channels: int, blocks: int, attention: bool) -> list[nn.Module]:
    middle = [SpatialAttention(channels)] if attention else []
    return [ResidualBlock(channels, True), *middle, *(ResidualBlock(channels, True) for _ in range(blocks - 1))]


class Encoder(nn.Module):
    """Images (B, 3, H, W) → latents (B, width, H/f, W/f) with f = patch · 2^(stages − 1).

    channels: of each stage, from fine to coarse. blocks: residual blocks a stage.
    """

    def __init__(self, channels: Sequence[int], blocks: int, patch: int, width: int, attention: bool):
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch), nn.Conv2d(3 * patch**2, channels[0], 3, padding=1)]
        for fine, coarse in zip(channels[:-1], channels[1:], strict=True):
            layers += [ResidualBlock(fine) for _ in range(blocks)]
            layers += [nn.Conv2d(fine, coarse, 4, stride=2, padding=1)]
        layers += _coarse_blocks(channels[-1], blocks, attention)
        layers += [nn.GroupNorm(GROUPS, channels[-1]), nn.SiLU(), nn.Conv2d(channels[-1], width, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.contiguous(memory_format=torch.channels_last))


class LocalEncoder(nn.Module):
    """Images (B, 3, H, W) → latents (B, width, H/f, W/f), each from its own f × f pixels alone (our choice).

    An encoder that sees further spreads an image over its codes as it likes: the same plain patch gets a hundred
    different codes, and a generator has to predict that chance. Here the same patch always gets the same code.
    """

    def __init__(self, downsampling: int, channels: int, blocks: int, width: int):
        super().__init__()
        self.fold = nn.PixelUnshuffle(downsampling)
        self.project = nn.Conv2d(self.features_of(downsampling), channels, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(channels, 2 * channels, 1), nn.SiLU(), nn.Conv2d(2 * channels, channels, 1))
            for _ in range(blocks)
        )
        self.out = nn.Conv2d(channels, width, 1)

    @staticmethod
    def features_of(downsampling: int) -> int:
        """How many numbers describe a patch."""
        return 3 * downsampling**2

    def describe(self, patches: Tensor) -> Tensor:
        """Patches (B, 3 · f · f, h, w), colour by colour → what the layers see of them."""
        return patches

    def forward(self, images: Tensor) -> Tensor:
        x = self.project(self.describe(self.fold(images)).to(images.dtype).contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def largest(difference: Tensor) -> Tensor:
    """(B, 3, f · f, h, w) colours → (B, 3, 1, h, w), the longest of each patch."""
    farthest = difference.square().sum(1).argmax(1)[:, None, None].expand(-1, 3, -1, -1, -1)
    return difference.gather(2, farthest)


class PatternEncoder(LocalEncoder):
    """A LocalEncoder that sees the pattern of a patch that has one, and the colour of a plain one.

    An outline between two colours is then the same whatever the colours are, so that a few codes stand for all of them
    and a generator need not learn each outline for each pair of colours; the decoder, which sees the neighbours, colours
    it in. For flat drawings, whose colours fill whole patches somewhere. Mean-removed, gain-shape vector quantisation (Gersho
    and Gray 1992, chapter 12) in front of a learned encoder.

    With d each pixel's difference from the patch's mean colour μ, and v the largest of them, of length r: the pattern is
    p = d·v / r², which is 1 at that pixel, and the features are s·p and 2(1 − s)·μ, s = r / (r + CONTRAST).
    """

    CONTRAST = 0.05  # in colours from -1 to 1: patterns as faint as this count half

    @staticmethod
    def features_of(downsampling: int) -> int:
        return downsampling**2 + 3

    def describe(self, patches: Tensor) -> Tensor:
        x = patches.float().unflatten(1, (3, -1))  # (B, 3, f · f, h, w)
        mean = x.mean(2)
        difference = x - mean.unsqueeze(2)
        main = largest(difference)
        contrast = main.norm(dim=1)
        pattern = (difference * main).sum(1) / (contrast.square() + 1e-4)
        share = contrast / (contrast + self.CONTRAST)
        return torch.cat([share * pattern, 2 * (1 - share) * mean], dim=1)


class OutlineEncoder(PatternEncoder):
    """A PatternEncoder without a trace of colour in outlines, and without a trace of specks in colours.

    A code that an outline has in one colour alone is a code that a pair of colour and shape which training never shows
    would need, and never learns. With m the median colour, and t the SPECK-th largest of the pixels' differences from
    it, of length r: s = r² / (r² + CONTRAST²), and the features are s·p and 4(1 − s)·m. So a patch of which fewer than SPECK
    pixels differ counts as plain; the decoder sees from its neighbours what belongs there.
    """

    SPECK = 6

    def __init__(self, downsampling: int, channels: int, blocks: int, width: int):
        if downsampling**2 < self.SPECK:
            raise UserError(f"VQGAN: encoder outline needs {self.SPECK} pixels a token or more, not {downsampling**2}")
        super().__init__(downsampling, channels, blocks, width)

    def describe(self, patches: Tensor) -> Tensor:
        x = patches.float().unflatten(1, (3, -1))  # (B, 3, f · f, h, w)
        mean, median = x.mean(2, keepdim=True), x.median(2, keepdim=True).values
        difference = x - mean
        main = largest(difference)
        pattern = (difference * main).sum(1) / (main.square().sum(1) + 1e-4)
        contrast = (x - median).square().sum(1).topk(self.SPECK, dim=1).values[:, -1:]  # r²
        share = contrast / (contrast + self.CONTRAST**2)
        return torch.cat([share * pattern, 4 * (1 - share) * median.squeeze(2)], dim=1)


class Upsample(nn.Module):
    """Twice the resolution: a 1×1 convolution to four times the channels, unfolded, so no pixel is computed twice."""

    def __init__(self, coarse: int, fine: int):
        super().__init__()
        self.expand = nn.Conv2d(coarse, 4 * fine, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.expand(x), 2)


class Decoder(nn.Module):
    """Latents (B, width, H/f, W/f) → images (B, 3, H, W), the encoder's mirror image."""

    def __init__(self, channels: Sequence[int], blocks: int, patch: int, width: int, attention: bool):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(width, channels[-1], 3, padding=1)]
        layers += _coarse_blocks(channels[-1], blocks, attention)
        for coarse, fine in zip(channels[:0:-1], channels[-2::-1], strict=True):
            layers += [Upsample(coarse, fine)]
            layers += [ResidualBlock(fine) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.SiLU())
        self.to_pixels = nn.Sequential(nn.Conv2d(channels[0], 3 * patch**2, 3, padding=1), nn.PixelShuffle(patch))

    def forward(self, latents: Tensor) -> Tensor:
        return self.to_pixels(self.layers(latents.contiguous(memory_format=torch.channels_last)))

    @property
    def last_weight(self) -> nn.Parameter:
        """The last layer's weight, at which the adaptive discriminator weight compares gradients."""
        return self.to_pixels[0].weight
