"""Image ↔ tokens."""

from nar_t2i.tokenizers.quantizers import VectorQuantizer
from nar_t2i.tokenizers.vqgan import VQGAN

__all__ = ["VQGAN", "VectorQuantizer"]
