"""Every slot from the prefixes that it is drawn from, for networks with an order in stages."""

from __future__ import annotations

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.learning.terms import term
from nar_t2i.networks.prefix import Layout
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.types import LearningStrategy, Term, TokenBatch, TokenNetwork


@part
class Prefixes(LearningStrategy):
    """The mean negative log-likelihood of a PrefixDecoder's lesson, in one pass: of each token given all that come before it,
    as far as tokens are read, and given what stood before its stage.

    most: at most this many slots of each stage are asked about, from what stood before it, in a step: others in each step, the
    same for all images, and weighted to stand for the whole stage. Later stages are large, and easy. Validation asks about all.
    """

    causal = True

    def __init__(self, most: int = 8):
        super().__init__()
        if most < 1:
            raise UserError(f"Prefixes: most {most} must be at least 1")
        self.most = most

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        if not network.staged:
            raise UserError(f"Prefixes teaches a PrefixDecoder; {type(network).__name__} has no order in stages")
        entries, weights = self._chosen(network.lesson, noise.seed, progress)
        lesson = network.lesson.take(entries)
        about = network.about(lesson.slots, lesson.asked)
        prediction = network(network.along(lesson, batch.tokens), network.prepare(batch.condition))
        nll = prediction.nll(batch.tokens[:, about], noise.at(0, about.expand(len(batch.tokens), -1)))
        per_image = (nll * weights).sum(dim=1) / weights.sum()
        return {"loss": term(per_image)}

    def _chosen(self, lesson: Layout, seed: int, progress: float) -> tuple[Tensor, Tensor]:
        """(K,) the entries of a step, and what each weighs. No sample's own: by the run's seed and how far it has come."""
        device, done = lesson.slots.device, 0
        by_step = Noise(seed, torch.full((1,), int(progress * 2**40), device=device))
        entries, weights = [], []
        for stage, questions in enumerate(lesson.questions):
            count = min(self.most, len(questions)) if self.training else len(questions)
            chosen = by_step.uniform("asked", stage, (len(questions),))[0].argsort()[:count] + questions.start
            entries += [torch.arange(done, questions.start, device=device), chosen]
            weights += [
                torch.ones(questions.start - done, device=device),
                torch.full((count,), len(questions) / max(1, count), device=device),
            ]
            done = questions.stop
        return torch.cat(entries), torch.cat(weights)
