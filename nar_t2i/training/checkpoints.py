"""Checkpoints that can be trusted: a folder that is whole, or is not there.

    step-00001000.ckpt/
      manifest.json             written last: size and sha256 of every file, the step, the number of ranks, the recipe
      run.pt                    what all ranks share: loops, callbacks, schedulers; the weights, unless they are divided
      rank-00000.pt, …          what each rank has of its own: random states; under ZeRO its part of the weights, of the
                                optimizer's states and of the average (see `nar_t2i.training.fragments`)

The files are written into a folder beside, flushed, described by the manifest, and the folder is renamed. What lacks a
manifest, or differs from it, is never loaded; the one before it is taken instead, by all ranks alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from nar_t2i.errors import UserError
from nar_t2i.files import sync_folder, write_json
from nar_t2i.hashing import file_hash
from nar_t2i.training import fragments
from nar_t2i.training.collectives import distributed, gather, say

FORMAT = 1
MANIFEST, RUN = "manifest.json", "run.pt"
READS = "reads"  # of a generator's checkpoint: see GeneratorModule.reads
FROZEN = "frozen"  # see TrainedModule.note_frozen
PART = ".part"  # what a folder is called while it is written
T = TypeVar("T")


class Broken(Exception):
    """Why a checkpoint cannot be loaded."""


# ---- files -----------------------------------------------------------------------------------------------------------


class _Hashing:
    """A file that knows the sha256 of what was written to it, and why no more could be."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest, self.bytes, self.failed = file, hashlib.sha256(), 0, None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Save tensors and plain values, down to the disk; what the manifest says of the file. Raises OSError with the path where it
    cannot be written."""
    try:
        with open(path, "wb") as file:
            hashing = _Hashing(file)
            try:
                torch.save(content, hashing)
            except RuntimeError:  # torch then closes its archive, and says only that it is too short
                if hashing.failed is None:
                    raise
                raise hashing.failed from None
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


def read_file(folder: Path, name: str) -> Any:
    """A file of a checkpoint, once its size and hash are what the manifest says. Raises Broken."""
    facts = manifest(folder)["files"].get(name)
    if facts is None:
        raise Broken(f"{folder / MANIFEST} names no {name}")
    path = folder / name
    try:
        digest = file_hash(path)
    except OSError as error:
        raise Broken(f"{path}: {error.strerror}") from error
    if digest != facts["sha256"]:
        raise Broken(f"{path} is not what was written")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: holds more than tensors and plain values; it is not loaded") from error


def manifest(folder: Path) -> dict[str, Any]:
    """Raises Broken where there is none, or where a file is missing or of another size."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = facts["files"].items()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Broken(f"{folder} has no manifest") from error
    if facts.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST}: format {facts.get('format')}, and this version reads {FORMAT}")
    for name, file in files:
        if not (folder / name).is_file() or (folder / name).stat().st_size != file["bytes"]:
            raise Broken(f"{folder / name} is missing or cut off")
    return facts


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


# ---- which one -------------------------------------------------------------------------------------------------------


def step_of(folder: Path) -> int:
    return int(folder.stem.removeprefix("step-"))


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not."""
    found = [path for path in folder.glob("step-*.ckpt") if path.is_dir() and not path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run whose files are all there, or None; what is passed over is said.

    Their hashes are compared when they are read.
    """
    for path in newest_first(Path(run_dir, "checkpoints")):
        try:
            manifest(path)
        except Broken as error:
            say(f"{error}; trying the checkpoint before")
        else:
            return path
    return None


def newest(run_dir: Path, read: Callable[[Path], T]) -> tuple[Path, T] | None:
    """A run's newest checkpoint for which `read` does not raise Broken, and its result; what is passed over is said."""
    for path in newest_first(run_dir / "checkpoints"):
        try:
            return path, read(path)
        except Broken as error:
            say(f"{error}; trying the checkpoint before")
    return None


def newest_whole(run_dir: Path) -> Path | None:
    """A run's newest checkpoint that is what was written, or None."""
    found = newest(run_dir, _compare)
    return found and found[0]


def _compare(folder: Path) -> None:
    """Everything with the manifest. Raises Broken."""
    for name in manifest(folder)["files"]:
        read_file(folder, name)


def check(folder: Path) -> None:
    """Compare everything with the manifest. Raises UserError."""
    try:
        _compare(folder)
    except Broken as error:
        raise UserError(f"{error}; {folder} is not a whole checkpoint") from error


