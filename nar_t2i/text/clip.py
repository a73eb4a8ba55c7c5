"""The text tower of CLIP (Radford et al., arXiv 2103.00020) as a text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.parts import part
from nar_t2i.text.pretrained import PretrainedTextEncoder


@part
class ClipTextEncoder(PretrainedTextEncoder):
    """Pooled: the last layer's state at the end mark, through CLIP's projection into the space it shares with images.

    final_norm: the states of a layer before the last pass CLIP's final norm, as OpenCLIP has it; False leaves them as they
    are, as most of diffusers' pipelines do. Where the network reads padding (mask_padding=False), padding sees padding, too,
    as in the published models that read it. All layers stay: the pooled state is made from the last. The other arguments:
    see PretrainedTextEncoder.
    """

    model_class = "CLIPTextModelWithProjection"
    model_types = ("clip_text_model",)

    def __init__(
        self,
        folder: str,
        pretrained: bool = True,
        trainable: str = "none",
        layer: int = -1,
        max_length: int = 77,
        mask_padding: bool = True,
        final_norm: bool = True,
    ):
        if layer == -1 and not final_norm:
            raise UserError("text encoder: final_norm false is for a layer before the last, such as layer -2")
        super().__init__(folder, pretrained, trainable, layer, max_length, mask_padding)
        self.final_norm = final_norm

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.text_model.encoder.layers

    def after_layers(self, model: nn.Module) -> list[nn.Module]:
        return [model.text_model.final_layer_norm, model.text_projection]

    def encode(self, codes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seen = self._seen(mask) if self.mask_padding else None
        output = self.network(input_ids=codes, attention_mask=seen, output_hidden_states=self.layer != -1)
        states, pooled = output.last_hidden_state, output.text_embeds
        if self.layer != -1:
            states = output.hidden_states[self.layer]
            states = self.network.text_model.final_layer_norm(states) if self.final_norm else states
        if torch.is_grad_enabled():
            # A network that reads no pooled state would leave weights without a gradient, at which DDP stops.
            states = states + 0.0 * pooled.sum()
        return states, pooled

    def _seen(self, mask: Tensor) -> Tensor:
        """What each place sees: those before it that are real. As attention takes it, see PretrainedTextEncoder.encode."""
        if self.network.config._attn_implementation != "sdpa":
            return mask.long()
        length = mask.shape[1]
        return mask[:, None, None, :] & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()

    def fingerprint(self) -> dict[str, str]:
        told = super().fingerprint()
        told |= {} if self.mask_padding else {"padding": "sees padding"}  # caches of before this was so are refused
        return told | ({} if self.final_norm else {"final_norm": "False"})

    def _shorten(self, model: nn.Module, depth: int) -> None:
        """All layers stay: the pooled state is made from the last."""

    def _pooled_width(self, config: Any) -> int:
        return config.projection_dim
