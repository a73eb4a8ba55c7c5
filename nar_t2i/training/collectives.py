"""What ranks tell each other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from nar_t2i.errors import UserError

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


def on_first(work: Callable[[], None]) -> None:
    """Have the first rank do something. All must call it, and each waits for it, so that none goes on where it went wrong: what
    was raised there is a UserError on the others, unless they have ended."""
    raised: Exception | None = None
    if not distributed() or dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            raised = error
    told = None if raised is None else str(raised) if isinstance(raised, UserError) else f"the first rank: {raised!r}"
    try:
        problem = gather(told)[0]
    finally:
        if raised is not None:
            raise raised
    if problem is not None:
        raise UserError(problem)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, which must all call it, without waiting for it. On GPUs it stands in the device's
    queue; Lightning's `reduce` begins with a barrier, at which hosts wait for all that their devices have still to do.
    """
    if not distributed():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
