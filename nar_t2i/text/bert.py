"""BERT (Devlin et al., arXiv 1810.04805) as a text encoder."""

from __future__ import annotations

from torch import nn

from nar_t2i.parts import part
from nar_t2i.text.pretrained import PretrainedTextEncoder


@part
class BertTextEncoder(PretrainedTextEncoder):
    """Pooled: the mean of the states over real tokens. BERT's own pooler was made for next-sentence prediction."""

    model_class = "BertModel"
    model_types = ("bert",)
    model_arguments = {"add_pooling_layer": False}

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.encoder.layer
