"""What a rank really holds, as a callback that a recipe can name."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback

import nar_t2i
from benchmarks.held import really_held


class Held(Callback):
    """Writes held-RANK.json at the end: bytes of weights, and of the optimizer's states with the fp32 weights that it updates."""

    def on_train_end(self, trainer, module) -> None:
        Path(trainer.default_root_dir, f"held-{trainer.global_rank}.json").write_text(json.dumps(really_held(trainer, module)))


class Frozen(Callback):
    """Gives the module so many frozen weights."""

    def __init__(self, size: int) -> None:
        self.size = size

    def setup(self, trainer, module, stage) -> None:
        module.frozen = torch.nn.Parameter(torch.zeros(self.size), requires_grad=False)


class Code(Callback):
    """Writes where the package was imported from."""

    def on_train_start(self, trainer, module) -> None:
        Path(trainer.default_root_dir, f"code-{trainer.global_rank}.txt").write_text(nar_t2i.__file__)
