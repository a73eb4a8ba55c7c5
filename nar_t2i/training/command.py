"""`nar-t2i fit | validate | test | predict`: a resolved recipe, through LightningCLI, in a run folder."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

import nar_t2i
from nar_t2i import parts
from nar_t2i.errors import REQUEUE, UserError, note_preempted
from nar_t2i.recipe import Recipe
from nar_t2i.training import checkpoints, wandb_run, zero
from nar_t2i.training.base import TrainedModule, has_frozen
from nar_t2i.training.config_errors import explain, mistake, user_error
from nar_t2i.training.guard import Guard, GuardConfig
from nar_t2i.training.init_from import check_frozen, check_vocabulary, load_weights
from nar_t2i.training.monitor import Monitor
from nar_t2i.training.preemption import Signals, StallWatch
from nar_t2i.training.resolving import load_recipe
from nar_t2i.training.run_folder import CheckpointConfig, RunCheckpoint, RunFolder, RunLogger
from nar_t2i.training.validation import OwedValidation
from nar_t2i.training.wandb_run import WandbConfig

PATIENCE = 10  # seconds for other ranks of this process to end by themselves
FRESH = ("none", "fresh")  # values of ckpt_path that start without a checkpoint
T = TypeVar("T")
# What Lightning and DeepSpeed say that no user of this package can act on, or that is settled here.
_WARNINGS = (
    r".*does not have many workers.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*(all_gather_into_tensor|reduce_scatter_tensor).*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*The number of training batches \(\d+\) is smaller than the logging interval.*",
    r".*have no `val_dataloader`.*",
    r".*Total length of .* across ranks is zero.*",  # validation: null
    r".*Trying to infer the `batch_size`.*",
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*The `srun` command is available on your system but is not used.*",
)
_INFOS = (
    "💡",
    "litlogger",
    "litmodels",
    "TPU available",
    "HPU available",
    "Seed set to",
    "Detected KeyboardInterrupt",
    "Loaded model weights from",
)  # which names the checkpoint that was asked for, not the one that was whole


def run(subcommand: str, configs: Sequence[str], overrides: Sequence[str], print_config: bool = False) -> int:
    """Run one of Lightning's four verbs on a recipe; the process's exit status.

    configs: recipe files or names, later ones on top. overrides: "a.b.c=value". Raises UserError.
    """
    quieten()
    zero.register()
    recipe = load_recipe(subcommand, configs, overrides)
    # Libraries that are imported on the way may print, and what is printed here is to be read again.
    with redirect_stdout(sys.stderr) if print_config else nullcontext():
        cli = RecipeCLI(recipe)
    if print_config:
        print(cli.config_yaml, end="")
        return 0
    if subcommand == "fit":
        try:
            Path(cli.config.run_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise recipe.error("run_dir", f"{cli.config.run_dir}: {error.strerror}") from error
    checkpoint = _checkpoint(subcommand, cli.config, recipe)
    cli.build(subcommand)
    _check_verb(subcommand, cli)
    if subcommand == "fit" and isinstance(cli.model, TrainedModule):
        cli.model.check_parts()
    _start_weights(cli, goes_on=checkpoint is not None)
    arguments: dict[str, Any] = {"datamodule": cli.datamodule, "ckpt_path": checkpoint, "weights_only": True}
    if subcommand == "predict":
        arguments["return_predictions"] = False
    try:
        _call(cli, subcommand, arguments)
    except UserError:
        wandb_run.finish(cli.trainer.loggers, 2)
        raise
    except SystemExit:
        if cli.trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        return _interrupted(cli)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _start_weights(cli: RecipeCLI, goes_on: bool) -> None:
    """Those of `init_from`. A run that goes on has weights of its own, but for frozen ones, which no checkpoint holds."""
    if not cli.config.init_from or (goes_on and not has_frozen(cli.model)):
        check_frozen(cli.model, None)
    else:
        report = load_weights(cli.model, cli.config.init_from)
        check_frozen(cli.model, report)
        check_vocabulary(cli.model, report)
        if not goes_on:
            print(report, file=sys.stderr)
    if isinstance(cli.model, TrainedModule):
        cli.model.note_frozen()


def _interrupted(cli: RecipeCLI) -> int:
    """The exit status of a run that was told to end and has saved itself; says how it goes on."""
    status, config = cli.signals.status, cli.config
    wandb_run.finish(cli.trainer.loggers, status, preempted=status == REQUEUE)
    if status == REQUEUE:
        note_preempted()
    without = f" with --ckpt_path=null, not {config.ckpt_path}," if config.ckpt_path is not None else ""
    print(
        f"nar-t2i: {cli.signals.meaning}; the same command{without} goes on from the checkpoint in {config.run_dir}",
        file=sys.stderr,
    )
    return status


def _check_verb(subcommand: str, cli: RecipeCLI) -> None:
    """UserError where a verb would have nothing to do."""
    of_data = type(cli.datamodule).__module__.startswith("nar_t2i.")
    if subcommand == "validate" and of_data and cli.config.data.init_args.get("validation", "") is None:
        raise cli.recipe.error("data.init_args.validation", "names no validation data")
    hook = {"test": "test_step", "predict": "predict_step"}.get(subcommand)
    if hook is not None and type(cli.model).__module__.startswith("nar_t2i.") and not is_overridden(hook, cli.model):
        raise UserError(
            f"{type(cli.model).__name__} has no {hook}: `nar-t2i evaluate` scores a model, `nar-t2i generate` draws with it"
        )


def _call(cli: RecipeCLI, subcommand: str, arguments: dict[str, Any]) -> None:
    """One of the trainer's verbs; what a user can mend, as UserError."""
    try:
        try:
            getattr(cli.trainer, subcommand)(cli.model, **arguments)
        except Exception:
            _end_other_ranks(cli.trainer)
            raise
    except MisconfigurationException as error:
        raise UserError(f"{cli.recipe.name}: {_one_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{arguments['ckpt_path']}: holds more than tensors and plain values; it is not loaded") from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch says so wherever the training process stands
            raise
        raise UserError(
            f"{_one_line(error)} Often memory ran out: take fewer data.init_args.workers. The same command goes on from the "
            f"newest checkpoint in {cli.config.run_dir}"
        ) from error


