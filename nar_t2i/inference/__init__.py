"""How tokens are decoded. One file a strategy."""

from nar_t2i.inference.autoregressive import Autoregressive
from nar_t2i.inference.confidence import Confidence
from nar_t2i.inference.one_step import OneStep

__all__ = ["Autoregressive", "Confidence", "OneStep"]
