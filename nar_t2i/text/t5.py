"""The encoder of T5 (Raffel et al., arXiv 1910.10683) as a text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nar_t2i.parts import part
from nar_t2i.text.pretrained import PretrainedTextEncoder

_TWICE = "encoder.embed_tokens.weight"  # the same tensor as shared.weight


@part
class T5TextEncoder(PretrainedTextEncoder):
    """Pooled: the mean of the states over real tokens, as T5 has none.

    The states of a layer before the last pass T5's final norm, too: without it their scale is arbitrary (our choice).
    """

    model_class = "T5EncoderModel"
    model_types = ("t5",)

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.encoder.block

    def after_layers(self, model: nn.Module) -> list[nn.Module]:
        return [model.encoder.final_layer_norm]

    def _shorten(self, model: nn.Module, depth: int) -> None:
        super()._shorten(model, depth)
        del model.shared  # one name for one tensor: `encoder.embed_tokens`

    def _as_transformers_names(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"shared.weight" if name == _TWICE else name: value for name, value in state.items()}
