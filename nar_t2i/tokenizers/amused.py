"""aMUSEd's VQGAN (Patil et al., arXiv 2401.01808), which is diffusers' VQModel; `pip install 'nar-t2i[amused]'` brings that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.parts import part
from nar_t2i.types import Condition, Encoded, TokenCodec, TokenSpec


@part
class AmusedVQ(TokenCodec):
    """A grid of codes an image, by weights as published.

    config: VQModel's. image_size: pixels a side; it covers 2^(stages − 1) of them with a token. VQModel's colours are from
    0 to 1, those of a TokenCodec from −1 to 1. UserError where diffusers is missing, or its VQModel takes no such settings.
    """

    def __init__(self, config: dict[str, Any], image_size: int):
        super().__init__()
        try:
            from diffusers import VQModel
        except ImportError:
            raise UserError("aMUSEd's tokenizer needs the package diffusers: pip install 'nar-t2i[amused]'") from None
        try:
            self.model = VQModel.from_config({**config, "lookup_from_codebook": True})  # so that its decoder takes codes
        except (TypeError, ValueError) as error:
            raise UserError(f"aMUSEd's tokenizer: not the configuration of a VQModel: {error}") from error
        self.downsampling = 2 ** (len(self.model.config.block_out_channels) - 1)
        if image_size % self.downsampling:
            raise UserError(f"image_size {image_size} is no multiple of the downsampling {self.downsampling}")
        self.image_size, side = image_size, image_size // self.downsampling
        self.spec = TokenSpec((side, side), "categorical", self.model.config.num_vq_embeddings)

    def code_vectors(self) -> Tensor:
        """(K, D), what the decoder sees of each code."""
        return self.model.quantize.embedding.weight.detach()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        latents = self.model.encode((images + 1) / 2).latents.permute(0, 2, 3, 1).flatten(1, 2)
        latents = latents if latents.dtype == torch.float64 else latents.float()  # a neighbour in bf16 is often another one
        book = self.code_vectors().to(latents.dtype)
        codes = torch.cdist(latents.flatten(0, 1), book).argmin(1).view(latents.shape[:2])
        return Encoded(codes, (latents - book[codes]).square().sum(-1))

    @torch.no_grad()
    def decode(self, tokens: Tensor, size: int | None = None, condition: Condition | None = None) -> Tensor:
        if size not in (None, self.image_size):
            raise UserError(f"aMUSEd's tokenizer of {self.image_size} px cannot decode at {size} px")
        shape = (len(tokens), *self.spec.shape, self.code_vectors().shape[1])
        return self.model.decode(tokens, force_not_quantize=True, shape=shape).sample.clip(0, 1) * 2 - 1