def first_whole(path: Path, read: Callable[[Path], T]) -> tuple[Path, T]:
    """The result of `read` on `path` or, where it raises Broken on any rank, on the newest older one for which it does
    not. All ranks must call it, and all get the same checkpoint, from the first one's on: a shared file system may show another
    rank an older one as the newest.
    """
    path = gather(path)[0]
    candidates = newest_first(path.parent)
    candidates = candidates[candidates.index(path) :] if path in candidates else [path]
    for candidate in candidates:
        result, problem = None, None
        try:
            result = read(candidate)
        except Broken as error:
            problem = str(error)
        problems = [problem for problem in gather(problem) if problem is not None]
        if not problems:
            return candidate, result
        say(f"{problems[0]}; trying the checkpoint before")
    raise UserError(f"{path.parent}: no whole checkpoint is left; ckpt_path=fresh starts over")


# ---- reading and writing -----------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    """A checkpoint as Lightning has it, whoever wrote it: `state_dict` and the averages are whole. Raises Broken.

    What ZeRO divided is put together; then `optimizer_states` is empty.
    """
    checkpoint = read_file(folder, RUN)
    if checkpoint.get(fragments.KEY) is not None:
        ranks = [read_file(folder, rank_file(rank)) for rank in range(manifest(folder)["world_size"])]
        try:
            fragments.undivide(checkpoint, [part["fragments"] for part in ranks])
        except fragments.Incomplete as error:
            raise Broken(f"{folder}: {error}") from error
    return checkpoint


def save(trainer: Trainer, folder: Path, facts: dict[str, Any]) -> None:
    """Write a checkpoint of the run as it stands. All ranks must call it.

    facts: for the manifest. Raises UserError, on all ranks, where any of them could not write; then nothing is left of
    it, and what was there before is as it was.
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    own: dict[str, Any] = {"random": random_state()}
    if hasattr(trainer.strategy, "divide"):
        own["fragments"] = trainer.strategy.divide(checkpoint)
    beside = folder.with_name(folder.name + PART)
    if trainer.is_global_zero:
        shutil.rmtree(beside, ignore_errors=True)
        with suppress(OSError):  # which the next write tells of
            beside.mkdir(parents=True)
    trainer.strategy.barrier("checkpoint folder")
    written: dict[str, Any] = {}
    problem = None
    try:
        written[rank_file(trainer.global_rank)] = write_file(beside / rank_file(trainer.global_rank), own)
        if trainer.is_global_zero:
            written[RUN] = write_file(beside / RUN, checkpoint)
    except (OSError, RuntimeError) as error:
        problem = f"{folder}: could not be written: {getattr(error, 'strerror', None) or error}"
    verdicts = gather((problem, written))
    problem = next((problem for problem, _ in verdicts if problem is not None), None)
    if trainer.is_global_zero and problem is None:
        files = {name: facts for _, files in verdicts for name, facts in files.items()}
        problem = _seal(beside, folder, {"format": FORMAT, **facts, "world_size": trainer.world_size, "files": files})
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        if trainer.is_global_zero:
            shutil.rmtree(beside, ignore_errors=True)
        raise UserError(problem)


def _seal(beside: Path, folder: Path, content: dict[str, Any]) -> str | None:
    """Write the manifest and give the folder its name; what went wrong, if anything."""
    try:
        write_json(beside / MANIFEST, content)
        if folder.exists():
            remove(folder)
        beside.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        return f"{folder}: could not be written: {error.strerror}"
    return None


def remove(folder: Path) -> None:
    """Delete a checkpoint; from the first moment on it no longer counts as one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class FolderIO(TorchCheckpointIO):
    """Lets any strategy that does not divide weights load such folders, beside Lightning's own single files.

    random: see `own_random_state`, of what was loaded.
    """

    random: dict[str, Any] | None = None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not Path(path).is_dir():
            return super().load_checkpoint(path, *args, **kwargs)
        used, (checkpoint, self.random) = first_whole(Path(path), lambda folder: (read(folder), own_random_state(folder)))
        say(f"going on from {used}")
        return checkpoint


# ---- random states -----------------------------------------------------------------------------------------------------


def own_random_state(folder: Path) -> dict[str, Any] | None:
    """This rank's random states in a checkpoint, if it was written by as many ranks as there are. Raises Broken."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if distributed() else (1, 0)
    return read_file(folder, rank_file(rank))["random"] if manifest(folder)["world_size"] == ranks else None


def loaded_random_state(trainer: Trainer) -> dict[str, Any] | None:
    """What `own_random_state` was for the checkpoint that the trainer goes on from."""
    return getattr(trainer.strategy, "random", None) or getattr(trainer.strategy.checkpoint_io, "random", None)


def random_state() -> dict[str, Any]:
    """This process's random generators, as tensors and plain values. What draws from counters needs none of them."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(tuple(tuple(x) if isinstance(x, list) else x for x in state["python"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
