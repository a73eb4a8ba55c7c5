"""Pixels as models and as people see them."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float, about [−1, 1] → uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


def to_arrays(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) uint8 on any device → (B, H, W, 3) uint8."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) uint8 on any device → B pictures."""
    return [Image.fromarray(image) for image in to_arrays(images)]
