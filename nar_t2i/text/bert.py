"""BERT (Devlin et al., arXiv 1810.04805) as a text encoder, pretrained or not, frozen or trained."""

from __future__ import annotations

from nar_t2i.parts import part
from nar_t2i.text.pretrained import PretrainedTextEncoder


@part
class BertTextEncoder(PretrainedTextEncoder):
    """The last layer's states. Without BERT's pooler, which was made for next-sentence prediction (our choice)."""

    model_class = "BertModel"
    model_type = "bert"
    model_arguments = {"add_pooling_layer": False}
