"""Caption → text states. One file an encoder."""

from nar_t2i.text.bert import BertTextEncoder
from nar_t2i.text.null import NullCaption
from nar_t2i.text.scratch import ScratchTextEncoder

__all__ = ["BertTextEncoder", "NullCaption", "ScratchTextEncoder"]
