"""How tokens are decoded. One file a strategy."""

from nar_t2i.inference.autoregressive import Autoregressive
from nar_t2i.inference.best_of import BestOf, CriticScore, Likelihood
from nar_t2i.inference.confidence import AmusedConfidence, Confidence
from nar_t2i.inference.critic_guided import CriticGuided
from nar_t2i.inference.entropy_bounded import EntropyBounded
from nar_t2i.inference.gibbs import GibbsSweeps
from nar_t2i.inference.halton import Halton
from nar_t2i.inference.moment import Moment
from nar_t2i.inference.one_step import OneStep
from nar_t2i.inference.ordered import RandomOrder
from nar_t2i.inference.particles import Particles
from nar_t2i.inference.progressive import ProgressiveStages
from nar_t2i.inference.purity import Purity

__all__ = [
    "AmusedConfidence", "Autoregressive", "BestOf", "Confidence", "CriticGuided", "CriticScore", "EntropyBounded", "GibbsSweeps",
    "Halton", "Likelihood", "Moment", "OneStep", "Particles", "ProgressiveStages", "Purity", "RandomOrder",
]  # fmt: skip
