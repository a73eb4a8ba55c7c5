"""A run's folder: the configuration and versions it ran with, its metrics, its checkpoints, and how to go on from them.

run_dir/
  config.yaml      the resolved configuration (config.1.yaml, … if a later start changed it)
  versions.json    packages, Python, platform, git commit
  metrics.csv      everything logged, continued across restarts
  wandb_id         of the run on W&B, where there is one (see `nar_t2i.training.wandb_run`)
  lock             held, with who holds it, while a process trains
  started.json     when it was first started, and how often (see `nar_t2i.training.monitor`)
  validated        the step of the last validation that ended (see `nar_t2i.training.validation`)
  checkpoints/     step-00001000.ckpt, and last.ckpt, a link to the newest (see `nar_t2i.training.checkpoints`)
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

import nar_t2i
from nar_t2i.errors import UserError
from nar_t2i.files import write_json, write_text
from nar_t2i.hashing import text_hash
from nar_t2i.liveness import going_on
from nar_t2i.provenance import git_commit, package_versions
from nar_t2i.training import checkpoints, wandb_run
from nar_t2i.training.collectives import on_first
from nar_t2i.training.guard import BadStep
from nar_t2i.training.monitor import Monitor
from nar_t2i.training.preemption import Signals

PACKAGES = (
    "torch",
    "lightning",
    "deepspeed",
    "transformers",
    "webdataset",
    "omegaconf",
    "jsonargparse",
    "numpy",
    "pillow",
    "safetensors",
    "sentencepiece",
    "torchmetrics",
    "wandb",
)


LOCK = "lock"
WAIT_FOR_OWN = 180  # seconds


@dataclass
class CheckpointConfig:
    """The `checkpoint` key of a recipe.

    every_steps: optimizer steps, as `trainer.max_steps` counts them, between checkpoints; one more is saved at the end
        and on an interruption.
    keep: how many of the newest stay; 0 = all. Where only one stays, there is none to fall back to.
    """

    every_steps: int = 1000
    keep: int = 2


def versions() -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    return {
        "nar_t2i": nar_t2i.__version__,
        "git_commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(PACKAGES),
    }


class RunFolder(Callback):
    """Write config.yaml and versions.json once training has started; hand the configuration to loggers other than our own.

    A restart with the same configuration changes nothing; with another one, the old file stays as config.1.yaml. A start that
    is refused, by the checkpoint, the data or whatever else looks at them before the first step, leaves the run's configuration
    as it was: its checkpoints are opened by that.
    """

    def __init__(self, folder: str | Path, config_yaml: str, config: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.config_yaml = config_yaml
        self.config = config
        self._lock: Any = None
        self._written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def begin() -> None:
            if stage == "fit" or trainer.loggers:
                self.folder.mkdir(parents=True, exist_ok=True)
            if stage == "fit":
                self._take()
            self._tell_loggers(trainer, stage)

        on_first(lambda: self._told(begin))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write_once(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_once(trainer)  # where there was no step left, and before the module writes what it draws by

    def _write_once(self, trainer: Trainer) -> None:
        if not self._written:
            self._written = True
            on_first(lambda: self._told(self._write))

    def _told(self, work: Callable[[], None]) -> None:
        """Do something; what goes wrong with files is a UserError."""
        try:
            work()
        except OSError as error:
            raise UserError(f"run_dir: {error.filename or self.folder}: {error.strerror or error}") from error

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take(self) -> None:
        """Make sure that no other process trains in this folder, on whichever node."""
        self._lock = open(self.folder / LOCK, "a+", encoding="utf-8")
        job = f" of job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        # What a failed node left of this job's last start may hold it until Slurm has ended that, too.
        until = time.monotonic() + (WAIT_FOR_OWN if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else 0)
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return  # a file system that knows no locks
                self._lock.seek(0)
                other = self._lock.read().strip() or "another process"
                if job and other.endswith(job) and time.monotonic() < until:
                    going_on()
                    time.sleep(1)
                    continue
                self._lock.close()
                self._lock = None
                raise UserError(
                    f"run_dir: {self.folder} is in use by {other}; give this run another run_dir, or delete "
                    f"{self.folder / LOCK} if that process is no more"
                ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}{job}\n")
        self._lock.flush()

    def _tell_loggers(self, trainer: Trainer, stage: str) -> None:
        for logger in trainer.loggers:
            # A trained run's configuration is that of its training.
            if not isinstance(logger, RunLogger) and (stage == "fit" or wandb_run.trial() is not None):
                logger.log_hyperparams(self.config)
            if isinstance(logger, WandbLogger) and stage == "fit":
                write_text(self.folder / wandb_run.ID_FILE, f"{logger.version}\n")

    def _write(self) -> None:
        path = self.folder / "config.yaml"
        if path.is_file() and path.read_text(encoding="utf-8") != self.config_yaml:
            number = 1 + len(list(self.folder.glob("config.*.yaml")))
            path.rename(self.folder / f"config.{number}.yaml")
        write_text(path, self.config_yaml)
        write_json(self.folder / "versions.json", versions())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                # The step that loggers are given; global_step counts every optimizer.
                steps = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.forget_after(steps if trainer.global_step else -1)


class RunCheckpoint(Checkpoint):
    """Save the run every so many optimizer steps, at its end, and when it breaks off; keep the newest.

    Lightning's ModelCheckpoint, once it has saved anything, does not save the last steps of a run. Wherever possible
    the save is at the end of a batch: the one place from which Lightning counts on correctly.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig, signals: Signals, recipe: str, monitor: Monitor) -> None:
        if config.every_steps < 1 or config.keep < 0:
            raise UserError(f"key checkpoint: every_steps must be at least 1 and keep at least 0, not {config}")
        self.folder = Path(folder)
        self.config = config
        self.signals, self.monitor = signals, monitor
        self.recipe = text_hash(recipe)
        self.saved_step = 0
        self._started = False  # before that, what the trainer holds is what was read, in part
        self._random: dict[str, Any] | None = None
        self._stale: list[Path] = []  # checkpoints that are not of this run's past: it started anew, or they are broken

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batches": self._micro_batches}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    @property
    def _micro_batches(self) -> int:
        """For one optimizer step, on each rank."""
        accumulation = getattr(self._trainer.datamodule, "accumulation", None)
        return accumulation() if accumulation is not None else self._trainer.accumulate_grad_batches

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count micro-batches as this run takes them, from the last whole optimizer step on."""
        saved = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn != TrainerFn.FITTING or saved is None:
            return
        if not checkpoint.get("optimizer_states", True):
            raise UserError("ckpt_path: the checkpoint was written under ZeRO; go on under ZeRO, or start with init_from")
        loop = checkpoint["loops"]["fit_loop"]
        progress = loop["epoch_loop.batch_progress"]
        between = progress["current"]["processed"] % saved["micro_batches"]
        if between and progress["current"]["completed"] < progress["current"]["processed"]:
            # Lightning counts the step that the checkpoint was saved in as taken.
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        for counts in (progress["total"], progress["current"]):
            pending = counts["processed"] - counts["completed"]  # of hooks, where the checkpoint was saved in one
            whole = counts["processed"] // saved["micro_batches"] * self._micro_batches
            counts.update(ready=whole, started=whole, processed=whole, completed=whole - pending)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step, self._started = trainer.global_step, True
        found = checkpoints.newest_first(self.folder)
        if trainer.ckpt_path is None:
            self._stale = found
        else:
            self._random = checkpoints.loaded_random_state(trainer)
            self._stale = [path for path in found if checkpoints.step_of(path) > trainer.global_step]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # As late as this: loaders and the validation before training have drawn numbers that the first run did not.
        if self._random is not None:
            checkpoints.set_random_state(self._random)
            self._random = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Several optimizers may step in one batch, so that no count can be relied on to be a multiple.
        due = trainer.global_step // self.config.every_steps > self.saved_step // self.config.every_steps
        if due or trainer.global_step == trainer.max_steps or self.signals.agreed:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # After an error on one rank the others cannot be expected to join in a save.
        together = trainer.world_size == 1 or self.signals.agreed
        if self._started and (trainer.training or trainer.validating) and together and not isinstance(exception, BadStep):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save unless this step is saved already. All ranks must call it."""
        if trainer.global_step == self.saved_step or trainer.fast_dev_run:
            return
        path, start = self.folder / f"step-{trainer.global_step:08d}.ckpt", time.perf_counter()
        checkpoints.save(trainer, path, {"step": trainer.global_step, "recipe": self.recipe})
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._link_and_prune(path)
        self.monitor.skip(time.perf_counter() - start)

    def _link_and_prune(self, newest: Path) -> None:
        link = self.folder / "last.new"
        link.unlink(missing_ok=True)
        link.symlink_to(newest.name)
        last = self.folder / "last.ckpt"
        if last.is_dir() and not last.is_symlink():  # the run's folder was copied without regard to links
            checkpoints.remove(last)
        link.replace(last)
        for path in self._stale:
            if path != newest:
                checkpoints.remove(path)
        self._stale = []
        for path in checkpoints.newest_first(self.folder)[self.config.keep :] if self.config.keep else ():
            checkpoints.remove(path)


