"""What a run does with a step whose loss or gradient is no number, or whose loss leaps."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import AdamW, Optimizer

from nar_t2i.errors import UserError
from nar_t2i.training.collectives import gather, mean_over_ranks
from nar_t2i.types import Batch

NOT_FINITE = "a gradient is not finite"
NOT_MADE = "Its update was not made; bad_steps.policy: skip would go on without it"


class BadStep(UserError):
    """A step ended the run. What the run holds now is not saved: the newest checkpoint is of before it."""


@dataclass
class GuardConfig:
    """The `bad_steps` key of a recipe.

    policy: "stop" ends the run before the step's update, and the newest checkpoint is what remains; "skip" leaves the
        update out and goes on, at most `patience` times in a row. Both name the step and the samples. "ignore" looks
        at nothing.
    spike: a loss above this multiple of the running mean of the losses counts as bad, too; null: only what is not
        finite. For losses that are above 0, and modules with one optimizer.
    patience: steps that may be skipped in a row.
    """

    policy: Literal["stop", "skip", "ignore"] = "stop"
    spike: float | None = None
    patience: int = 10


class _Asked(NamedTuple):
    """A step of which the device has been asked. numbers: (3,) the mean loss, the gradient's norm and this rank's loss, in the
    host's memory once the device is `done`. step, keys: which it was, and its samples.
    """

    trainer: Trainer
    numbers: Tensor
    done: torch.cuda.Event | None
    step: int
    keys: list[str]


class Guard(Callback):
    """Looks at each step's loss, the mean over all ranks, and its gradient before its update. All ranks decide alike.

    Wherever it can, it does not wait for them: torch's fused AdamW is given, on the device, whether to leave its update out,
    and the host reads a step later what came of it; before it validates, saves or ends in any case. It does wait under ZeRO,
    where the engine does, too, with other optimizers, in fp16, and for `spike`.

    A module that steps its optimizers itself calls `check` before each.
    """

    DECAY, WARM_UP = 0.98, 50  # of the running mean of the losses; steps before anything counts as a spike

    def __init__(self, config: GuardConfig) -> None:
        if config.spike is not None and config.spike <= 1:
            raise UserError(f"key bad_steps.spike: must be above 1, or null, not {config.spike}")
        self.config = config
        self.mean, self.steps, self.skipped = 0.0, 0, 0
        self._losses: list[Tensor] = []
        self._keys: list[str] = []
        self._loss: float | None = None  # of the step that DeepSpeed has been told to take
        self._asked: _Asked | None = None

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"mean": self.mean, "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mean, self.steps, self.skipped = state_dict["mean"], state_dict["steps"], state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization and (self.config.spike or self.config.policy == "skip"):
            raise UserError("key bad_steps: a module with several optimizers only knows policy stop, without spike")
        self._losses, self._keys, self._loss, self._asked = [], [], None, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._keys += batch.keys if isinstance(batch, Batch) else []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach() / loss_scale(trainer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not pl_module.automatic_optimization:
            return
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is None:
            if not self.check(trainer, optimizer):
                optimizer.zero_grad(set_to_none=True)
        elif engine.is_gradient_accumulation_boundary():
            self._loss = self._judge(trainer, None)
            if self._loss is None:
                trainer.strategy.skip_step()

    def check(self, trainer: Trainer, optimizer: Optimizer, step: int | None = None, done: str = NOT_MADE) -> bool:
        """Whether an update is to be made; to be called before each, on all ranks. Raises BadStep. step: default: the trainer's.
        done: what BadStep says of updates."""
        self._read()
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self.config.spike is None and trainer.lightning_module.automatic_optimization and _leaves_out(optimizer) and not scaled:
            self._ask(trainer, optimizer)
            return True
        loss = self._judge(trainer, optimizer, step, done)
        if loss is not None:
            self._accept(loss)
        return loss is not None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._losses:
            return  # of a step that is not complete
        if self._loss is not None:
            engine, loss, self._loss = trainer.strategy.deepspeed_engine, self._loss, None
            # DeepSpeed leaves such a step out by itself, and in fp16, whose scale it has to find, it has to.
            if not engine.optimizer.overflow:
                self._accept(loss)
            elif not engine.fp16_enabled():
                self._refuse(trainer, NOT_FINITE, loss, trainer.global_step - 1, self._keys)
        self._keys = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read()

    def _ask(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Have the optimizer leave its update out, or not, as the device finds."""
        own = torch.stack(self._losses).sum()
        self._losses = []
        mean, norm = mean_over_ranks(own), _norm(optimizer)
        optimizer.found_inf = 1 - (mean.isfinite() & norm.isfinite()).float()
        numbers = torch.stack([mean.float(), norm.float(), own.float()]).to("cpu", non_blocking=own.is_cuda)
        done = torch.cuda.Event() if own.is_cuda else None
        if done is not None:
            done.record()
        self._asked = _Asked(trainer, numbers, done, trainer.global_step, self._keys)

    def _read(self) -> None:
        """What the device has found, of the step that it was asked about last. Raises BadStep."""
        if self._asked is None:
            return
        (trainer, numbers, done, step, keys), self._asked = self._asked, None
        if done is not None:
            done.synchronize()
        loss, norm, own = numbers.tolist()
        if not math.isfinite(loss):
            self._refuse(trainer, f"the loss is {loss}", own, step, keys)
        elif not math.isfinite(norm):
            self._refuse(trainer, NOT_FINITE, own, step, keys)
        else:
            self._accept(loss)

    def _judge(self, trainer: Trainer, optimizer: Optimizer | None, step: int | None = None, done: str = NOT_MADE) -> float | None:
        """The mean loss of the step, or None where it is to be left out."""
        own = torch.stack(self._losses).sum()  # each is divided by their number already
        self._losses = []
        loss = float(mean_over_ranks(own))
        problem = None
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif self.config.spike and self.steps >= self.WARM_UP and loss > self.config.spike * self.mean:
            problem = f"the loss is {loss:.4g}, and the mean of those before {self.mean:.4g}"
        elif optimizer is not None and loss_scale(trainer) == 1 and not _norm(optimizer).isfinite():
            problem = NOT_FINITE  # on all ranks, which have the same gradients; in fp16 the scaler sees to them
        if problem is None:
            return loss
        self._refuse(trainer, problem, float(own), trainer.global_step if step is None else step, self._keys, done)
        return None

    def _accept(self, loss: float) -> None:
        self.skipped = 0
        self.steps += 1
        decay = min(self.DECAY, 1 - 1 / self.steps)
        self.mean = decay * self.mean + (1 - decay) * loss

    def _refuse(self, trainer: Trainer, problem: str, own: float, step: int, keys: list[str], done: str = NOT_MADE) -> None:
        """Raise BadStep, or say that the step is skipped, on all ranks alike. own, keys: this rank's loss and samples."""
        self.skipped += 1
        told = gather((own, keys))
        samples = "; ".join(f"rank {rank} ({loss:.4g}): {', '.join(keys)}" for rank, (loss, keys) in enumerate(told))
        message = f"step {step}: {problem}; samples of {samples}"
        if self.config.policy == "stop":
            raise BadStep(f"{message}. {done}")
        if self.skipped > self.config.patience:
            raise BadStep(f"{message}. {self.skipped} steps in a row are more than bad_steps.patience")
        if trainer.is_global_zero:
            print(f"nar-t2i: {message}; the step is skipped", file=sys.stderr)


def loss_scale(trainer: Trainer) -> float:
    """What a GradScaler multiplies losses and gradients with; 1 where there is none."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def _leaves_out(optimizer: Optimizer) -> bool:
    """Whether its update is one kernel that asks `found_inf`, as those do that a GradScaler works with."""
    return isinstance(optimizer, AdamW) and all(group["fused"] for group in optimizer.param_groups)


def _norm(optimizer: Optimizer) -> Tensor:
    """() of all gradients."""
    return torch.nn.utils.get_total_norm(
        [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    )
