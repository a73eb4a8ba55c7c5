"""Activation checkpointing: less memory for a third more work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(block: Callable[..., T], *arguments: object, active: bool) -> T:
    """block(*arguments); where `active`, and gradients are wanted, what it computes is not kept, but computed anew in the
    backward pass."""
    if active and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)
