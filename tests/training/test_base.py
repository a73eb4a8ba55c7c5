"""A time budget ends a run and its learning rate together, and a restart shares it."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from nar_t2i.errors import UserError
from nar_t2i.training import base, optim
from nar_t2i.training.base import TimeBudget, TrainedModule
from nar_t2i.training.optim import OptimizerConfig


class Clock:
    """Each training batch takes a second, or what `seconds` says."""

    def __init__(self):
        self.now, self.seconds = 1000.0, 1.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(base, "time", clock)
    return clock


class Toy(TrainedModule):
    def __init__(self, clock, minutes, slower_after=None, schedule="cosine"):
        super().__init__(OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule), 0.0, minutes)
        self.layer = nn.Linear(2, 2)
        self.clock, self.slower_after, self.rates, self.progresses = clock, slower_after, [], []

    def write(self, folder):
        """There is no model to load."""

    def configure_optimizers(self):
        groups = optim.parameter_groups(self.layer, 0.0)
        optimizer, scheduler = optim.build(self.optimizer_config, groups, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch, index):
        self.clock.now += self.clock.seconds * (3 if self.slower_after and self.global_step >= self.slower_after else 1)
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.progresses.append(self.progress)
        return self.layer(batch).square().mean()


def fit(module, folder, max_steps=-1, resume=None, callbacks=()):
    trainer = Trainer(
        accelerator="cpu", max_steps=max_steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(10_000, 2), batch_size=2), ckpt_path=resume, weights_only=True)
    return trainer


def test_the_run_ends_with_the_budget_and_the_rate_with_the_run(clock, tmp_path):
    module = Toy(clock, minutes=1.0)
    assert fit(module, tmp_path).global_step == 60
    assert module.rates[2] == pytest.approx(1.0) and module.rates[30] == pytest.approx(0.5, abs=0.05)
    assert module.rates[-1] == pytest.approx(0.0, abs=0.01)
    falling = module.rates[11:]
    assert all(a > b for a, b in zip(falling, falling[1:]))
    assert module.progresses[-1] == pytest.approx(1.0, abs=0.02)


def test_the_rate_ends_with_a_run_that_becomes_slower(clock, tmp_path):
    module = Toy(clock, minutes=2.0, slower_after=30)
    assert fit(module, tmp_path).global_step == 60
    assert module.rates[-1] == pytest.approx(0.0, abs=0.01)


def test_steps_still_bound_the_run(clock, tmp_path):
    module = Toy(clock, minutes=1.0)
    assert fit(module, tmp_path, max_steps=20).global_step == 20
    assert module.rates[-1] == pytest.approx(0.0, abs=0.01) and module.progresses[-1] == 1.0


def test_a_restart_shares_the_budget(clock, tmp_path):
    class StopAt(base.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            trainer.should_stop = trainer.should_stop or trainer.global_step == 25

    first = Toy(clock, minutes=1.0)
    fit(first, tmp_path, callbacks=[StopAt()]).save_checkpoint(tmp_path / "half.ckpt")
    clock.now += 500  # the time between does not count
    second = Toy(clock, minutes=1.0)
    assert fit(second, tmp_path, resume=tmp_path / "half.ckpt").global_step == 60
    assert second.rates[0] == pytest.approx(first.rates[-1], abs=0.05)
    assert second.rates[-1] == pytest.approx(0.0, abs=0.01)


def test_the_checkpoint_of_another_model_is_one_clear_error(clock, tmp_path):
    fit(Toy(clock, minutes=1.0), tmp_path, max_steps=2).save_checkpoint(tmp_path / "two.ckpt")
    for layer, words in (
        (nn.Linear(2, 3), r"layer.weight is of shape \(2, 2\) in it and of shape \(3, 2\) in the recipe's \(2 such"),
        (nn.Linear(2, 2, bias=False), r"layer.bias is of shape \(2,\) in it and absent"),
    ):
        other = Toy(clock, minutes=1.0)
        other.layer = layer
        with pytest.raises(UserError, match=words):
            fit(other, tmp_path, resume=tmp_path / "two.ckpt")


def test_all_ranks_follow_the_clock_of_the_first(clock):
    class OtherRank:
        global_step, should_stop, world_size = 12, False, 2

        class strategy:
            @staticmethod
            def broadcast(value):
                return 61.0  # rank 0's

    budget = TimeBudget(1.0)
    budget.on_train_start(OtherRank, None)
    trainer = OtherRank()
    budget.on_train_batch_end(trainer, None)
    assert budget.spent == 61.0 and trainer.should_stop


def test_a_run_without_an_end_is_refused(clock, tmp_path):
    with pytest.raises(UserError, match="max_steps"):
        fit(Toy(clock, minutes=None), tmp_path)
