"""What ranks tell each other."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order. All must call it, and each waits for the others."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def say(text: str) -> None:
    """Print a line for the user, on the first rank alone."""
    if not distributed() or dist.get_rank() == 0:
        print(f"nar-t2i: {text}", file=sys.stderr)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, which must all call it, without waiting for it. On GPUs it stands in the device's
    queue; Lightning's `reduce` begins with a barrier, at which hosts wait for all that their devices have still to do.
    """
    if not distributed():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
