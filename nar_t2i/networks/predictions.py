"""What networks say: categorical and Bernoulli predictions. Both compute in fp32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_t2i.noise import SlotNoise
from nar_t2i.types import Sampled


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Categorical:
    """logits: (*slots, V)."""

    def __init__(self, logits: Tensor):
        self.logits = _at_least_fp32(logits)

    def __getitem__(self, rows: slice) -> Categorical:
        return Categorical(self.logits[rows])

    def nll(self, target: Tensor, noise: SlotNoise | None = None) -> Tensor:
        return F.cross_entropy(self.logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)

    def guide(self, unconditional: Categorical, scale: float | Tensor) -> Categorical:
        return Categorical(unconditional.logits + scale * (self.logits - unconditional.logits))

    def sample(self, noise: SlotNoise, temperature: float | Tensor = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampled:
        """Inverse distribution function: one uniform number a slot, whatever V.

        temperature: a number, or a tensor that broadcasts to the logits. top_k: only so many likeliest codes are drawn, 0 = all. top_p: only the
        likeliest codes whose mass before them is below it. Both are cut from the tempered distribution.
        """
        log_probs = self.logits.log_softmax(dim=-1)
        if isinstance(temperature, (int, float)) and temperature == 0:
            values = log_probs.argmax(dim=-1)
        else:
            mass = _truncated((self.logits / temperature).softmax(dim=-1), top_k, top_p).cumsum(dim=-1)
            drawn = noise.uniform("value").to(mass.dtype).unsqueeze(-1) * mass[..., -1:]
            values = (mass < drawn).sum(dim=-1)
        return Sampled(values, log_probs.gather(-1, values.unsqueeze(-1)).squeeze(-1))


def _truncated(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """(…, V) probabilities with zeros at the codes that are not to be drawn; not normalised. Of equals the first stay."""
    if not 0 < top_k < probabilities.shape[-1] and top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    keep = ordered.cumsum(dim=-1) - ordered < top_p
    if top_k:
        keep[..., top_k:] = False
    return probabilities * torch.zeros_like(keep).scatter(-1, order, keep)


class Bernoulli:
    """logits: (*slots, bits), of independent bits."""

    def __init__(self, logits: Tensor):
        self.logits = _at_least_fp32(logits)

    def __getitem__(self, rows: slice) -> Bernoulli:
        return Bernoulli(self.logits[rows])

    def nll(self, target: Tensor, noise: SlotNoise | None = None) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.logits, target.to(self.logits.dtype), reduction="none").sum(-1)

    def guide(self, unconditional: Bernoulli, scale: float | Tensor) -> Bernoulli:
        return Bernoulli(unconditional.logits + scale * (self.logits - unconditional.logits))

    def sample(self, noise: SlotNoise, temperature: float | Tensor = 1.0) -> Sampled:
        """One uniform number a bit."""
        if isinstance(temperature, (int, float)) and temperature == 0:
            bits = self.logits > 0
        else:
            uniform = noise.uniform("value", self.logits.shape[-1:]).to(self.logits.dtype)
            bits = uniform < (self.logits / temperature).sigmoid()
        values = bits.to(torch.uint8)
        return Sampled(values, -self.nll(values))
