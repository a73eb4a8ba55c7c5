"""VGG-16 features of random weights: no file of trained ones is needed to see the perceptual loss run."""

import torch
from torch import Tensor

from nar_t2i.tokenizers.losses import PerceptualLoss


def random_vgg() -> dict[str, Tensor]:
    """The state dict of torchvision's `vgg16().features`."""
    torch.manual_seed(0)
    state, index, width = {}, 0, 3
    for block in PerceptualLoss.BLOCKS:
        for out in block:
            state[f"{index}.weight"] = torch.randn(out, width, 3, 3) / (9 * width) ** 0.5
            state[f"{index}.bias"] = torch.zeros(out)
            width, index = out, index + 2
        index += 1
    return state
