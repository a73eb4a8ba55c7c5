"""VQGAN: a grid of codes an image (Esser et al., arXiv 2012.09841)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.parts import part
from nar_t2i.tokenizers.convolutional import Decoder, Encoder, LocalEncoder, OutlineEncoder, PatternEncoder
from nar_t2i.tokenizers.quantizers import Quantized, VectorQuantizer
from nar_t2i.types import Condition, Encoded, TokenCodec, TokenSpec

# Encoders that see a token's own pixels alone, by their names in recipes.
LOCAL_ENCODERS = {"local": LocalEncoder, "pattern": PatternEncoder, "outline": OutlineEncoder}


class Reconstruction(NamedTuple):
    """images: (B, 3, H, W). quantized: of the latents (B, h, w, D)."""

    images: Tensor
    quantized: Quantized


@part
class VQGAN(TokenCodec):
    """A convolutional encoder, a vector quantizer and a convolutional decoder.

    image_size: pixels a side. channels: of each stage, fine to coarse; one token covers patch · 2^(stages − 1) pixels a
    side. blocks: residual blocks a stage; encoder_blocks: the same in the encoder, where it needs fewer. attention:
    self-attention at the coarsest stage. encoder: "convolutional", the usual one; "local", each code from its own pixels
    alone (see LocalEncoder); "pattern", of these the outlines rather than the colours (see PatternEncoder); "outline",
    the same with stricter bounds between the two (see OutlineEncoder).
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: Sequence[int] = (64, 128, 256),
        blocks: int = 2,
        encoder_blocks: int | None = None,
        encoder: Literal["convolutional", "local", "pattern", "outline"] = "convolutional",
        patch: int = 2,
        attention: bool = True,
        quantizer: VectorQuantizer | None = None,
    ):
        super().__init__()
        self.downsampling = patch * 2 ** (len(channels) - 1)
        if image_size % self.downsampling:
            raise UserError(f"image_size {image_size} is no multiple of the downsampling {self.downsampling}")
        self.image_size = image_size
        self.quantizer = quantizer or VectorQuantizer()
        side = image_size // self.downsampling
        self.spec = TokenSpec((side, side), "categorical", self.quantizer.codes)
        width, encoder_blocks = self.quantizer.width, blocks if encoder_blocks is None else encoder_blocks
        if encoder == "convolutional":
            self.encoder: nn.Module = Encoder(channels, encoder_blocks, patch, width, attention)
        else:
            self.encoder = LOCAL_ENCODERS[encoder](self.downsampling, channels[-1], encoder_blocks, width)
        self.decoder = Decoder(channels, blocks, patch, self.quantizer.width, attention)
        self.to(memory_format=torch.channels_last)

    def code_vectors(self) -> Tensor:
        """(K, D), what the decoder sees of each code."""
        return self.quantizer.lookup(torch.arange(self.spec.size, device=self.quantizer.codebook.device)).detach()

    def forward(self, images: Tensor) -> Reconstruction:
        quantized = self.quantizer(self.encoder(images).permute(0, 2, 3, 1))
        return Reconstruction(self.decoder(quantized.latents.permute(0, 3, 1, 2)), quantized)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        """See TokenCodec."""
        quantized = self.quantizer(self.encoder(images).permute(0, 2, 3, 1))
        return Encoded(quantized.codes.flatten(1), quantized.error.flatten(1))

    @torch.no_grad()
    def decode(self, tokens: Tensor, size: int | None = None, condition: Condition | None = None) -> Tensor:
        """See TokenCodec. UserError for a size other than `image_size`."""
        if size not in (None, self.image_size):
            raise UserError(f"a VQGAN of {self.image_size} px cannot decode at {size} px")
        latents = self.quantizer.lookup(tokens.view(len(tokens), *self.spec.shape))
        return self.decoder(latents.permute(0, 3, 1, 2))
