"""What a VQGAN is trained on beside its quantizer's loss: reconstruction, perception, and a discriminator."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nar_t2i.errors import UserError


def edge_loss(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical pixel gradients: blurred outlines cost more (our choice)."""
    difference = images - targets
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004): (B, 3, H, W) → (B, 1, h, w) logits, one a patch.

    widths: channels of each stride-2 convolution; GroupNorm in place of BatchNorm, so that ranks need not agree.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128)):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for fine, coarse in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(fine, coarse, 4, 2, 1), nn.GroupNorm(8, coarse), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(widths[-1], 1, 3, 1, 1)]
        self.layers = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.contiguous(memory_format=torch.channels_last)).float()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of VQGAN."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor, largest: float = 1e4) -> Tensor:
    """λ of VQGAN's equation 7: how much larger the reconstruction's gradient is at the decoder's last layer."""
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_weight, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_weight, retain_graph=True)
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, largest).detach()


class PerceptualLoss(nn.Module):
    """LPIPS-like distance (Zhang et al., arXiv 1801.03924) over VGG-16 features: unit-normalised, squared, averaged.

    weights: a local state dict of torchvision's `vgg16().features` (keys "0.weight", …; a "features." prefix is
    accepted), as .pth or .safetensors. Nothing is downloaded. All layers count alike: LPIPS's learned channel weights
    are not used (our choice). UserError where the file is missing or holds something else.
    """

    BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, weights: str):
        super().__init__()
        layers: list[nn.Module] = []
        self._taps, width = [], 3
        for block in self.BLOCKS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for out in block:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            self._taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.features.load_state_dict(self._read(weights))
        self.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def _read(self, weights: str) -> dict[str, Tensor]:
        if not Path(weights).is_file():
            raise UserError(f"perceptual loss: there is no weights file {weights}")
        wrong = UserError(f"perceptual loss: {weights} does not hold the features of a VGG-16")
        try:
            if weights.endswith(".safetensors"):
                state = load_file(weights)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise wrong from error
        if not isinstance(state, Mapping):
            raise wrong
        state = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
        expected = self.features.state_dict()
        if set(state) != set(expected) or any(state[k].shape != v.shape for k, v in expected.items()):
            raise wrong
        return state

    def train(self, mode: bool = True) -> PerceptualLoss:
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x, y = (((z + 1) / 2 - self.mean) / self.std for z in (images, targets))
        distance = x.new_zeros(())
        for index, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if index in self._taps:
                distance = distance + (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
        return distance
