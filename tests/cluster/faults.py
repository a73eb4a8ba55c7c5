"""What goes wrong on purpose, as callbacks that a recipe can name."""

import os
import signal
import time

from lightning.pytorch import Callback


class KillAt(Callback):
    """Every rank dies, without a word, after so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *arguments) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalAt(Callback):
    """One rank gets a signal in the middle of a step."""

    def __init__(self, step: int, rank: int, name: str) -> None:
        self.step, self.rank, self.name = step, rank, name

    def on_train_batch_start(self, trainer, *arguments) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), getattr(signal, self.name))


class StallAt(Callback):
    """One rank goes to sleep."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, *arguments) -> None:
        while trainer.global_step == self.step and trainer.global_rank == self.rank:
            time.sleep(60)


class Slow(Callback):
    """Every step takes so many seconds longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer, *arguments) -> None:
        time.sleep(self.seconds)
