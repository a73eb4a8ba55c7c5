"""What the distance over scene features sees, and what it does not: 1,000 pictures, spoilt in one way or another, to 1,000 real
scenes.

    python benchmarks/scene_frechet.py        # the table of docs/evaluation.md: a minute of one core
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks import results
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.data.scenes import Split
from nar_t2i.evaluation.features import SceneFeatures
from nar_t2i.evaluation.metrics.frechet import frechet_distance, moments
from nar_t2i.folders import load_part
from nar_t2i.generate import shipped_model
from nar_t2i.pixels import to_float, to_uint8

SIDE = 64  # pixels


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--count", type=results.positive, default=1000, help="pictures of each kind; default: 1000")
    parser.add_argument("--out", default="runs/scene-frechet.json")
    parsed = parser.parse_args()
    features = SceneFeatures(torch.device("cpu"))
    reference = moments(features.of_images(scenes(parsed.count, seed=0)))
    rows = []
    for name, images in spoilt(scenes(parsed.count, seed=1)):
        rows.append({"pictures": name, "scene_frechet": frechet_distance(*reference, *moments(features.of_images(images)))})
        results.write(parsed.out, rows, count=parsed.count, pixels=SIDE)
        print(f"| {name} | {rows[-1]['scene_frechet']:.3g} |", flush=True)
    return 0


def scenes(count: int, seed: int, split: Split = "validation") -> Tensor:
    """(count, 3, SIDE, SIDE) uint8."""
    source = RenderedScenes(split, count, seed=seed, image_size=SIDE)
    return torch.from_numpy(np.stack([source.read(index).image for index in range(count)])).permute(0, 3, 1, 2)


def spoilt(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What was done to the scenes, and the outcome, of the same shape: (n, 3, SIDE, SIDE) uint8."""
    draw = torch.Generator().manual_seed(0)
    yield "other real scenes", images
    codec = load_part(shipped_model() / "tokenizer")
    tokens = torch.cat([codec.encode(to_float(part)).tokens for part in images.split(100)])

    def decoded(tokens: Tensor) -> Tensor:
        return torch.cat([to_uint8(codec.decode(part)) for part in tokens.split(100)])

    yield "other real scenes, through the shipped model's tokenizer and back", decoded(tokens)
    yield "scenes with combinations that are held out of training, too", scenes(len(images), seed=1, split="all")
    for radius in (0.5, 1, 2):
        rows = [
            np.asarray(Image.fromarray(row).filter(ImageFilter.GaussianBlur(radius))) for row in images.permute(0, 2, 3, 1).numpy()
        ]
        yield f"blurred by a Gaussian of {radius} px", torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
    noise = torch.randn(images.shape, generator=draw)
    for strength in (5, 15, 30):
        yield f"noise of {strength} levels", (images + strength * noise).round().clamp(0, 255).byte()
    yield "colour channels exchanged", images[:, [1, 2, 0]]
    for pieces in (4, 16):
        yield f"cut into {pieces} × {pieces} pieces, shuffled", shuffled(images, pieces, draw)
    others = tokens[torch.randperm(len(images), generator=draw)]
    for share in (0.05, 0.2, 1.0):
        replaced = torch.rand(tokens.shape, generator=draw) < share
        columns = [others[torch.randperm(len(images), generator=draw), slot] for slot in range(tokens.shape[1])]
        yield (
            f"{share:.0%} of the tokens replaced by other pictures'",
            decoded(torch.where(replaced, torch.stack(columns, dim=1), tokens)),
        )


def shuffled(images: Tensor, pieces: int, draw: torch.Generator) -> Tensor:
    """Each cut into pieces × pieces, which are put together in another order: (n, 3, SIDE, SIDE) both."""
    side = SIDE // pieces
    parts = images.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)  # (n, 3, pieces², side, side)
    order = torch.stack([torch.randperm(pieces**2, generator=draw) for _ in range(len(images))])
    parts = torch.gather(parts, 2, order[:, None, :, None, None].expand_as(parts)).unflatten(2, (pieces, pieces))
    return parts.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)


if __name__ == "__main__":
    results.program(main)
