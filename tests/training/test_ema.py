"""The weight average against a plain numpy one, through accumulation, several optimizers, evaluation and resume."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from nar_t2i.errors import UserError
from nar_t2i.training.ema import EMA, ema_decay


class Toy(LightningModule):
    """Records its weights after every optimizer step and what validation saw."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.history, self.validated = [], []

    def training_step(self, batch, index):
        return self.network(batch).square().mean()

    def validation_step(self, batch, index):
        self.validated.append(self.weights())

    def on_before_zero_grad(self, optimizer):
        if self.trainer.global_step:
            self.history.append(self.weights())

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)

    def weights(self):
        return self.network[0].weight.detach().clone()


class TwoOptimizers(Toy):
    """Manual optimisation, as an adversarial tokenizer trains: global_step rises by two a batch."""

    def __init__(self, ema=None):
        super().__init__()
        self.automatic_optimization = False
        self.ema = ema

    def training_step(self, batch, index):
        self.history.append(None)
        for optimizer, part in zip(self.optimizers(), (self.network[0], self.network[1])):
            loss = self.network(batch).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.ema is not None and part is self.network[0]:
                self.ema.step(self)
        self.history[-1] = self.weights()

    def on_before_zero_grad(self, optimizer):
        pass

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.network]


def loader(batches):
    data = torch.randn(batches * 4, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(data, batch_size=4)


def trainer(tmp_path, *callbacks, **kwargs):
    kwargs = {"max_epochs": 1, "enable_checkpointing": False, **kwargs}
    return Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **kwargs,
    )


def numpy_ema(first, values, decay, warmup):
    average = first.double().numpy()
    for t, value in enumerate(values):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        average = d * average + (1 - d) * value.double().numpy()
    return average


def test_decay_warms_up():
    assert ema_decay(0.9, 0, True) == pytest.approx(0.1)
    assert ema_decay(0.9, 10_000, True) == 0.9
    assert ema_decay(0.9, 0, False) == 0.9


@pytest.mark.parametrize("warmup", [True, False])
def test_equals_numpy_under_accumulation(tmp_path, warmup):
    torch.manual_seed(0)
    model, ema = Toy(), EMA(0.8, warmup)
    first = model.weights()
    trainer(tmp_path, ema, accumulate_grad_batches=2).fit(model, loader(8))
    model.history.append(model.weights())
    values = [v for i, v in enumerate(model.history) if i == 0 or not torch.equal(v, model.history[i - 1])]
    assert ema.updates == len(values) == 4
    np.testing.assert_allclose(ema.average["network.0.weight"], numpy_ema(first, values, 0.8, warmup), atol=1e-6)


def test_two_optimizers_count_one_step_a_batch(tmp_path):
    torch.manual_seed(0)
    model, ema = TwoOptimizers(), EMA(0.5, False)
    first = model.weights()
    trainer(tmp_path, ema).fit(model, loader(3))
    assert ema.updates == 3
    np.testing.assert_allclose(ema.average["network.0.weight"], numpy_ema(first, model.history, 0.5, False), atol=1e-6)


def test_explicit_step_replaces_the_automatic_one(tmp_path):
    ema = EMA(0.5)
    model = TwoOptimizers(ema)
    trainer(tmp_path, ema).fit(model, loader(3))
    assert ema.updates == 3


def test_averages_trainable_parameters_and_float_buffers_of_the_named_submodules(tmp_path):
    ema = EMA(0.5, submodules=["network"])
    trainer(tmp_path, ema).fit(Toy(), loader(1))
    assert set(ema.average) == {
        "network.0.weight",
        "network.0.bias",
        "network.1.weight",
        "network.1.bias",
        "network.1.running_mean",
        "network.1.running_var",
    }
    everything = EMA(0.5)
    trainer(tmp_path, everything).fit(Toy(), loader(1))
    assert set(everything.average) == set(ema.average)  # the frozen layer has no buffers


def test_unknown_submodule_is_named(tmp_path):
    with pytest.raises(UserError, match="'netwrok'"):
        trainer(tmp_path, EMA(0.5, submodules=["netwrok"])).fit(Toy(), loader(1))


def test_validation_sees_the_average_and_training_does_not(tmp_path):
    torch.manual_seed(0)
    model, ema = Toy(), EMA(0.5, False)
    averages = []
    ema_end = ema.on_validation_end

    def keep(*args):
        averages.append(ema.average["network.0.weight"].clone())
        ema_end(*args)

    ema.on_validation_end = keep
    trainer(tmp_path, ema, val_check_interval=2, limit_val_batches=1).fit(model, loader(4), loader(1))
    assert len(model.validated) == 2
    assert all(torch.equal(*pair) for pair in zip(model.validated, averages))
    torch.manual_seed(0)
    alone = Toy()
    trainer(tmp_path).fit(alone, loader(4))
    assert torch.equal(alone.weights(), model.weights())


def test_applied_restores_bit_exactly_even_after_an_exception():
    model, ema = Toy(), EMA(0.5)
    ema.step(model)
    with torch.no_grad():
        for value in ema.average.values():
            value.add_(0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError), ema.applied(model):
        with ema.applied(model):
            assert torch.equal(model.network[0].weight, ema.average["network.0.weight"])
        assert torch.equal(model.network[0].weight, ema.average["network.0.weight"])
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_half_precision_weights_are_averaged_in_float32():
    model, ema = Toy().bfloat16(), EMA(0.999, warmup=False)
    ema.step(model)
    with torch.no_grad():
        model.network[0].weight.add_(1.0)
    before = ema.average["network.0.weight"].clone()
    ema.step(model)
    change = ema.average["network.0.weight"] - before
    assert change.dtype == torch.float32
    np.testing.assert_allclose(change, np.full((3, 3), 0.001), rtol=0.1)


def test_resume_equals_an_uninterrupted_run(tmp_path):
    def run(epochs, resume=None):
        torch.manual_seed(0)
        model, ema = Toy(), EMA(0.9)
        t = trainer(tmp_path, ema, max_epochs=epochs, enable_checkpointing=True)
        t.fit(model, loader(4), ckpt_path=resume)
        return t, model, ema

    _, _, whole = run(2)
    t, _, _ = run(1)
    t.save_checkpoint(tmp_path / "half.ckpt")
    _, _, resumed = run(2, tmp_path / "half.ckpt")
    assert resumed.updates == whole.updates == 8
    assert all(torch.equal(resumed.average[k], v) for k, v in whole.average.items())


def test_validate_from_a_checkpoint_uses_its_average(tmp_path):
    ema = EMA(0.9)
    t = trainer(tmp_path, ema)
    t.fit(Toy(), loader(4))
    t.save_checkpoint(tmp_path / "last.ckpt")
    model = Toy()
    trainer(tmp_path, EMA(0.9)).validate(model, loader(1), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(model.validated[0], ema.average["network.0.weight"])
    assert not torch.equal(model.weights(), ema.average["network.0.weight"])
