"""BERT (Devlin et al., arXiv 1810.04805) as a text encoder."""

from __future__ import annotations

from torch import Tensor, nn

from nar_t2i.parts import part
from nar_t2i.text.layers import mean_state
from nar_t2i.text.pretrained import PretrainedTextEncoder


@part
class BertTextEncoder(PretrainedTextEncoder):
    """Pooled: the mean of the states over real tokens. BERT's own pooler was made for next-sentence prediction."""

    model_class = "BertModel"
    model_types = ("bert",)
    model_arguments = {"add_pooling_layer": False}

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.encoder.layer

    def encode(self, codes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # As attention takes it. Of one that has another form `transformers` asks whether there is padding at all, for which a GPU's
        # work would have to end first, in every step.
        seen = mask[:, None, None, :] if self.network.config._attn_implementation == "sdpa" else mask.long()
        states = self.network(input_ids=codes, attention_mask=seen).last_hidden_state
        return states, mean_state(states, mask)
