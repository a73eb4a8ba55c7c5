"""How fast a run is, what it waits for, and how much of its time was worth anything."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from nar_t2i.errors import UserError
from nar_t2i.files import read_json, write_json
from nar_t2i.hardware import matrix_rate, operation_counter

STARTED = "started.json"  # when the run was first started, and how often


class _NoModules:
    """Stands in for what tells modules apart in FlopCounterMode, whose hooks on every module would outlast the count."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Nothing to watch."""

    def __exit__(self, *arguments: Any) -> None:
        """Nothing was watched."""


class Monitor(Callback):
    """Logs, with every other logged step:

    - `images_per_second`, `tokens_per_second`: over all ranks, since the last logged step; validation and saving apart.
    - `data_wait`: the share of that time in which this rank asked its loader for a batch.
    - `gradient_norm`: over all trained weights, before clipping; a tokenizer's without its discriminator.
    - `model_flops_utilisation`: three times the operations of a forward pass, which is what a step takes, over the
      seconds of a step, as a share of the rate of a large matrix product in the run's precision on the same device. That
      rate is measured at each start and stands in started.json; the forward pass is counted in the first step, and with
      it the images and positions that it left out.
    - `memory_gib`: the most that torch held on this rank's GPU, or that its process held where there is none.
    - `goodput`: the share of the time since the run was first started that went into steps which it still stands on;
      waiting in a queue, starting, validating, saving, and steps that were lost with a killed process are the rest.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / STARTED
        self.productive = 0.0  # seconds of training steps, those before a restart included
        self._resumed = False
        self._first = 0.0
        self._mark = self._paused = self._seconds = self._waited = 0.0
        self._batches = 0
        self._norm: Tensor | float | None = None
        self._counter: FlopCounterMode | None = None
        self._operations = 0  # of the forward pass of one micro-batch
        self._rate = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"productive": self.productive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.productive, self._resumed = state_dict["productive"], True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dtype = (
            torch.bfloat16 if "bf16" in str(trainer.precision) else torch.half if "16" in str(trainer.precision) else torch.float32
        )
        self._rate = matrix_rate(trainer.strategy.root_device, dtype)
        self._first = self._note_start() if trainer.is_global_zero else 0.0
        self._operations = 0
        self._begin(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._norm = None
        if not self._operations and self._counter is None:
            self._counter = operation_counter()
            self._counter.mod_tracker = _NoModules()
            self._counter.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._stop_counting()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_counting()  # where a forward pass was broken off

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._operations, self._counter = self._counter.get_total_flops(), None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (
            pl_module.automatic_optimization
            and self._norm is None
            and trainer._logger_connector.should_update_logs
            and not hasattr(trainer.strategy, "deepspeed_engine")
        ):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)  # which Lightning has unscaled

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.productive += now - self._mark
        self._seconds += now - self._mark
        self._mark = now
        self._batches += 1
        # `should_update_logs` holds for every micro-batch of such a step: only the last one counts.
        if not trainer._logger_connector.should_update_logs or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        data, loader = trainer.datamodule, trainer.fit_loop._combined_loader.flattened[0]
        values: dict[str, Any] = {"memory_gib": _memory(trainer.strategy.root_device) / 2**30}
        if hasattr(data, "micro_batch_size"):
            rate = self._batches * data.micro_batch_size() * trainer.world_size / max(self._seconds, 1e-9)
            values["images_per_second"] = rate
            if (codec := getattr(pl_module, "codec", None)) is not None:
                values["tokens_per_second"] = rate * codec.spec.length
        operations = 3 * self._operations * self._batches
        values["model_flops_utilisation"] = operations / max(self._seconds, 1e-9) / self._rate
        if (waited := getattr(loader, "waited", None)) is not None:
            values["data_wait"] = min(1.0, (waited - self._waited) / max(self._seconds, 1e-9))
        if hasattr(trainer.strategy, "deepspeed_engine"):
            self._norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()
        if getattr(pl_module, "gradient_norm", None) is not None:
            self._norm = pl_module.gradient_norm
        if self._norm is not None and math.isfinite(self._norm):
            values["gradient_norm"] = self._norm
        if self._first:
            values["goodput"] = min(1.0, self.productive / max(time.time() - self._first, 1e-9))
        pl_module.log_dict({name: float(value) for name, value in values.items()})
        shown, logged = getattr(pl_module, "on_bar", ()), trainer.callback_metrics
        trainer.progress_bar_metrics.update({name: float(logged[name]) for name in shown if name in logged})
        self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.skip(time.perf_counter() - self._paused)

    def skip(self, seconds: float) -> None:
        """Leave out time that went into something else than steps."""
        self._mark += seconds

    def _begin(self, trainer: Trainer) -> None:
        """Begin to count anew."""
        loaders = trainer.fit_loop._combined_loader
        self._waited = getattr(loaders.flattened[0], "waited", 0.0) if loaders is not None else 0.0
        self._seconds, self._batches, self._mark = 0.0, 0, time.perf_counter()

    def _note_start(self) -> float:
        """The time of the run's first start, in seconds since 1970."""
        known = {"first": time.time(), "starts": 0}
        if self._resumed and self.path.is_file():
            known = read_json(self.path)
            if not isinstance(known, dict) or not {"first", "starts"} <= known.keys():
                raise UserError(f"{self.path}: not what a run writes; delete it, and goodput counts from now on")
        write_json(self.path, {**known, "starts": known["starts"] + 1, "matrix_flops_per_second": self._rate})
        return known["first"]


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux
