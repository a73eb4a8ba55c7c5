"""A network under guidance, which counts its passes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.schedules import Guidance
from nar_t2i.types import Condition, Known, KVCache, Prediction, TokenNetwork, TokenSpec, TokenState, over_values


def start_state(spec: TokenSpec, batch: int, device: torch.device, known: Known | None) -> tuple[Tensor, Tensor]:
    """(tokens, masked): all unknown, or what is known filled in."""
    tokens = spec.blank(batch, device)
    masked = torch.ones(batch, spec.length, dtype=torch.bool, device=device)
    if known is None:
        return tokens, masked
    return torch.where(over_values(known.mask, tokens), known.tokens, tokens), ~known.mask


def paired(condition: Condition, null: Condition) -> Condition:
    """The rows of `condition`, then those of `null`, whose text may have another length."""

    def stack(a: Tensor, b: Tensor) -> Tensor:
        out = a.new_zeros(len(a) + len(b), max(a.shape[1], b.shape[1]), *a.shape[2:])
        out[: len(a), : a.shape[1]] = a
        out[len(a) :, : b.shape[1]] = b
        return out

    return Condition(
        tuple(map(stack, condition.states, null.states)),
        tuple(map(stack, condition.masks, null.masks)),
        None if condition.pooled is None else torch.cat([condition.pooled, null.pooled]),
        {name: torch.cat([value, null.scalars[name]]) for name, value in condition.scalars.items()},
    )


class GuidedNetwork:
    """Calls a network on conditional and unconditional rows at once and combines them: `u + s·(c − u)`.

    Each text is prepared once, for all steps, when it is first needed. `passes` counts network calls, `rows` row evaluations an
    image. With a cache, the unconditional rows are evaluated throughout, since the cache must hold them when guidance begins.
    """

    def __init__(self, network: TokenNetwork, condition: Condition, null: Condition, guidance: Guidance):
        self.network, self.guidance = network, guidance
        self.batch = len(condition.states[0]) if condition.states else len(condition.pooled)
        self.passes = self.rows = 0
        self._condition, self._null = condition, null

    @cached_property
    def _plain(self) -> Any:
        return self.network.prepare(self._condition)

    @cached_property
    def _paired(self) -> Any:
        return self.network.prepare(paired(self._condition, self._null))

    def __call__(
        self, state: TokenState, progress: float | None, read: Tensor | None = None, cache: KVCache | None = None
    ) -> Prediction:
        """The guided prediction at `read`; progress says where guidance stands, see `pass_progress`."""
        if self.network.causal != (cache is not None):
            sees = (
                "only what stands before: Autoregressive decodes it, or Particles"
                if self.network.causal
                else "all slots at once: not Autoregressive"
            )
            raise UserError(f"{type(self.network).__name__} sees {sees}")
        if self.network.judges:
            raise UserError(f"{type(self.network).__name__} judges tokens and draws none: CriticGuided asks it beside a generator")
        scale = self.guidance.at(progress)
        self.passes += 1
        if self.guidance.scale == 1 or (scale == 1 and cache is None):
            self.rows += 1
            return self.network(state, self._plain, read, cache)
        self.rows += 2
        twice = TokenState(*(None if x is None else torch.cat([x, x]) for x in state))
        both = self.network(twice, self._paired, None if read is None else torch.cat([read, read]), cache)
        conditional, unconditional = both[: self.batch], both[self.batch :]
        return conditional.guide(unconditional, scale)

    def both(self, rows: Tensor) -> Tensor:
        """Rows of the batch → the rows of a cache, which holds the unconditional ones behind them."""
        return rows if self.guidance.scale == 1 else torch.cat([rows, rows + self.batch])
