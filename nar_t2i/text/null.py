"""The learned null caption: what a generator is told when it is told nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.parts import part
from nar_t2i.types import Condition


@part
class NullCaption(nn.Module):
    """A learned caption of `length` tokens a stream, and a learned pooled vector.

    Dropping a caption replaces hidden states, mask and pooled together; shorter captions are padded to it. Scalars (sizes,
    crops) stay.
    """

    def __init__(self, widths: Sequence[int], pooled_width: int = 0, length: int = 1):
        super().__init__()
        if length < 1:
            raise UserError(f"the null caption must have at least 1 token, not {length}")
        shapes = [(length, width) if length > 1 else (width,) for width in widths]
        self.states = nn.ParameterList(nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes)
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
            null = (null + tied).to(state.dtype).view(-1, null.shape[-1])
            longer = max(0, len(null) - state.shape[1])
            state, mask = F.pad(state, (0, 0, 0, longer)), F.pad(mask, (0, longer))
            first = torch.zeros_like(mask)
            first[:, : len(null)].fill_(True)
            empty = F.pad(null, (0, 0, 0, state.shape[1] - len(null)))
            states.append(torch.where(dropped[:, None, None], empty, state))
            masks.append(torch.where(dropped[:, None], first, mask))
        pooled = condition.pooled
        if pooled is not None:
            pooled = torch.where(dropped[:, None], self.pooled.to(pooled.dtype), pooled)
        return Condition(tuple(states), tuple(masks), pooled, condition.scalars)
