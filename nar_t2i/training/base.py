"""What every trained module shares: optimizer steps to come, a time budget, the weight average."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning
from lightning.pytorch import Callback, LightningModule, Trainer

from nar_t2i.errors import UserError
from nar_t2i.training.ema import EMA
from nar_t2i.training.optim import OptimizerConfig


class TimeBudget(Callback):
    """End training after some minutes of wall time, with a learning-rate schedule that ends then, too.

    The number of steps to come is estimated from the pace so far, so a slower machine takes fewer steps and still
    anneals. Restarts share one budget. How many steps a run takes then depends on the machine: meant for demonstrations.
    """

    WARM_UP = 10  # steps that tell nothing about the pace

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self._spent_before = 0.0
        self._started: float | None = None
        self._paced: tuple[int, float] | None = None

    @property
    def spent(self) -> float:
        """Seconds of training so far, those before a restart included."""
        return self._spent_before + (time.monotonic() - self._started if self._started else 0.0)

    def total_steps(self, step: int, largest: int) -> int:
        """The estimated number of steps of the whole run, at most `largest`."""
        if self._paced is None or step <= self._paced[0]:
            return largest
        first, spent = self._paced
        pace = (self.spent - spent) / (step - first)
        return min(largest, step + max(1, math.ceil((self.seconds - self.spent) / pace)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._paced is None and trainer.global_step >= self.WARM_UP:
            self._paced = trainer.global_step, self.spent
        if self.spent >= self.seconds:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.spent, "paced": self._paced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._spent_before = state_dict["spent"]
        self._paced = state_dict["paced"] and tuple(state_dict["paced"])


class TrainedModule(lightning.LightningModule):
    """optimizer: AdamW and its schedule. ema_decay: of the weight average that is judged and exported; 0 = none.

    budget_minutes: a time budget (see TimeBudget), beside `trainer.max_steps`.
    """

    def __init__(self, optimizer: OptimizerConfig, ema_decay: float, budget_minutes: float | None):
        super().__init__()
        self.optimizer_config = optimizer
        self.ema = EMA(ema_decay) if ema_decay else None
        self.budget = TimeBudget(budget_minutes) if budget_minutes else None

    def configure_callbacks(self) -> list[Callback]:
        return [callback for callback in (self.ema, self.budget) if callback]

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
