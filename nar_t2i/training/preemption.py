"""Signals, told to all ranks at the end of a batch; and a watch over ranks that stall.

A handler only sets a flag. At the end of each batch, of validation too, the ranks send each other their flags over gloo,
without waiting, and read at the end of the next what was sent: all stop after the same batch, once the checkpoint is written,
and no step waits for it. (Lightning saves, or sends, from within its handlers, where the other ranks may be anywhere: they
hang.)
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from nar_t2i import liveness
from nar_t2i.errors import INTERRUPTED, REQUEUE, TERMINATED, UserError

# In rising order: where ranks got different ones, the last counts. The exit statuses tell a batch script what to do.
STATUS = {signal.SIGINT: INTERRUPTED, signal.SIGUSR1: REQUEUE, signal.SIGUSR2: REQUEUE, signal.SIGTERM: TERMINATED}
_ORDER = list(STATUS)
_MEANING = {INTERRUPTED: "interrupted", REQUEUE: "asked to make room", TERMINATED: "asked to end"}


class Signals(Callback):
    """Ctrl-C, SIGUSR1, SIGUSR2 and SIGTERM let the present batch finish, and the run be saved, before the process ends.

    The exit status is 130 after Ctrl-C, 143 after SIGTERM (which `scancel` sends: do not start it again) and 85 after
    SIGUSR1 or SIGUSR2, which Slurm is asked to send before a job's time is over: start it again. On one rank a Ctrl-C
    between batches ends the run at once, and so does a second one anywhere.

    agreed: the signal that all ranks know of, or None.
    """

    def __init__(self) -> None:
        self.agreed: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._in_batch = False
        self._alone = True
        self._group: Any = None
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._common = 0.0  # batches of a validation that all ranks have
        self._previous: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """The exit status of a run that was interrupted."""
        return STATUS[self.agreed or self._received or signal.SIGINT]

    @property
    def received(self) -> bool:
        return self._received is not None

    @property
    def meaning(self) -> str:
        return _MEANING[self.status]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._alone = trainer.world_size == 1
        # Its handler of SIGTERM sends, from wherever the process stands, what the other ranks may never receive.
        trainer._signal_connector.register_signal_handlers = lambda: None
        if stage == "fit":  # the other verbs have nothing to save, and end at once
            self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # Lightning has put its own handlers in the place of these
        if not self._alone:
            self._group = dist.new_group(backend="gloo")
            # It would send SIGTERM's flag from rank 0 to all, on the device, and wait for it, in every batch.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_if_agreed()
        self._in_batch = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._in_batch = False
        self._agree()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_agreed()
        if self._group is not None:
            batches = torch.tensor(float(sum(trainer.num_val_batches)))
            dist.all_reduce(batches, dist.ReduceOp.MIN, group=self._group)
            self._common = float(batches)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._common -= 1
        if trainer.validating and (self._alone or self._common >= 0):
            self._agree()
            self._stop_if_agreed()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sent is not None:
            self._sent[1].wait()
            self._sent = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _agree(self) -> None:
        if self._alone:
            self.agreed = self._received
            return
        if self._sent is not None:
            flag, work = self._sent
            work.wait()
            self.agreed = _ORDER[int(flag) - 1] if flag else None
        flag = torch.tensor(_ORDER.index(self._received) + 1 if self._received else 0)
        self._sent = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _stop_if_agreed(self) -> None:
        if self.agreed is not None:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in STATUS:
                previous = signal.signal(number, self._handle)
                self._previous.setdefault(number, previous)

    def _handle(self, number: int, frame: Any) -> None:
        again, self._received = self._received is not None, signal.Signals(number)
        if number == signal.SIGINT and (again or (self._alone and not self._in_batch)):
            raise KeyboardInterrupt


class StallWatch(Callback):
    """Ends a process in which no batch has ended for so many minutes, after writing where each of its threads stands.

    One rank that hangs makes all others wait in the next collective, so each of them says where. The watch is a thread
    without Python's lock: it works also where that is what hangs. minutes: more than the longest step, validation
    batch and checkpoint take.
    """

    EVERY = 1.0  # seconds between two windings

    def __init__(self, minutes: float) -> None:
        if minutes <= 0:
            raise UserError(f"key stall_minutes: must be above 0, or null, not {minutes}")
        self.seconds = 60 * minutes
        self._wound = -float("inf")

    def _wind(self, *arguments: Any, **keywords: Any) -> None:
        now = time.monotonic()
        if now - self._wound > self.EVERY:
            self._wound = now
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._wind()
        liveness.listen(self._wind)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        liveness.stop_listening(self._wind)
        faulthandler.cancel_dump_traceback_later()

    on_train_start = on_train_batch_start = on_train_batch_end = on_train_end = _wind
    on_validation_start = on_validation_batch_start = on_validation_batch_end = on_validation_end = _wind
    on_test_batch_end = on_predict_batch_end = on_save_checkpoint = on_sanity_check_start = _wind
