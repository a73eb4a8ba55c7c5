"""Caption → text states. One file an encoder."""

from nar_t2i.text.bert import BertTextEncoder
from nar_t2i.text.clip import ClipTextEncoder
from nar_t2i.text.joint import JointTextEncoder
from nar_t2i.text.null import NullCaption
from nar_t2i.text.scratch import ScratchTextEncoder
from nar_t2i.text.t5 import T5TextEncoder

__all__ = ["BertTextEncoder", "ClipTextEncoder", "JointTextEncoder", "NullCaption", "ScratchTextEncoder", "T5TextEncoder"]
