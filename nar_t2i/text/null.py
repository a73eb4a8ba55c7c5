"""The learned null caption: what a generator is told when it is told nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nar_t2i.parts import part
from nar_t2i.types import Condition


@part
class NullCaption(nn.Module):
    """A learned one-token caption a stream, and a learned pooled vector.

    Dropping a caption replaces hidden states, mask and pooled together. Scalars (sizes, crops) stay.
    """

    def __init__(self, widths: Sequence[int], pooled_width: int = 0):
        super().__init__()
        self.states = nn.ParameterList(nn.Parameter(0.02 * torch.randn(width)) for width in widths)
        self.pooled = nn.Parameter(torch.zeros(pooled_width)) if pooled_width else None
        for parameter in self.parameters():
            parameter.no_decay = True

    def forward(self, condition: Condition, dropped: Tensor | None = None) -> Condition:
        """The condition with the rows where `dropped` (B,) is True replaced; None replaces all."""
        if dropped is None:
            dropped = torch.ones(len(condition.states[0]), dtype=torch.bool, device=condition.states[0].device)
        # A network that reads no pooled state would leave its parameter without a gradient, at which DDP stops.
        tied = 0.0 if self.pooled is None else 0.0 * self.pooled.sum()
        states, masks = [], []
        for null, state, mask in zip(self.states, condition.states, condition.masks, strict=True):
            first = torch.zeros_like(mask)
            first[:, 0] = True
            empty = first.unsqueeze(-1) * (null + tied).to(state.dtype)
            states.append(torch.where(dropped[:, None, None], empty, state))
            masks.append(torch.where(dropped[:, None], first, mask))
        pooled = condition.pooled
        if pooled is not None:
            pooled = torch.where(dropped[:, None], self.pooled.to(pooled.dtype), pooled)
        return Condition(tuple(states), tuple(masks), pooled, condition.scalars)