class RunLogger(CSVLogger):
    """metrics.csv in the run's folder, continued by a restart (Lightning's logger deletes what it finds)."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name=None, version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> Any:
        if rank_zero_only.rank == 0 and self._experiment is None:
            self._experiment = _ContinuedWriter(self.log_dir)
        return super().experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """config.yaml says it already."""

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop the rows behind `step`: a run that went on from an earlier checkpoint will write them again."""
        self.experiment.forget_after(step)


class _ContinuedWriter(ExperimentWriter):
    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        if os.path.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def forget_after(self, step: int) -> None:
        if not os.path.isfile(self.metrics_file_path):
            return
        with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) <= step]
        if len(kept) < len(rows):
            self._write(kept)

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:  # which does not name the file where the disk is full
            raise OSError(error.errno, error.strerror, self.metrics_file_path) from error

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self._write(rows)

    def _write(self, rows: list[dict[str, str]]) -> None:
        """All of it anew, and whole: it is a run's only history."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_text(Path(self.metrics_file_path), text.getvalue())

    def _check_log_dir_exists(self) -> None:
        """An existing file is continued, not deleted."""


def _commit() -> str | None:
    """The checkout's; of a job's copy of the code what slurm/train.sh wrote beside it; None where the package is installed."""
    root = Path(nar_t2i.__file__).resolve().parents[1]
    copied = root / "commit"
    if not (root / ".git").exists():
        return copied.read_text(encoding="utf-8").strip() or None if copied.is_file() else None
    return git_commit(root)
