"""Is a picture nearer to what its name means than to all else? For collections of pictures with a name each.

Features come from a small network that has learned to tell the pictures of the collection apart, however they are
shifted, scaled, blurred, tinted and noisy. Numbers of two collections, or of two networks, do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nar_t2i.pixels import to_float

TEMPERATURE = 0.05
FEATURES = 128


class FeatureNetwork(nn.Module):
    """(B, 3, S, S) in [−1, 1] → (B, 128) features of unit length. S: a multiple of 16."""

    def __init__(self, widths: Sequence[int] = (48, 96, 128)):
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 6, 4, 1)]
        for before, after in zip(widths, widths[1:]):
            stages += [nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, after, 4, 2, 1)]
        self.stages = nn.Sequential(*stages, nn.GroupNorm(8, widths[-1]), nn.SiLU())
        self.out = nn.LazyLinear(FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.out(self.stages(images).flatten(1)), dim=-1)


class Retrieval(NamedTuple):
    """top1, top5: shares of the pictures whose own is the nearest of all, or among the five nearest. count: pictures."""

    top1: float
    top5: float
    count: int


def train_features(images: Tensor, steps: int = 1500, batch_size: int = 128, seed: int = 0) -> FeatureNetwork:
    """A network that tells (n, 3, S, S) uint8 images apart: each is a class of its own, of a cosine classifier.

    Images that are equal are one class. The same seed gives the same network on the same machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureNetwork()
        network(to_float(images[:1]))
        classes = _classes(images)
        centres = nn.Parameter(F.normalize(torch.randn(int(classes.max()) + 1, FEATURES), dim=-1))
        optimizer = torch.optim.AdamW([*network.parameters(), centres], lr=2e-3, weight_decay=0.02, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
        for _ in tqdm(range(steps), desc="features", unit="step", mininterval=1):
            chosen = torch.randint(len(images), (batch_size,))
            scores = network(disturbed(to_float(images[chosen]))) @ F.normalize(centres, dim=-1).T / TEMPERATURE
            loss = F.cross_entropy(scores, classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def disturbed(images: Tensor) -> Tensor:
    """(B, 3, S, S) images, shifted by up to 5%, scaled by up to 10%, tinted, blurred and noisy, each in its own way."""
    count = len(images)
    scale = 1 + 0.1 * (2 * torch.rand(count) - 1)
    shift = 0.1 * (2 * torch.rand(count, 2) - 1)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = scale, scale, shift
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    smooth = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur = torch.rand(count, 1, 1, 1)
    tint = 0.1 * torch.randn(count, 3, 1, 1)
    noise = 0.15 * torch.rand(count, 1, 1, 1) * torch.randn_like(images)
    return blur * smooth + (1 - blur) * moved + tint + noise


@torch.no_grad()
def features(network: FeatureNetwork, images: Tensor, batch_size: int = 256) -> Tensor:
    """(n, 3, S, S) uint8 → (n, 128)."""
    return torch.cat([network(to_float(images[i : i + batch_size])) for i in range(0, len(images), batch_size)])


def retrieve(network: FeatureNetwork, images: Tensor, gallery: Tensor, own: Sequence[int]) -> Retrieval:
    """How often image i is nearest to picture `own[i]` of the gallery. Pictures that are equal count as one; another one
    that is as near counts as nearer."""
    classes = _classes(gallery)
    scores = features(network, images) @ features(network, gallery).T
    best = torch.full((len(images), int(classes.max()) + 1), -math.inf)
    best.scatter_reduce_(1, classes.expand(len(images), -1), scores, "amax")
    wanted = classes[torch.as_tensor(own)]
    rank = (~(best < best.gather(1, wanted[:, None]))).sum(1) - 1
    return Retrieval(float((rank == 0).float().mean()), float((rank < 5).float().mean()), len(images))


def _classes(images: Tensor) -> Tensor:
    """(n,) equal numbers for equal images."""
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(image.numpy().tobytes(), len(numbers)) for image in images])
