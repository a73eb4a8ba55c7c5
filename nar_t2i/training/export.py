"""`nar-t2i export`: any checkpoint of a run, under whatever strategy and on however many ranks, as a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from nar_t2i import recipe as recipes
from nar_t2i.errors import UserError
from nar_t2i.hashing import file_hash
from nar_t2i.training import checkpoints
from nar_t2i.training.base import TrainedModule
from nar_t2i.training.command import RecipeCLI, quieten
from nar_t2i.training.init_from import load_weights

CONFIG = "config.yaml"


def main(arguments: argparse.Namespace) -> int:
    """Raises UserError where the checkpoint, its run's configuration or the folder cannot be used."""
    checkpoint, folder = find_checkpoint(Path(arguments.checkpoint)), Path(arguments.folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; export into a new folder")
    averaged = export(checkpoint, folder, averaged=not arguments.raw)
    print(f"{folder}: {'averaged' if averaged else 'raw'} weights of step {checkpoints.manifest(checkpoint)['step']}")
    return 0


def export(checkpoint: Path, folder: Path, averaged: bool, exactly: bool = False) -> bool:
    """Write a checkpoint as a model folder; whether its weights are averaged. Raises UserError.

    averaged: prefer averaged weights; exactly: and take no others.
    """
    quieten()
    config = configuration_of(checkpoint)
    cli = RecipeCLI(recipes.load([str(config)], []))
    model = cli.build_model()
    before = (
        load_weights(model, cli.config.init_from).loaded if cli.config.init_from else []
    )  # frozen weights, which no checkpoint holds
    report = load_weights(model, checkpoint, averaged=averaged)
    was_averaged = report.averaged
    if hasattr(model, "check_reads"):
        model.check_reads(report.reads)
    if isinstance(model, TrainedModule):
        model.note_frozen()
        model.check_noted(report.trained_beside)
    brought = set(before) & {name for name, p in model.named_parameters() if not p.requires_grad}
    if others := sorted({*report.wrong_shape, *report.resized, *report.missing} - brought):
        raise UserError(
            f"{checkpoint}: is of another model than {config} describes: for {len(others)} of that one's weights it has none that "
            f"fit, such as {others[0]}"
        )
    if exactly and was_averaged != averaged:
        raise UserError(f"{checkpoint}: holds no averaged weights")
    if not hasattr(model, "write"):
        raise UserError(f"{config}: {type(model).__name__} has no model folder")
    model.write(folder)
    return was_averaged


def configuration_of(checkpoint: Path) -> Path:
    """The file that holds the configuration which a checkpoint was trained by: its run's, or an earlier one beside it. Where
    none is the same to the letter, since the file was moved or edited, the run's. UserError where there is none.
    """
    run = checkpoint.parents[1]
    if not (run / CONFIG).is_file():
        raise UserError(f"{run / CONFIG}: a checkpoint is exported with its run's configuration, and there is none")
    try:
        recipe = checkpoints.manifest(checkpoint).get("recipe")
    except checkpoints.Broken as error:
        raise UserError(f"{error}; {checkpoint} is not a whole checkpoint") from error
    earlier = sorted(run.glob("config.*.yaml"))
    return next((file for file in (run / CONFIG, *earlier) if file_hash(file) == recipe), run / CONFIG)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or a run's newest. UserError where there is none."""
    if (path / checkpoints.MANIFEST).is_file():
        return path.resolve()
    found = checkpoints.newest_whole(path)
    if found is None:
        raise UserError(f"{path} is neither a whole checkpoint nor a run that has one")
    return found.resolve()
