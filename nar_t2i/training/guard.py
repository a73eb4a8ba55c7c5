"""What a run does with a step whose loss or gradient is no number, or whose loss leaps."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from nar_t2i.errors import UserError
from nar_t2i.training import checkpoints
from nar_t2i.types import Batch


NOT_FINITE = "a gradient is not finite"


@dataclass
class GuardConfig:
    """The `bad_steps` key of a recipe.

    policy: "stop" ends the run before the step changes a weight, so that the checkpoint before it is what remains;
        "skip" leaves the step's update out and goes on, at most `patience` times in a row. Both name the step and the
        samples. "ignore" looks at nothing.
    spike: a loss above this multiple of the running mean of the losses counts as bad, too; null: only what is not
        finite. For losses that are above 0, and modules with one optimizer.
    patience: steps that may be skipped in a row.
    """

    policy: Literal["stop", "skip", "ignore"] = "stop"
    spike: float | None = None
    patience: int = 10


class Guard(Callback):
    """Looks at each step's loss, the mean over all ranks, before its update. All ranks decide alike."""

    DECAY, WARM_UP = 0.98, 50  # of the running mean of the losses; steps before anything counts as a spike

    def __init__(self, config: GuardConfig) -> None:
        if config.spike is not None and config.spike <= 1:
            raise UserError(f"key bad_steps.spike: must be above 1, or null, not {config.spike}")
        self.config = config
        self.mean, self.steps, self.skipped = 0.0, 0, 0
        self._losses: list[Tensor] = []
        self._keys: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mean, self.steps, self.skipped = state_dict["mean"], state_dict["steps"], state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization and (self.config.spike or self.config.policy == "skip"):
            raise UserError("key bad_steps: a module with several optimizers only knows policy stop, without spike")
        self._losses, self._keys = [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._keys += batch.keys if isinstance(batch, Batch) else []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is not None and not engine.is_gradient_accumulation_boundary():
            return
        own = torch.stack(self._losses).sum()  # each is divided by their number already
        self._losses = []
        loss = float(trainer.strategy.reduce(own.clone(), reduce_op="mean"))
        problem = self._problem(loss)
        if problem is None and engine is None and not _finite(optimizer):
            problem = NOT_FINITE  # on all ranks, which have the same gradients
        if problem is None:
            self.skipped = 0
            self.steps += 1
            decay = min(self.DECAY, 1 - 1 / self.steps)
            self.mean = decay * self.mean + (1 - decay) * loss
            return
        self._refuse(trainer, problem, float(own))
        if engine is not None:
            trainer.strategy.skip_step()
        else:
            optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._losses:
            return  # of a step that is not complete
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        # DeepSpeed leaves such a step out by itself, and in fp16, whose scale it has to find, it has to.
        if engine is not None and engine.optimizer.overflow and not self.skipped and not engine.fp16_enabled():
            self._refuse(trainer, NOT_FINITE, float("nan"))
        self._keys = []

    def _problem(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.config.spike and self.steps >= self.WARM_UP and loss > self.config.spike * self.mean:
            return f"the loss is {loss:.4g}, and the mean of those before {self.mean:.4g}"
        return None

    def _refuse(self, trainer: Trainer, problem: str, own: float) -> None:
        """Raise UserError, or say that the step is skipped, on all ranks alike. own: this rank's loss."""
        self.skipped += 1
        told = checkpoints.gather((own, self._keys))
        samples = "; ".join(f"rank {rank} ({loss:.4g}): {', '.join(keys)}" for rank, (loss, keys) in enumerate(told))
        message = f"step {trainer.global_step}: {problem}; samples of {samples}"
        if self.config.policy == "stop":
            raise UserError(f"{message}. No weight was changed by this step; bad_steps.policy: skip would go on without it")
        if self.skipped > self.config.patience:
            raise UserError(f"{message}. {self.skipped} steps in a row are more than bad_steps.patience")
        if trainer.is_global_zero:
            print(f"nar-t2i: {message}; the step is skipped", file=sys.stderr)


def _finite(optimizer: Optimizer) -> bool:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())
