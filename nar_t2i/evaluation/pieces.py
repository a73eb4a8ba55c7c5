"""Work over many samples, in pieces that are kept: each written whole by one rank, and not made again after an interruption.

WORK/settings.json            what made all that is here
WORK/NAME/00000000.safetensors   tensors of samples 0 to …; its "notes" are plain values
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from nar_t2i.errors import UserError
from nar_t2i.evaluation.ranks import Ranks
from nar_t2i.files import whole_file


def work_folder(out: Path) -> Path:
    """Where the pieces lie of an evaluation whose numbers go to `out`: scores.work for scores.json."""
    return out.with_suffix(".work") if out.suffix == ".json" else out.with_name(f"{out.name}.work")


class Piece(NamedTuple):
    """tensors: of the piece's samples along their first axis. notes: plain values about them."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


@dataclass(frozen=True)
class Pieces:
    """Samples 0 to `count`, `size` at a time; `make` gives what is kept of some of them."""

    folder: Path
    count: int
    size: int
    make: Callable[[range], Piece]

    @property
    def ranges(self) -> list[range]:
        return [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]

    def path(self, samples: range) -> Path:
        return self.folder / f"{samples.start:08d}.safetensors"

    def work(self, ranks: Ranks) -> None:
        """Make what is missing; every rank takes each so many-th of the pieces. All ranks must call it."""
        # What one rank sees of a shared folder, another may see later: they agree on what is missing.
        missing = ranks.agreed([samples for samples in self.ranges if not self.path(samples).exists()])
        ranks.together(lambda: self._make(missing[ranks.rank :: ranks.world], ranks))

    def _make(self, mine: list[range], ranks: Ranks) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for samples in tqdm(mine, desc=self.folder.name, unit="batch", mininterval=0.5, disable=not ranks.first or not mine):
            piece = self.make(samples)
            with whole_file(self.path(samples)) as file:
                file.write(save({k: v.contiguous() for k, v in piece.tensors.items()}, {"notes": json.dumps(piece.notes)}))

    def gathered(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """All tensors, in the order of the samples, and the notes of each piece. UserError where a piece cannot be read."""
        tensors: dict[str, list[Tensor]] = {}
        notes = []
        for samples in self.ranges:
            path = self.path(samples)
            try:
                with safe_open(path, "pt") as file:
                    notes.append(json.loads(file.metadata()["notes"]))
                    found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); delete it, and the same command makes it again") from error
            for name, value in found.items():
                if len(value) != len(samples):
                    raise UserError(f"{path}: holds {len(value)} samples in place of {len(samples)}; delete it, and start again")
                tensors.setdefault(name, []).append(value)
        return {name: torch.cat(parts) for name, parts in tensors.items()}, notes
