"""What ranks tell each other in a step, without waiting for it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, which must all call it. On GPUs it stands in the device's queue; Lightning's
    `reduce` begins with a barrier, at which hosts wait for all that their devices have still to do.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
