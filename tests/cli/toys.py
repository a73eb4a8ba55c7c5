"""A model and a data module small enough to train in an instant, for the tests of the command."""

import os
import signal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from nar_t2i.errors import UserError
from nar_t2i.training.optim import OptimizerConfig, build, parameter_groups


class Network(nn.Module):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(4 if i == 0 else width, width) for i in range(depth)])


class Model(LightningModule):
    """interrupt_at: press Ctrl-C during that batch. secret: what a checkpoint's hyperparameters must not bring back."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerConfig = OptimizerConfig(),
        secret: str = "default",
        interrupt_at: int = -1,
        fail: bool = False,
        save_object: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.optimizer_config = optimizer
        self.secret, self.interrupt_at, self.fail, self.save_object = secret, interrupt_at, fail, save_object

    def training_step(self, batch, index):
        if self.global_step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        if self.fail:
            raise UserError("shard 00000.tar: sample 3: broken")
        loss = self.network.layers(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        print(f"secret={self.secret} step={self.global_step}")
        self.log("val_loss", self.network.layers(batch).square().mean())

    def on_save_checkpoint(self, checkpoint):
        if self.save_object:
            checkpoint["object"] = Network(1)

    def configure_optimizers(self):
        groups = parameter_groups(self.network, self.optimizer_config.weight_decay)
        optimizer, scheduler = build(self.optimizer_config, groups, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 4, workers: int = 0, broken: bool = False) -> None:
        super().__init__()
        self.batch_size, self.workers, self.broken = batch_size, workers, broken

    def train_dataloader(self):
        return DataLoader(Samples(self.broken), self.batch_size, num_workers=self.workers)

    def val_dataloader(self):
        return DataLoader(Samples(False), self.batch_size)


class Samples(torch.utils.data.Dataset):
    def __init__(self, broken: bool) -> None:
        self.broken = broken

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if self.broken:
            raise UserError("shard 00000.tar: sample 3: broken")
        return torch.randn(4, generator=torch.Generator().manual_seed(index))
