"""Decoding in an order that spreads over the image (Halton scheduler, Besnier et al., arXiv 2503.17076)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from nar_t2i.inference.ordered import Ordered
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.types import TokenSpec

BASES = (2, 3, 5)


def mirrored(number: int, base: int, size: int) -> int:
    """Which of `size` equal parts of 0 to 1 the radical inverse of `number` falls into, whose digits are those of `number`
    behind the point, mirrored: 6 = 110 in base 2 is 0.011, in the second of four. In whole numbers, since it often falls on an
    edge.
    """
    inverse, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        inverse, scale = inverse * base + digit, scale * base
    return inverse * size // scale


def halton_order(shape: tuple[int, ...]) -> list[int]:
    """The slots of a grid, or a sequence, in the order in which the points of the Halton sequence first fall into them."""
    found: dict[int, None] = {}
    number = 0
    while len(found) < math.prod(shape):
        slot = 0
        for size, base in zip(shape, BASES):
            slot = slot * size + mirrored(number, base, size)
        found.setdefault(slot)
        number += 1
    return list(found)


@functools.lru_cache(maxsize=64)
def halton_rank(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(N,) the place of each slot in that order; made and moved once."""
    return torch.tensor(halton_order(shape)).argsort().to(device)


@part
class Halton(Ordered):
    """Tokens of one pass lie far from each other, so that drawing them apart does little harm. All images share one order.
    The rest: see Scheduled."""

    def order(self, spec: TokenSpec, noise: Noise) -> Tensor:
        return halton_rank(spec.shape, noise.ids.device).expand(len(noise.ids), -1)
