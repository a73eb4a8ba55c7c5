"""LightningModules, and what training needs."""

from nar_t2i.training.generator import GeneratorModule
from nar_t2i.training.tokenizer import TokenizerModule

__all__ = ["GeneratorModule", "TokenizerModule"]
