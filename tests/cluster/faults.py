"""What goes wrong on purpose, as callbacks that a recipe can name."""

import os
import signal

from lightning.pytorch import Callback


class KillAt(Callback):
    """Every rank dies, without a word, after so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *arguments) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
