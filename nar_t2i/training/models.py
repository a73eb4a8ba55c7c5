"""What a command is told to draw with: a model folder, a run, or a checkpoint, as model folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nar_t2i.errors import UserError
from nar_t2i.evaluation.ranks import Ranks
from nar_t2i.files import read_json, whole_folder
from nar_t2i.folders import CONFIG, folder_hash
from nar_t2i.hashing import file_hash
from nar_t2i.training import checkpoints
from nar_t2i.training.export import export, find_checkpoint

EXPORTED = "exported-"  # how the folders begin that models of checkpoints are written into
WEIGHTS = {"ema": ("ema",), "raw": ("raw",), "both": ("ema", "raw")}


class Opened(NamedTuple):
    """name: "model", "ema" or "raw". folder: of the model. identity: a hash of what it was opened from. facts: for a report."""

    name: str
    folder: Path
    identity: str
    facts: dict[str, Any]


def open_models(path: Path, weights: str | None, work: Path, group: Ranks) -> list[Opened]:
    """The model folders that `path` means; those of a checkpoint are written into `work`, once. All ranks must call it.

    weights: "ema", "raw" or "both"; None takes the averaged ones. A model folder has one kind, so that a choice is a
    UserError, and so is a checkpoint without averaged weights where these are wanted.
    """
    if (path / CONFIG).is_file():
        if weights is not None:
            raise UserError(f"--weights {weights}: {path} is a model folder, which holds one kind; name its run or a checkpoint")
        identity = group.agreed(folder_hash(path) if group.first else "")
        return [Opened("model", path, identity, {"hash": identity})]
    # One for all: another may be saved while the ranks look.
    checkpoint = group.agreed(group.together(lambda: find_checkpoint(path) if group.first else None))

    def step() -> int:
        try:
            return checkpoints.manifest(checkpoint)["step"]
        except checkpoints.Broken as error:
            raise UserError(f"{checkpoint}: is no whole checkpoint: {error}") from error

    facts = {"checkpoint": checkpoint.name, "step": group.together(step)}
    identity = group.together(lambda: file_hash(checkpoint / checkpoints.MANIFEST))
    opened = []
    for name in WEIGHTS[weights or "ema"]:
        folder = work / f"{EXPORTED}{name}-{identity[:12]}"
        group.on_first(partial(_write, checkpoint, folder, averaged=name == "ema", path=path))
        opened.append(Opened(name, folder, identity, {**facts, "hash": identity}))
    return opened


def _write(checkpoint: Path, folder: Path, averaged: bool, path: Path) -> None:
    """A checkpoint's model, unless it is there. UserError where what trains at `path` is no generator."""
    if folder.exists():
        return
    with whole_folder(folder) as beside:
        export(checkpoint, beside, averaged, exactly=True)
        if "class_path" in read_json(beside / CONFIG):
            raise UserError(f"{path}: trains a part alone, which draws no pictures; name a generator's run or model")
