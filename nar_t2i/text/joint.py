"""Several text encoders at once, as one."""

from __future__ import annotations

import torch
from torch import nn

from nar_t2i.errors import UserError
from nar_t2i.hashing import text_hash
from nar_t2i.parts import part
from nar_t2i.types import Condition, TextEncoder


@part
class JointTextEncoder(TextEncoder):
    """Each caption through all encoders.

    sequence: the numbers of the encoders whose states are read, each a stream of its own (networks put them side by
    side). pooled: the numbers of those whose pooled states are read, side by side as one vector. None: all. T5 for its
    states with CLIP for its pooled one is `sequence: [0]`, `pooled: [1]`.
    pooled_token: the pooled vector, if there is one, is one more stream, of one word; False for networks that read it as
    it is.
    `truncated` counts for the encoder that cuts off most captions. Raises UserError where an encoder would be read by
    nobody.
    """

    def __init__(
        self,
        encoders: list[TextEncoder],
        sequence: list[int] | None = None,
        pooled: list[int] | None = None,
        pooled_token: bool = True,
    ):
        super().__init__()
        every = list(range(len(encoders)))
        self._sequence, self._pooled = (every if chosen is None else chosen for chosen in (sequence, pooled))
        if not self._sequence:
            raise UserError("text encoder: sequence must name at least one of the encoders")
        if set(self._sequence) | set(self._pooled) != set(every):
            raise UserError(f"text encoder: sequence and pooled must name the encoders 0 to {len(encoders) - 1}, each at "
                            f"least once, not {self._sequence} and {self._pooled}")  # fmt: skip
        self.encoders = nn.ModuleList(encoders)
        self.widths = tuple(width for i in self._sequence for width in encoders[i].widths)
        self.pooled_width = sum(encoders[i].pooled_width for i in self._pooled)
        self._pooled_token = pooled_token and self.pooled_width > 0
        self.widths += (self.pooled_width,) if self._pooled_token else ()

    @property
    def encoded(self) -> int:
        return max(encoder.encoded for encoder in self.encoders)

    @property
    def truncated(self) -> int:
        return max(encoder.truncated for encoder in self.encoders)

    def vocabulary_hash(self) -> str:
        return text_hash(" ".join(encoder.vocabulary_hash() for encoder in self.encoders))

    def fingerprint(self) -> dict[str, str]:
        own = {"kind": type(self).__name__, "sequence": str(self._sequence), "pooled": str(self._pooled),
               "pooled_token": str(self._pooled_token)}  # fmt: skip
        parts = (
            (f"{number}.{key}", value)
            for number, encoder in enumerate(self.encoders)
            for key, value in encoder.fingerprint().items()
        )
        return {**own, **dict(parts)}

    def forward(self, captions: list[str]) -> Condition:
        conditions = [encoder(captions) for encoder in self.encoders]
        read = [conditions[i] for i in self._sequence]
        pooled = [conditions[i].pooled for i in self._pooled if conditions[i].pooled is not None]
        states = tuple(state for condition in read for state in condition.states)
        masks = tuple(mask for condition in read for mask in condition.masks)
        if not pooled:
            return Condition(states, masks)
        vector = torch.cat(pooled, -1)
        if self._pooled_token:
            states += (vector.unsqueeze(1),)
            masks += (masks[0].new_ones(len(vector), 1),)
        elif torch.is_grad_enabled():
            # A network that does not read it would leave weights without a gradient, at which DDP stops.
            states = (states[0] + 0.0 * vector.sum(), *states[1:])
        return Condition(states, masks, vector)
