"""Hidden tokens are not all masked: some are replaced, some stay (BERT, arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.learning.masked import Masked
from nar_t2i.learning.terms import term
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import FixedRatio, MaskSchedule, TruncatedGaussian
from nar_t2i.types import Term, TokenBatch, TokenNetwork, TokenSpec, TokenState, over_values


def random_values(noise: Noise, spec: TokenSpec, stream: str) -> Tensor:
    """(B, N, *value_shape) codes or bits, each as likely as any."""
    if spec.kind == "continuous":
        raise UserError("tokens that are real vectors have no random values to be replaced by")
    if spec.kind == "categorical":
        return noise.integers(stream, spec.size, shape=(spec.length,))
    return (noise.uniform(stream, shape=(spec.length, spec.size)) < 0.5).to(spec.dtype)


@part
class Replaced(Masked):
    """Of the slots that the schedule chooses, a share shows random tokens and a share the true ones; the rest is masked.

    replaced, kept: these shares, 0.1 each in BERT. A network that has met wrong tokens trusts none blindly, and can be
    asked to mend its own (PaDIR, arXiv 2407.21046). visible_weight: of the loss at slots that were not chosen, over that
    at chosen ones; 0 leaves them out. The rest: see Masked.
    """

    def __init__(
        self,
        replaced: float = 0.1,
        kept: float = 0.1,
        visible_weight: float = 0.0,
        schedule: MaskSchedule | TruncatedGaussian | FixedRatio = "cosine",
        curriculum: float = 0.0,
        first_ceiling: float = 0.4,
        regions: float = 0.0,
        everything: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__(schedule, curriculum, first_ceiling, regions, everything, label_smoothing)
        if not (replaced >= 0 and kept >= 0 and replaced + kept <= 1 and visible_weight >= 0):
            raise UserError(f"Replaced: the shares replaced {replaced} and kept {kept} must be 0 to 1 together, "
                            f"visible_weight {visible_weight} at least 0")  # fmt: skip
        self.replaced, self.kept, self.visible_weight = replaced, kept, visible_weight

    def state(self, batch: TokenBatch, chosen: Tensor, noise: Noise, spec: TokenSpec) -> TokenState:
        """What the network sees. chosen: (B, N)."""
        share = noise.uniform("replaced", shape=(spec.length,))
        wrong = chosen & (share < self.replaced)
        masked = chosen & (share >= self.replaced + self.kept)
        other = random_values(noise, spec, "replacement") if self.replaced else batch.tokens
        return TokenState(torch.where(over_values(wrong, batch.tokens), other, batch.tokens), masked)

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        chosen = self.masks(noise, network.spec, progress)
        read = torch.ones_like(chosen) if self.visible_weight else chosen
        draws = noise.at(0, read)
        prediction = network(self.state(batch, chosen, noise, network.spec), network.prepare(batch.condition), read=draws.places)
        found = self.nll(prediction, draws.of(batch.tokens), draws)
        nll = torch.zeros(read.shape, device=read.device, dtype=found.dtype).index_put((draws.rows, draws.positions), found)
        weights = chosen + self.visible_weight * ~chosen
        return {"loss": term((nll * weights).sum(1) / weights.sum(1))}
