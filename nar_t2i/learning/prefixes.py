"""Every slot from the prefixes that it is drawn from, for networks with an order in stages."""

from __future__ import annotations

import torch

from nar_t2i.errors import UserError
from nar_t2i.networks.prefix import Layout
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.types import LearningStrategy, Term, TokenBatch, TokenNetwork


@part
class Prefixes(LearningStrategy):
    """The mean negative log-likelihood over all questions of a PrefixDecoder's lesson, in one pass: each token given all that come
    before it, and given what stood before its stage.

    last: the share of the last stage's slots that a step asks about, others at each step and the same for all images, which
    stand for all of them. They are three quarters of an image, and the easiest. Validation asks about all.
    """

    causal = True

    def __init__(self, last: float = 1 / 3):
        super().__init__()
        if not 0 < last <= 1:
            raise UserError(f"Prefixes: the share last {last} must be above 0, to 1")
        self.last = last

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        if not hasattr(network, "lesson"):
            raise UserError(f"Prefixes teaches a PrefixDecoder; {type(network).__name__} has no order in stages")
        lesson, behind = network.lesson, network.spec.length - sum(network.stages)
        weights = torch.ones(len(lesson.places), device=batch.tokens.device)
        count = max(1, round(self.last * behind)) if self.training else behind
        if count < behind:
            by_step = Noise(0, torch.tensor([int(progress * 2**40)], device=batch.tokens.device))
            chosen = by_step.uniform("last stage", shape=(behind,))[0].argsort()[:count]
            slots = torch.cat([lesson.slots[:-behind], lesson.slots[-behind:][chosen]])
            lesson = Layout(slots, lesson.asked[: len(slots)], lesson.places[: count - behind], lesson.told)
            weights = torch.cat([weights[:-behind], weights[-count:] * behind / count])
        asked = lesson.slots[lesson.places]
        read = lesson.places.expand(len(batch.tokens), -1)
        prediction = network(network.along(lesson, batch.tokens), network.prepare(batch.condition), read)
        nll = prediction.nll(batch.tokens[:, asked], noise.at(0, asked.expand_as(read)))
        per_image = (nll * weights).sum(dim=1) / weights.sum()
        return {"loss": Term(per_image.sum(), torch.tensor(len(per_image), device=per_image.device))}
