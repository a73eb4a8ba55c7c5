"""A recipe as a run takes it: with a run folder, and without what would contradict one, or do nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nar_t2i import recipe as recipes
from nar_t2i.data.opening import is_remote
from nar_t2i.data.stream import expand
from nar_t2i.errors import UserError
from nar_t2i.recipe import Recipe
from nar_t2i.training import wandb_run


def load_recipe(subcommand: str, configs: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """The resolved recipe, with a run folder, and without what would contradict one."""
    recipe = recipes.load(configs, overrides)
    if "metrics" in recipe.config:
        raise recipe.error("metrics", "is a protocol's, for nar-t2i evaluate --protocol NAME, and no recipe's")
    trainer = recipe.config.get("trainer")
    if isinstance(trainer, dict) and trainer.get("default_root_dir") is not None:
        raise recipe.error("trainer.default_root_dir", "is the run's folder; set run_dir")
    if isinstance(trainer, dict) and trainer.get("use_distributed_sampler"):
        raise recipe.error("trainer.use_distributed_sampler", "must be false: the data module deals out the samples")
    ours = _is_ours(recipe, "model")
    if isinstance(trainer, dict):
        for key, harmless, instead in (
            (
                "accumulate_grad_batches",
                (None, 1),
                "follows from data.init_args.global_batch_size and micro_batch_size; set these",
            ),
            ("gradient_clip_val", (None,), "is the module's: set model.init_args.optimizer.clip_norm"),
        ):
            if ours and trainer.get(key) not in harmless:
                raise recipe.error(f"trainer.{key}", instead)
        if isinstance(trainer.get("val_check_interval"), int):  # of optimizer steps, whatever an epoch is
            trainer.setdefault("check_val_every_n_epoch", None)
        if subcommand == "fit" and trainer.get("limit_train_batches") is None and _is_ours(recipe, "data"):
            _check_epochs(recipe, trainer)
        if subcommand == "fit" and trainer.get("fast_dev_run"):
            raise recipe.error("trainer.fast_dev_run", "would take the place of the run's model: set max_steps and another run_dir")
    if recipe.config.get("run_dir") is None:
        recipe.config["run_dir"] = str(Path("runs", Path(configs[0]).stem))
    _check_streams(recipe)
    trial = wandb_run.trial()
    if trial is not None and subcommand == "fit":  # the trials of a sweep would go on from one another
        recipe.config["run_dir"] = str(Path(recipe.config["run_dir"], "sweeps", *trial))
    return recipe


def _is_ours(recipe: Recipe, key: str) -> bool:
    part = recipe.config.get(key)
    return isinstance(part, dict) and str(part.get("class_path")).startswith("nar_t2i.")


def _check_epochs(recipe: Recipe, trainer: dict[str, Any]) -> None:
    """UserError where something is said by epochs, which our data, that have no end, do not have, and so would not happen. A
    configuration that was resolved before may hold Lightning's default.
    """
    for key, harmless, instead in (
        ("overfit_batches", (None, 0), "changes nothing here: set data.init_args.train to as few samples"),
        ("max_epochs", (None, -1), "is never reached, since the data have no end: set trainer.max_steps"),
    ):
        if trainer.get(key) not in harmless:
            raise recipe.error(f"trainer.{key}", instead)
    if isinstance(trainer.get("val_check_interval"), float):
        raise recipe.error("trainer.val_check_interval", "is a share of an epoch, and the data have no end: set a number of steps")
    if trainer.get("val_check_interval") is None and trainer.get("check_val_every_n_epoch") is not None:
        if (recipe.config["data"].get("init_args") or {}).get("validation") is not None:
            print(
                "nar-t2i: trainer.check_val_every_n_epoch: the data have no end, and so no epochs: this run will not be validated; "
                "trainer.val_check_interval is a number of steps",
                file=sys.stderr,
            )
        trainer["check_val_every_n_epoch"] = None


def _check_streams(recipe: Recipe) -> None:
    """Before jsonargparse takes a URL for a file that it is to open."""
    settings = recipe.config["data"].get("init_args") if _is_ours(recipe, "data") else None
    for split in ("train", "validation") if isinstance(settings, dict) else ():
        if isinstance(given := settings.get(split), str) and is_remote(given):
            try:
                expand(given)
            except UserError as error:
                raise recipe.error(f"data.init_args.{split}", str(error)) from error
