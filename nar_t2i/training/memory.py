"""How much memory training takes on each GPU, from the sizes of the weights alone.

Weights and optimizer states are counted as DDP and DeepSpeed lay them out, padding included; a test compares them with
what the two really hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STAGES = {"ddp": 0, "deepspeed_stage_1": 1, "deepspeed_stage_2": 2, "deepspeed_stage_3": 3}
BUCKET = 200_000_000  # elements, Lightning's default of reduce_bucket_size
PERSISTENT = 100_000  # ZeRO-3 keeps smaller parameters whole
LIVE = 1_000_000_000  # elements that ZeRO-3 holds whole at once, at most


@dataclass(frozen=True)
class Trained:
    """What a step was made of, on one rank.

    groups: elements of the trained parameters, by the optimizer's groups. frozen: of the frozen ones. apart: bytes of
    buffers, and of networks that no strategy touches. states: bytes of the optimizer's states. average: bytes of the EMA.
    """

    groups: Sequence[Sequence[int]]
    frozen: Sequence[int]
    apart: int
    states: int
    average: int


@dataclass(frozen=True)
class Held:
    """Bytes on one GPU, between two steps but for `buffers` and `gradients`, which live during one.

    weights: what the network computes with, frozen ones included. gradients: at the end of the backward passes.
    optimizer: its states, and the fp32 weights that it updates where they are others. average: the EMA. buffers:
    what gradients are sent from, and under ZeRO-3 the weights that are whole for a while.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    buffers: int

    @property
    def lasting(self) -> int:
        return self.weights + self.optimizer + self.average

    def peak(self, activations: int, accumulates: bool) -> int:
        """activations: bytes saved for the backward pass, which frees them as gradients come; accumulated gradients are
        there from the start."""
        with_them = self.gradients if accumulates else 0
        return self.lasting + self.buffers + max(activations + with_them, self.gradients)


def held(trained: Trained, ranks: int, stage: int, half: bool) -> Held:
    """What a rank of `ranks` holds.

    stage: of ZeRO, whose optimizer is AdamW; 0 = DDP. half: whether weights are computed with in 16 bits, which under
    DDP are converted on the way and under ZeRO are kept beside fp32 ones.
    """
    sizes = [size for group in trained.groups for size in group]
    total, frozen = sum(sizes), sum(trained.frozen)
    if stage == 0:  # DDP copies gradients into buckets
        return Held(4 * (total + frozen) + trained.apart, 4 * total, trained.states, trained.average, 4 * total * (ranks > 1))
    width = 2 if half else 4
    if stage == 3:
        everything = [*sizes, *trained.frozen]
        divided = sum(math.ceil(size / ranks) for size in everything)
        own = sum(math.ceil(size / ranks) for size in sizes)
        whole = sum(size for size in everything if size <= PERSISTENT)
        weights, live = divided + whole, min(LIVE, total + frozen - whole)
        gradients = (width + 4) * own
    else:
        padded = [_up(sum(group), 2 * ranks) for group in trained.groups]
        own, weights, live = sum(padded) // ranks, sum(padded) + frozen, 0
        gradients = width * (sum(padded) if stage == 1 else own) + 4 * own
    return Held(
        weights=width * weights + trained.apart,
        gradients=gradients,
        optimizer=4 * 3 * own,
        average=4 * own if trained.average else 0,
        buffers=width * (2 * BUCKET + live),  # two, so that one is filled while the other is sent
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
