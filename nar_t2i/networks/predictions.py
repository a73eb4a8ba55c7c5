"""What networks say: categorical and Bernoulli predictions. Both compute in fp32 or better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.noise import SlotNoise
from nar_t2i.types import Sampled

COLDEST = 1e-30  # a lower temperature takes the likeliest, as 0 does: divided by it, logits would overflow


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(R, V) logits of any precision and (R,) codes → (R,) nats."""
    return F.cross_entropy(_at_least_fp32(logits), target, reduction="none")


_cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy
_compiled: list[Callable[[Tensor, Tensor], Tensor]] = []  # made when it is first asked for


@contextmanager
def compiled_cross_entropy() -> Iterator[None]:
    """Inside, the cross-entropy is compiled: it reads logits in the network's own precision and its gradient is written in
    that, where otherwise both, and the log-probabilities between them, are written out in fp32. One compilation serves any
    number of slots.
    """
    global _cross_entropy
    if not _compiled:
        _compiled.append(torch.compile(cross_entropy))
    before, _cross_entropy = _cross_entropy, _of_any_length
    try:
        yield
    finally:
        _cross_entropy = before


def _of_any_length(logits: Tensor, target: Tensor) -> Tensor:
    for x in (logits, target):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return _compiled[0](logits, target)


class Categorical:
    """logits: (*slots, V)."""

    def __init__(self, logits: Tensor):
        self._given = logits

    @property
    def logits(self) -> Tensor:
        """In fp32 or better. They are kept, but where a loss may still ask for a gradient."""
        logits = _at_least_fp32(self._given)
        if not self._given.requires_grad:
            self._given = logits
        return logits

    def __getitem__(self, rows: slice) -> Categorical:
        return Categorical(self._given[rows])

    def nll(self, target: Tensor, noise: SlotNoise | None = None) -> Tensor:
        return _cross_entropy(self._given.flatten(0, -2), target.flatten()).view(target.shape)

    def guide(self, unconditional: Categorical, scale: float | Tensor) -> Categorical:
        difference = self.logits - unconditional.logits
        return Categorical(difference.mul_(scale).add_(unconditional.logits))  # in place: logits are the largest tensors there are

    def tempered(self, temperature: float) -> Categorical:
        return Categorical(self.logits / temperature)

    def sample(self, noise: SlotNoise, temperature: float | Tensor = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampled:
        """Inverse distribution function: one uniform number a slot, whatever V.

        temperature: a number, or a tensor that broadcasts to the logits. top_k: only so many likeliest codes are drawn, 0 =
        all. top_p: only the likeliest codes whose mass before them is below it. Both are cut from the tempered distribution.
        """
        logits = self.logits
        log_probs = logits.log_softmax(dim=-1)
        fixed = isinstance(temperature, (int, float))
        if fixed and temperature < COLDEST:
            values = log_probs.argmax(dim=-1)
        else:
            tempered = logits if fixed and temperature == 1 else logits / temperature
            probabilities, cut = _truncated(tempered.softmax(dim=-1), top_k, top_p)
            mass = probabilities.cumsum(dim=-1)
            drawn = noise.uniform("value").to(mass.dtype).unsqueeze(-1) * mass[..., -1:]
            # Where a logit is no number there is no such place, and the loss or the guard is to tell of it.
            values = torch.searchsorted(mass, drawn).squeeze(-1).clamp_(max=mass.shape[-1] - 1)
            if cut:  # a GPU's sums need not be equal where nothing is added, and a draw may fall between them
                likely = probabilities.gather(-1, values.unsqueeze(-1)).squeeze(-1) > 0
                values = values.where(likely, probabilities.argmax(dim=-1))
        return Sampled(values, log_probs.gather(-1, values.unsqueeze(-1)).squeeze(-1))


def truncation(top_k: int, top_p: float) -> dict[str, Any]:
    """The arguments of `sample` that cut off unlikely codes, if there are any: see Categorical.sample. UserError where they
    cannot be.
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"top_k {top_k} must be at least 0, top_p {top_p} above 0, to 1")
    return {"top_k": top_k, "top_p": top_p} if top_k or top_p < 1 else {}


def _truncated(probabilities: Tensor, top_k: int, top_p: float) -> tuple[Tensor, bool]:
    """(…, V) probabilities with zeros at the codes that are not to be drawn, not normalised, and whether any were cut off. Of
    equals the first stay.
    """
    cuts_k, cuts_p = 0 < top_k < probabilities.shape[-1], top_p < 1
    if not (cuts_k or cuts_p):
        return probabilities, False
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    keep = ordered.cumsum(dim=-1) - ordered < top_p
    if cuts_k:
        keep[..., top_k:] = False
    return probabilities * torch.zeros_like(keep).scatter(-1, order, keep), True


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

    def tempered(self, temperature: float) -> Bernoulli:
        return Bernoulli(self.logits / temperature)

    def sample(self, noise: SlotNoise, temperature: float | Tensor = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampled:
        """One uniform number a bit. UserError with top_k or top_p, which are for codes."""
        if top_k or top_p < 1:
            raise UserError("top_k and top_p need tokens that are codes; this network predicts bits")
        if isinstance(temperature, (int, float)) and temperature < COLDEST:
            bits = self.logits > 0
        else:
            uniform = noise.uniform("value", self.logits.shape[-1:]).to(self.logits.dtype)
            bits = uniform < (self.logits / temperature).sigmoid()
        values = bits.to(torch.uint8)
        return Sampled(values, -self.nll(values))
