"""What every trained module shares: optimizer steps to come, a time budget, the weight average."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from torch.optim import Optimizer

from nar_t2i.errors import UserError
from nar_t2i.parts import describe
from nar_t2i.training.checkpoints import FROZEN
from nar_t2i.training.collectives import mean_over_ranks, on_first
from nar_t2i.training.ema import EMA
from nar_t2i.training.guard import Guard
from nar_t2i.training.optim import OptimizerConfig
from nar_t2i.training.zero import gathered


class TimeBudget(Callback):
    """End training after some minutes of wall time, with a learning-rate schedule that ends then, too.

    The number of steps to come is estimated from the pace so far, so a slower machine takes fewer steps and still
    anneals. Restarts share one budget. How many steps a run takes depends on the machine: meant for demonstrations.
    Rank 0's clock counts, since ranks that disagreed would take different learning rates and end at different steps.
    """

    WARM_UP = 10  # steps that tell nothing about the pace

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.spent = 0.0  # seconds of training up to the last finished batch, those before a restart included
        self.steps = 0  # optimizer steps by then
        self._paced: tuple[int, float] | None = None  # `steps` and `spent` where the pace began to count
        self._clock_at_zero = 0.0

    def total_steps(self, step: int, largest: int) -> int:
        """The estimated number of steps of the whole run, at most `largest`."""
        if self._paced is None or self.steps <= self._paced[0]:
            return largest
        first, spent = self._paced
        pace = max(1e-9, (self.spent - spent) / (self.steps - first))
        return min(largest, max(step + 1, self.steps + math.ceil((self.seconds - self.spent) / pace)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock_at_zero = time.monotonic() - self.spent

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.steps:
            return  # between micro-batches, where the ranks need not meet
        self.spent = trainer.strategy.broadcast(time.monotonic() - self._clock_at_zero)
        self.steps = trainer.global_step
        if self._paced is None and self.steps >= self.WARM_UP:
            self._paced = self.steps, self.spent
        if self.spent >= self.seconds:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.spent, "steps": self.steps, "paced": self._paced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent, self.steps = state_dict["spent"], state_dict.get("steps", 0)
        self._paced = state_dict["paced"] and tuple(state_dict["paced"])


class TrainedModule(lightning.LightningModule):
    """A LightningModule with an optimizer, an average of its weights, and perhaps a budget of time.

    optimizer: AdamW or Muon, and its schedule. ema_decay: of the weight average that is judged and exported; 0 = none.
    budget_minutes: a time budget (see TimeBudget), beside `trainer.max_steps`.

    A generator's training step reads from the device only how many slots (and, where padding is left out, words) there are, and
    copies nothing to it that would be waited for, so that the host runs ahead of a GPU; a tokenizer's also waits for the guard
    and for dead codes. So numbers are logged as tensors, and the monitor fills the progress bar, with what `on_bar` names,
    whenever it logs; Lightning's `prog_bar` would read the device in every step. Without a logger the bar shows nothing.
    """

    on_bar: tuple[str, ...] = ()

    def __init__(self, optimizer: OptimizerConfig, ema_decay: float, budget_minutes: float | None):
        super().__init__()
        self.optimizer_config = optimizer
        self.ema = EMA(ema_decay) if ema_decay else None
        self.budget = TimeBudget(budget_minutes) if budget_minutes else None
        self.gradient_norm: Tensor | None = None  # before clipping, where the module clips by itself
        self._logged_step, self._of_step = -1, {}  # see `log_of_step`
        self._frozen_marks: dict[str, list[float]] = {}  # see `note_frozen`

    @property
    def saved_parts(self) -> tuple[Any, ...]:
        """What `write` saves."""
        return ()

    def check_parts(self) -> None:
        """UserError where what is trained could not be saved at the end."""
        for part in self.saved_parts:
            try:
                describe(part)
            except TypeError as error:
                raise UserError(f"{error}; without it the model could not be saved when the training has ended") from error

    def note_frozen(self) -> None:
        """Remember which frozen weights the module is trained beside, so that a checkpoint can tell: it does not hold them."""
        self._frozen_marks = {name: _mark(p) for name, p in self.named_parameters() if not p.requires_grad}

    def check_noted(self, trained_beside: Mapping[str, list[float]]) -> None:
        """UserError where a checkpoint was trained beside other frozen weights than those that were noted last."""
        # Earlier versions noted hashes, which are texts and say nothing here.
        known = {name: mark for name, mark in trained_beside.items() if all(isinstance(value, float) for value in mark)}
        others = [name for name, mark in self._frozen_marks.items() if not _alike(known.get(name, mark), mark)]
        if others:
            raise UserError(
                f"the run was trained beside other frozen weights than these: {others[0]} ({len(others)} such). No checkpoint "
                "holds them; name where they came from, or give them to the part as a file"
            )

    def write(self, folder: Path) -> None:
        """Save what was trained as a folder that can be loaded, with the weights that the module holds."""
        raise NotImplementedError

    def on_fit_end(self) -> None:
        """On all ranks: the averaged weights, whole, are written by the first, for which the others wait."""
        with self.ema.applied(self) if self.ema is not None else nullcontext(), gathered(self):
            on_first(lambda: self.write(Path(self.trainer.default_root_dir) / "model"))
        super().cpu()

    def cpu(self) -> TrainedModule:
        """Stays where it is while a fit ends. Lightning would move the module before `on_fit_end`, but neither the averages nor
        ZeRO's buffers nor the batches of a validation that is still owed; `on_fit_end` moves it afterwards.
        """
        trainer = self._trainer
        ending = trainer is not None and trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING
        return self if ending else super().cpu()

    def validate_by_steps(self, accumulation: int) -> None:
        """Make a whole `trainer.val_check_interval`, which Lightning counts in micro-batches, one of optimizer steps."""
        trainer = self.trainer
        trainer.steps_between_validations = getattr(trainer, "steps_between_validations", trainer.val_check_interval)
        if isinstance(trainer.steps_between_validations, int) and trainer.check_val_every_n_epoch is None:
            trainer.val_check_interval = trainer.steps_between_validations * accumulation

    @property
    def strict_loading(self) -> bool:
        return not has_frozen(self)  # `on_load_checkpoint` compares what is not frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Frozen weights are somebody else's: they come with the recipe, and no checkpoint repeats them."""
        for name in _frozen(self):
            checkpoint["state_dict"].pop(name, None)
        if self._frozen_marks:
            checkpoint[FROZEN] = self._frozen_marks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model with one error, before torch lists all that differs."""
        frozen = _frozen(self)
        own = {name: value for name, value in self.state_dict().items() if name not in frozen}
        saved = {name: value for name, value in checkpoint.get("state_dict", {}).items() if name not in frozen}
        shapes = {name: [tuple(x[name].shape) if name in x else None for x in (saved, own)] for name in {**own, **saved}}
        differing = [name for name, (there, here) in shapes.items() if there != here]
        if saved and differing:
            there, here = ("absent" if shape is None else f"of shape {shape}" for shape in shapes[differing[0]])
            raise UserError(
                f"the checkpoint is of another model: {differing[0]} is {there} in it and {here} in the recipe's "
                f"({len(differing)} such differences); give the run another run_dir, or start from it with --init_from"
            )
        self.check_noted(checkpoint.get(FROZEN, {}))

    def configure_callbacks(self) -> list[Callback]:
        return [callback for callback in (self.ema, self.budget) if callback]

    def log_of_step(self, values: dict[str, Tensor], step: int | None = None) -> None:
        """Log scalars of a micro-batch as means over the optimizer step: over its micro-batches so far and, where metrics are
        written, over all ranks, so that a curve does not depend on how the global batch was divided. step: how many were
        finished before it; None = `global_step`, which an update has moved on.
        """
        step = self.trainer.global_step if step is None else step
        if self._logged_step != step:
            self._logged_step, self._of_step = step, {}
        of_step = self._of_step.setdefault(tuple(values), [])
        of_step.append(torch.stack([value.detach().float() for value in values.values()]))
        means = torch.stack(of_step).mean(0)
        if self.trainer._logger_connector.should_update_logs:
            means = mean_over_ranks(means)
        for name, mean in zip(values, means, strict=True):
            self.log(name, mean)

    def check(self, optimizer: Optimizer, step: int, done: str) -> None:
        """Raises BadStep where the gradients are not such that an update should be made; for modules that make their
        updates themselves. step: which it is. done: what then is to be said of updates."""
        for callback in self.trainer.callbacks:
            if isinstance(callback, Guard):
                callback.check(self.trainer, optimizer, step, done)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; an estimate under a time budget."""
        largest = self.trainer.max_steps
        if largest <= 0:
            if self.budget is None:
                raise UserError("trainer.max_steps: a run needs a number of steps, for its learning-rate schedule")
            largest = 10**9
        return self.budget.total_steps(self.trainer.global_step, largest) if self.budget else largest

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last."""
        return min(1.0, self.trainer.global_step / max(1, self.total_steps() - 1))


def _mark(weights: Tensor) -> list[float]:
    """What tells weights from others that are drawn anew: the first of them."""
    return weights.detach().flatten()[:16].float().tolist()


def _alike(one: list[float], other: list[float]) -> bool:
    """Up to the rounding of weights that are stored in half precision."""
    largest = max(map(abs, (*one, *other)), default=0.0)
    return len(one) == len(other) and all(abs(a - b) <= 0.01 * largest for a, b in zip(one, other, strict=True))


def has_frozen(module: nn.Module) -> bool:
    return bool(_frozen(module))


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
