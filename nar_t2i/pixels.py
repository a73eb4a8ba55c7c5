"""Pixels as models and as people see them."""

from __future__ import annotations

from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float, about [−1, 1] → uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()
