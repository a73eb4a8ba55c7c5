"""What goes wrong on purpose, as callbacks that a recipe can name."""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import time

import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import Callback

from nar_t2i.errors import UserError
from nar_t2i.training import checkpoints


class KillAt(Callback):
    """Every rank dies, without a word, after so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *arguments) -> None:
        if trainer.global_step >= self.step:  # which several optimizers may pass by
            os.kill(os.getpid(), signal.SIGKILL)


class SignalAt(Callback):
    """One rank gets a signal in the middle of a step."""

    def __init__(self, step: int, rank: int, name: str) -> None:
        self.step, self.rank, self.name = step, rank, name

    def on_train_batch_start(self, trainer, *arguments) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), getattr(signal, self.name))


class SignalAtValidation(Callback):
    """One rank gets a signal in the second batch of the validation after so many optimizer steps."""

    def __init__(self, step: int, rank: int, name: str) -> None:
        self.step, self.rank, self.name = step, rank, name

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, *arguments) -> None:
        if trainer.validating and (trainer.global_step, batch_idx, trainer.global_rank) == (self.step, 1, self.rank):
            os.kill(os.getpid(), getattr(signal, self.name))


class StallAt(Callback):
    """One rank goes to sleep."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, *arguments) -> None:
        while trainer.global_step == self.step and trainer.global_rank == self.rank:
            time.sleep(60)


class Moved(Callback):
    """Where Lightning takes a module to the CPU, it gets new tensors, as it does when it comes from a GPU."""

    def setup(self, trainer, module, stage) -> None:
        _DeviceDtypeModuleMixin.cpu = lambda module: module._apply(torch.clone)


class Slow(Callback):
    """Every step takes so many seconds longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer, *arguments) -> None:
        time.sleep(self.seconds)


class SlowSaves(Callback):
    """Checkpoints take longer to write, and their first byte and their manifest are told."""

    def __init__(self, seconds: float) -> None:
        write, seal = checkpoints.write_file, checkpoints._seal

        def slowly(path, content):
            print(f"first byte of {path}", file=sys.stderr, flush=True)
            time.sleep(seconds)
            return write(path, content)

        def sealed(beside, folder, content):
            time.sleep(seconds)
            problem = seal(beside, folder, content)
            print(f"sealed {folder}", file=sys.stderr, flush=True)
            return problem

        checkpoints.write_file, checkpoints._seal = slowly, sealed


class BadLoss(Callback):
    """One rank's loss is multiplied, or made nan, or its gradient is, at certain steps."""

    def __init__(self, step: int | list[int], rank: int, factor: str | float) -> None:
        self.steps, self.rank, self.factor = [step] if isinstance(step, int) else step, rank, factor

    def on_train_batch_start(self, trainer, *arguments) -> None:
        self._step = trainer.global_step  # which the first of two optimizers moves on

    def _due(self, trainer) -> bool:
        return self._step in self.steps and trainer.global_rank == self.rank

    def on_before_backward(self, trainer, module, loss) -> None:
        if self._due(trainer) and self.factor == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        elif self._due(trainer) and self.factor == "second":  # the discriminator's, which comes after the codec's
            self._seen = getattr(self, "_seen", 0) + 1
            if self._seen == 2:
                loss.register_hook(lambda gradient: gradient * float("nan"))
        elif self._due(trainer):
            loss.data.mul_(float(self.factor))


class KillWorkerAt(Callback):
    """One of this rank's data workers dies, as one does for which memory ran out."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, *arguments) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(0.5)


class FullDisk(Callback):
    """From a step on, one rank cannot write files above some size, as if its disk were full in the middle of one."""

    def __init__(self, step: int, rank: int, size: int = 20_000) -> None:
        self.step, self.rank, self.size = step, rank, size

    def on_train_batch_start(self, trainer, *arguments) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class SignalAtSanityCheck(Callback):
    """One rank gets a signal before training has begun."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank, self.name = rank, name

    def on_sanity_check_start(self, trainer, *arguments) -> None:
        if trainer.global_rank == self.rank:
            os.kill(os.getpid(), getattr(signal, self.name))


class RaiseAt(Callback):
    """One rank meets an error that no other does: in the second batch of the validation after so many steps, before a step of
    training, or when the model is written at the end."""

    def __init__(self, where: str, rank: int, step: int = 0) -> None:
        self.where, self.rank, self.step = where, rank, step

    def _raise_if(self, trainer, where) -> None:
        if (where, trainer.global_rank, trainer.global_step) == (self.where, self.rank, self.step):
            raise UserError(f"rank {self.rank} alone cannot go on")

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, *arguments) -> None:
        if trainer.validating and batch_idx == 1:
            self._raise_if(trainer, "validation")

    def on_train_batch_start(self, trainer, *arguments) -> None:
        self._raise_if(trainer, "training")

    def on_fit_start(self, trainer, module) -> None:
        if self.where == "write" and trainer.global_rank == self.rank:
            module.write = self._full

    def _full(self, folder) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
