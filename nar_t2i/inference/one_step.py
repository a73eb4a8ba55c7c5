"""Fully non-autoregressive decoding: every token in one pass (Emage, arXiv 2312.14988)."""

from __future__ import annotations

from nar_t2i.inference.confidence import Confidence
from nar_t2i.parts import part


@part
class OneStep(Confidence):
    """One pass. temperature 0, the default, takes every token's mode."""

    def __init__(self, temperature: float = 0.0):
        super().__init__(steps=1, temperature=temperature, choice_temperature=0.0)
