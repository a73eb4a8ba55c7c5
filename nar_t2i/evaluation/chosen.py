"""Which captions are drawn, and which real pictures they are compared with: chosen from a source by a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nar_t2i import recipe as recipes
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.data.images import fit
from nar_t2i.data.opening import open_source
from nar_t2i.data.source import SampleError, Source
from nar_t2i.errors import UserError
from nar_t2i.hashing import text_hash
from nar_t2i.noise import Noise
from nar_t2i.parts import build

SCENES = "scenes"
RESIZE = "shorter side to the model's size (Lanczos, antialiased), centre crop"


def open_data(given: str, count: int | None, image_size: int) -> Source:
    """What --data says: shards (folder, file or pattern); a recipe or a run's config.yaml, whose validation data it takes; or
    "scenes", rendered scenes of the validation split, `count` of them. Raises UserError."""
    if given == SCENES and not Path(given).exists():
        if count is None:
            raise UserError(f"--data {SCENES} has no end; say with --count how many")
        return RenderedScenes("validation", count, image_size=image_size)
    if given.endswith((".yaml", ".yml")):
        validation = recipes.load(given).config.get("data", {}).get("init_args", {}).get("validation")
        if validation is None:
            raise UserError(f"--data {given}: key data.init_args.validation: names no validation data")
        if isinstance(validation, list):  # a cache's samples have no pictures
            validation = [{key: value for key, value in part.items() if not key.endswith("cache")} for part in validation]
        try:
            return open_source(build(validation) if isinstance(validation, dict) else validation)
        except UserError as error:
            raise UserError(f"--data {given}: key data.init_args.validation: {error}") from error
    return open_source(given)


class Chosen:
    """`count` samples of a source, in an order that depends on (seed, length of the source) alone; None takes all, in theirs.

    caption: "first", or "random": one of each sample's, by the seed. Raises UserError where there are too few, and where
    some of the source's cannot be used: leaving them out would change what is measured.
    """

    def __init__(self, source: Source, count: int | None, seed: int = 0, caption: str = "first"):
        if count is not None and not 1 <= count <= len(source):
            raise UserError(f"{source.name}: holds {len(source)} samples, and {count} are asked for")
        if source.lost:
            raise UserError(
                f"{source.name}: {len(source.lost)} samples cannot be used, such as {source.lost[0]}; an evaluation leaves no "
                "sample out"
            )
        order = np.random.Generator(np.random.Philox(key=[seed, len(source)])).permutation(len(source))
        self.indices = np.arange(len(source)) if count is None else order[:count]
        self._source, self._seed, self._caption = source, seed, caption

    def __len__(self) -> int:
        return len(self.indices)

    def captions(self, samples: range) -> list[str]:
        chosen = self.indices[samples.start : samples.stop]
        pick = np.zeros(len(chosen))
        if self._caption == "random":
            ids = torch.from_numpy(chosen.astype(np.int64))
            pick = Noise(self._seed, ids, torch.float64).uniform("evaluation/caption").numpy()
        try:
            return self._source.read_texts(chosen, pick).captions
        except SampleError as error:
            raise UserError(f"{error}; an evaluation leaves no sample out") from error

    def images(self, samples: range, size: int) -> Tensor:
        """(B, 3, size, size) uint8."""
        rows = []
        for index in self.indices[samples.start : samples.stop].tolist():
            try:
                rows.append(fit(self._source.read(index).image, size).pixels)
            except SampleError as error:
                raise UserError(f"{error}; an evaluation leaves no sample out") from error
        return torch.from_numpy(np.ascontiguousarray(np.stack(rows).transpose(0, 3, 1, 2)))

    def identity(self) -> dict[str, Any]:
        """What the choice depends on; hash: of what the source holds, and of the order. Of shards that is the names, captions,
        sizes and places of their samples: other pictures of the very same sizes in bytes are not told apart."""
        blocks = [self._source.identity(block) for block in range(len(self._source.blocks))]
        return {"source": self._source.name, "held": len(self._source), "samples": len(self), "choice_seed": self._seed,
                "caption": self._caption, "hash": text_hash(repr((blocks, self.indices.tolist())))}  # fmt: skip
