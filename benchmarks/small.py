"""What --small means in several benchmarks: sizes that any machine runs."""

from __future__ import annotations

import torch

from nar_t2i.errors import UserError
from nar_t2i.hardware import best_device

SMALL_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SMALL_CODEC = {"image_size": 64, "channels": [16, 16, 16], "blocks": 1}


def device_for(full_size: bool) -> torch.device:
    """The best device of this machine. UserError where that is no CUDA GPU, and the full size is asked for."""
    device = best_device()
    if full_size and device.type != "cuda":
        raise UserError("the full size needs a CUDA GPU; --small runs anywhere")
    return device
