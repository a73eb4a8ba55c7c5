"""Pictures of a run in progress: into the run's folder, and to every logger that takes images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from nar_t2i.pixels import to_arrays
from nar_t2i.training.collectives import say


def rows_of(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """(n, 3, H, W) uint8 → one picture, in rows of `columns`."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(to_arrays(images)):
        y, x = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return Image.fromarray(canvas)


def log_picture(module: LightningModule, name: str, picture: Image.Image) -> None:
    """Save as `<run>/pictures/<name>-<step>.png` and log it. Rank 0 only; nothing before the first step. Where it cannot be
    written, that is told, and training goes on."""
    if not module.trainer.is_global_zero or module.trainer.sanity_checking:
        return
    folder = Path(module.trainer.default_root_dir) / "pictures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{name}-{module.global_step:08d}.png")
    except OSError as error:
        say(f"{error.filename or folder}: {error.strerror or error}; the picture of step {module.global_step} is missing")
    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=module.global_step)
