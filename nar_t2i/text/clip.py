"""The text tower of CLIP (Radford et al., arXiv 2103.00020) as a text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nar_t2i.parts import part
from nar_t2i.text.pretrained import PretrainedTextEncoder


@part
class ClipTextEncoder(PretrainedTextEncoder):
    """Pooled: the last layer's state at the end mark, through CLIP's projection into the space it shares with images.

    The states of a layer before the last pass CLIP's final norm, as OpenCLIP has it. All layers stay: the pooled state
    is made from the last.
    """

    model_class = "CLIPTextModelWithProjection"
    model_types = ("clip_text_model",)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.text_model.encoder.layers

    def after_layers(self, model: nn.Module) -> list[nn.Module]:
        return [model.text_model.final_layer_norm, model.text_projection]

    def encode(self, codes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(input_ids=codes, attention_mask=mask.long(), output_hidden_states=self.layer != -1)
        states, pooled = output.last_hidden_state, output.text_embeds
        if self.layer != -1:
            states = self.network.text_model.final_layer_norm(output.hidden_states[self.layer])
        if torch.is_grad_enabled():
            # A network that reads no pooled state would leave weights without a gradient, at which DDP stops.
            states = states + 0.0 * pooled.sum()
        return states, pooled

    def _shorten(self, model: nn.Module, depth: int) -> None:
        """Nothing."""

    def _pooled_width(self, config: Any) -> int:
        return config.projection_dim
