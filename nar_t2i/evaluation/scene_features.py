"""What a scene holds, as 64 numbers: a small network of our own, trained on rendered scenes, for when no weights are at hand.

It has learned to say of a scene which colours and shapes are there, how many, where, and on which background; the layer
before the answers is what pictures are compared by. The weights travel with the package; `data_prep/train_scene_features.py`
makes them, in about two minutes of one core. Distances between such features compare with nothing but themselves.
All of it is our choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.data.captions import RenderedScenes
from nar_t2i.data.scenes import BACKGROUNDS, COLORS, PAIRS, SHAPES, Scene, render
from nar_t2i.folders import load_part
from nar_t2i.parts import part
from nar_t2i.pixels import to_float

SIDE = 64  # pixels that the network sees
FEATURES = 64
MOST = 4  # 0 to 3 objects
GRID = 3  # places a side
COLOR_NAMES, BACKGROUND_NAMES = tuple(COLORS), tuple(BACKGROUNDS)


class Answers(NamedTuple):
    """What a scene holds, as logits or as truth.

    colors: (B, 8, 4) how many of each colour; shapes: (B, 4, 4); background: (B, 20); pairs: (B, 32) whether such an object
    is there; color_places: (B, 8·9) whether such a colour is at a place; shape_places: (B, 4·9). As truth, the first three
    are class numbers, without their last axis.
    """

    colors: Tensor
    shapes: Tensor
    background: Tensor
    pairs: Tensor
    color_places: Tensor
    shape_places: Tensor


SIZES = (len(COLORS) * MOST, len(SHAPES) * MOST, len(BACKGROUNDS), len(PAIRS), len(COLORS) * GRID**2, len(SHAPES) * GRID**2)


@part
class SceneNetwork(nn.Module):
    """(B, 3, S, S) uint8 → (B, 64) features. Other sizes than 64 px are resized, smoothed where they shrink.

    scale: brings each feature to a variance of 1 on the scenes of training, so that distances are of a readable size.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 96)):
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.MaxPool2d(2)]
        for before, after in zip(widths, widths[1:]):
            stages += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.stages = nn.Sequential(*stages)
        self.features = nn.Linear(widths[-1] * (SIDE // 4 // 2 ** (len(widths) - 1)) ** 2, FEATURES)
        self.register_buffer("scale", torch.ones(FEATURES))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(FEATURES, sum(SIZES)))

    def forward(self, images: Tensor) -> Tensor:
        pixels = to_float(images)
        if pixels.shape[-1] != SIDE:
            pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        return self.features(self.stages(pixels).flatten(1)) * self.scale

    def answers(self, features: Tensor) -> Answers:
        colors, shapes, *rest = self.head(features / self.scale).split(SIZES, dim=1)
        return Answers(colors.unflatten(1, (-1, MOST)), shapes.unflatten(1, (-1, MOST)), *rest)


def shipped_network() -> SceneNetwork:
    """The network that travels with the package."""
    return load_part(Path(str(resources.files("nar_t2i"))) / "assets" / "scene_features")


def truth(scenes: Sequence[Scene]) -> Answers:
    """What the network is to answer."""
    count = len(scenes)
    colors, shapes = np.zeros((count, len(COLORS)), np.int64), np.zeros((count, len(SHAPES)), np.int64)
    background = np.array([BACKGROUND_NAMES.index(scene.background) for scene in scenes])
    pairs = np.zeros((count, len(PAIRS)), np.float32)
    color_places = np.zeros((count, len(COLORS), GRID * GRID), np.float32)
    shape_places = np.zeros((count, len(SHAPES), GRID * GRID), np.float32)
    for row, scene in enumerate(scenes):
        for found in scene.objects:
            color, shape = COLOR_NAMES.index(found.color), SHAPES.index(found.shape)
            place = min(int(found.y * GRID), GRID - 1) * GRID + min(int(found.x * GRID), GRID - 1)
            colors[row, color] += 1
            shapes[row, shape] += 1
            pairs[row, PAIRS.index((found.color, found.shape))] = 1
            color_places[row, color, place] = shape_places[row, shape, place] = 1
    arrays = (colors, shapes, background, pairs, color_places.reshape(count, -1), shape_places.reshape(count, -1))
    return Answers(*map(torch.from_numpy, arrays))


def loss(said: Answers, wanted: Answers) -> Tensor:
    """Each kind of answer in bits of its own size, so that none drowns the others."""
    counts = [F.cross_entropy(logits.flatten(0, 1), target.flatten()) for logits, target in zip(said[:2], wanted[:2])]
    yes = [F.binary_cross_entropy_with_logits(logits, target) for logits, target in zip(said[3:], wanted[3:])]
    return 4 * sum(counts) + F.cross_entropy(said.background, wanted.background) + 16 * sum(yes)


def train(scenes: int = 24_000, epochs: int = 6, batch_size: int = 64, seed: int = 0, log: bool = True) -> SceneNetwork:
    """A network from random weights. Scenes of all combinations; the same seed gives the same network on the same machine."""
    source = RenderedScenes("all", scenes, seed=1000 + seed)
    drawn = [source.scene(index) for index in range(scenes)]
    images = torch.stack([torch.from_numpy(render(scene, SIDE)).permute(2, 0, 1) for scene in drawn])
    wanted = truth(drawn)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SceneNetwork()
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
        steps = epochs * (scenes // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
        for epoch in range(epochs):
            start, total = time.perf_counter(), 0.0
            for rows in torch.randperm(scenes)[: scenes // batch_size * batch_size].split(batch_size):
                value = loss(network.answers(network(images[rows])), Answers(*(answer[rows] for answer in wanted)))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                total += float(value.detach())
            if log:
                print(f"epoch {epoch}: loss {total / (scenes // batch_size):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    network.eval().requires_grad_(False)
    network.scale.copy_(1 / torch.cat([network(rows) for rows in images[:8000].split(250)]).std(0))
    return network


@torch.no_grad()
def accuracy(network: SceneNetwork, count: int = 1000, seed: int = 999) -> dict[str, float]:
    """Shares of right answers on scenes that were not trained on; kinds: all pairs of a scene right."""
    source = RenderedScenes("all", count, seed=seed)
    scenes = [source.scene(index) for index in range(count)]
    images = torch.stack([torch.from_numpy(render(scene, SIDE)).permute(2, 0, 1) for scene in scenes])
    said, wanted = network.answers(torch.cat([network(rows) for rows in images.split(250)])), truth(scenes)
    return {
        "colors": float((said.colors.argmax(-1) == wanted.colors).all(1).double().mean()),
        "shapes": float((said.shapes.argmax(-1) == wanted.shapes).all(1).double().mean()),
        "background": float((said.background.argmax(-1) == wanted.background).double().mean()),
        "kinds": float(((said.pairs > 0) == (wanted.pairs > 0.5)).all(1).double().mean()),
        "places": float(((said.color_places > 0) == (wanted.color_places > 0.5)).all(1).double().mean()),
    }