def _end_other_ranks(trainer: Trainer) -> None:
    """Those that this process has started as commands and that do not end by themselves: they wait for it, and would hold their
    GPUs."""
    if not isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        return
    ranks = list(trainer.strategy.launcher.procs)
    trainer.strategy.launcher.procs.clear()  # or Lightning, which watches these, would kill this process before it has said why
    until = time.monotonic() + PATIENCE
    for rank in ranks:
        try:
            rank.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()


class RecipeCLI(LightningCLI):
    """LightningCLI over one resolved configuration: parsed and checked when constructed, built by `build`.

    A checkpoint's hyperparameters never reach the configuration: LightningCLI reads them for a subcommand's
    `ckpt_path`, and this one has no subcommands.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            # The data module deals out samples to ranks itself; Lightning's sampler would deal them out again.
            trainer_defaults={"use_distributed_sampler": False},
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=recipe.config,
            run=False,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, help="the run's folder")
        parser.add_argument("--init_from", type=str | None, default=None, help="weights to start from")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to go on from")
        parser.add_argument("--stall_minutes", type=float | None, default=30.0, help="without a batch: give up; null: never")
        parser.add_argument("--checkpoint", type=CheckpointConfig, default=CheckpointConfig())
        parser.add_argument("--bad_steps", type=GuardConfig, default=GuardConfig())
        parser.add_argument("--wandb", type=WandbConfig | None, default=None, help="log to Weights & Biases")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_object(parts.with_defaults(args))
        except (ArgumentError, TypeError, ValueError, ImportError, AttributeError) as error:
            raise explain(self.recipe, error, parser) from error

    def instantiate_classes(self) -> None:
        """Nothing yet: `--print_config` only wants the parsed configuration."""

    @property
    def config_yaml(self) -> str:
        """The configuration with every default, as YAML that `--config` accepts."""
        return f"# nar-t2i {nar_t2i.__version__}\n" + self.parser.dump(self.config, skip_none=False, format="yaml")

    def build(self, subcommand: str) -> None:
        """Make the data module, the model and the trainer."""
        self.verb = subcommand
        self._told(super().instantiate_classes)

    def _told(self, build: Callable[[], T]) -> T:
        """What `build` returns; what goes wrong in it, as UserError."""
        try:
            return build()
        except (ValueError, TypeError, MisconfigurationException) as error:
            # jsonargparse tells of an error in a list's item as one of several refused alternatives.
            own = user_error(error)
            if own is not None:
                raise UserError(str(own)) from error
            raise UserError(f"{self.recipe.name}: cannot be built: {mistake(error) or _one_line(error)}") from error

    def build_model(self) -> LightningModule:
        """The model alone, for which neither data nor devices are needed."""
        return self._built("model")

    def _built(self, key: str) -> Any:
        """One part of the configuration, without the others, which may need what is not there."""
        config = self.config.clone()
        for other in {"model", "data"} - {key}:
            config[other] = None
        return self._told(lambda: self.parser.instantiate_classes(config))[key]

    def build_data(self) -> LightningDataModule:
        """The data module alone."""
        return self._built("data")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run_dir = Path(self.config.run_dir)
        settings = {**self._get(self.config_init, "trainer"), **kwargs, "default_root_dir": run_dir}
        config_yaml = self.config_yaml
        self.signals = Signals()
        callbacks = [RunFolder(run_dir, config_yaml, yaml.safe_load(config_yaml)), self.signals]
        if self.config.stall_minutes is not None:
            callbacks.append(StallWatch(self.config.stall_minutes))
        guard_config = self._get(self.config_init, "bad_steps")
        if self.verb == "fit" and guard_config.policy != "ignore":
            callbacks.append(Guard(guard_config))
        monitor = Monitor(run_dir)
        if self.verb == "fit" and settings["logger"] is not False:
            callbacks.append(monitor)
        if self.verb == "fit" and settings["enable_checkpointing"] is not False:
            checkpoint_config = self._get(self.config_init, "checkpoint")
            callbacks.append(RunCheckpoint(run_dir / "checkpoints", checkpoint_config, self.signals, config_yaml, monitor))
            callbacks.append(OwedValidation(run_dir))
        if settings["logger"] is not False:
            settings["logger"] = self._loggers(run_dir, settings["logger"]) or False
        # Lightning's own requeueing saves inside of its signal handler. Ranks that torchrun starts are told by it, in a job of
        # Slurm's, too.
        if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            settings["plugins"] = [*_listed(settings["plugins"]), SLURMEnvironment(auto_requeue=False)]
        if settings["accelerator"] == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed would find a GPU
        trainer = self._instantiate_trainer(settings, callbacks)
        if not isinstance(trainer.strategy, zero.ZeRO):
            trainer.strategy.checkpoint_io = checkpoints.FolderIO()
        return trainer

    def _loggers(self, run_dir: Path, asked: Any) -> list[Logger]:
        loggers = [logger for logger in _listed(asked) if isinstance(logger, Logger)]
        wandb_config = self._get(self.config_init, "wandb")
        on_wandb = wandb_run.logger(run_dir, wandb_config, continued=self.config.ckpt_path not in FRESH)
        own = RunLogger(run_dir) if self.verb == "fit" else None
        return [logger for logger in (own, *loggers, on_wandb) if logger is not None]


def _checkpoint(subcommand: str, config: Any, recipe: Recipe) -> Path | None:
    """Which checkpoint to load, and so to resume where `subcommand` is fit; None = none."""
    asked = config.ckpt_path
    if asked in FRESH:
        return None
    if asked is not None:
        path = Path(asked).resolve()
        if not path.exists():
            raise recipe.error("ckpt_path", f"{asked!r} does not exist")
        if path.is_dir():
            checkpoints.check(path)
        elif not zipfile.is_zipfile(path):  # torch writes an archive, whose directory comes last
            raise recipe.error("ckpt_path", f"{asked!r} is not a whole checkpoint")
        return path
    path = checkpoints.latest(config.run_dir)
    if path is None and checkpoints.newest_first(Path(config.run_dir, "checkpoints")):
        raise UserError(f"no whole checkpoint is left in {config.run_dir}; ckpt_path=fresh starts over, and deletes what is there")
    if path is None and subcommand != "fit" and config.init_from is None:
        raise recipe.error("ckpt_path", f"there is no checkpoint in {config.run_dir}; give one, or 'fresh'")
    return path


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def quieten() -> None:
    """Silence what Lightning and DeepSpeed say that no user can act on."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    quiet = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    quiet.addFilter(_is_useful)
    logging.getLogger("lightning.fabric.utilities.seed").addFilter(_is_useful)
    logging.getLogger("lightning.fabric.utilities.rank_zero").addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _INFOS)
