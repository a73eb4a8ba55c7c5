"""What the monitor says of a run whose steps, waits, saves and restarts take a known time."""

import csv
import json
import time

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from nar_t2i.cli import main
from nar_t2i.training.monitor import Monitor
from tests.cluster import tiny
from tests.cluster.ranks import ROOT

STEP = 0.05


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((ROOT / "tests/cluster/tiny.yaml").read_text())
    recipe["trainer"].update(max_steps=20, log_every_n_steps=5, num_sanity_val_steps=0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def fit(*overrides):
    return main(["fit", "--config", "tiny.yaml", *overrides])


def slow(seconds):
    return "--trainer.callbacks=" + json.dumps([{"class_path": "tests.cluster.faults.Slow", "init_args": {"seconds": seconds}}])


def logged(folder, name):
    with open(folder / "run/metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_rates_are_those_of_the_steps_alone(folder):
    assert fit(slow(STEP)) == 0
    images, tokens = logged(folder, "images_per_second"), logged(folder, "tokens_per_second")
    assert sorted(images) == [4, 9, 14, 19]
    for step, rate in images.items():
        assert rate < 16 / STEP  # a step takes longer than the sleep in it
        assert tokens[step] == pytest.approx(4 * rate)


def test_validation_and_saving_do_not_slow_it_down(folder, monkeypatch):
    from nar_t2i.training import checkpoints
    from nar_t2i.training.generator import GeneratorModule

    save, validate = checkpoints.save, GeneratorModule.validation_step
    monkeypatch.setattr(checkpoints, "save", lambda *a: (time.sleep(1.0), save(*a))[1])
    monkeypatch.setattr(GeneratorModule, "validation_step", lambda *a: (time.sleep(1.0), validate(*a))[1])
    assert fit(slow(STEP), "--checkpoint.every_steps=2") == 0
    images = logged(folder, "images_per_second")
    assert min(images.values()) > 16 * 5 / (5 * STEP + 1.5)  # two saves or more lie between any two of them
    assert max(logged(folder, "goodput").values()) < 0.5


def test_the_utilisation_is_that_of_three_forward_passes_at_the_rate_that_was_measured(folder, monkeypatch):
    from nar_t2i.hardware import operation_counter
    from nar_t2i.training.generator import GeneratorModule

    counted, step = [], GeneratorModule.training_step

    def noted(self, *arguments):
        with operation_counter() as counter:
            loss = step(self, *arguments)
        counted.append(counter.get_total_flops())
        return loss

    monkeypatch.setattr(GeneratorModule, "training_step", noted)
    assert fit() == 0
    rate = json.loads((folder / "run/started.json").read_text())["matrix_flops_per_second"]
    shares, images = logged(folder, "model_flops_utilisation"), logged(folder, "images_per_second")
    for step_number, share in shares.items():
        assert share * rate / images[step_number] * 16 == pytest.approx(3 * counted[0], rel=1e-4)


def test_the_gradient_norm_is_that_before_clipping(folder):
    norms = []
    from nar_t2i.training.generator import GeneratorModule

    clip = GeneratorModule.configure_gradient_clipping

    def noted(self, *arguments, **keywords):
        norms.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]).norm())
        clip(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneratorModule, "configure_gradient_clipping", noted)
        assert fit("--model.init_args.optimizer.clip_norm=0.001") == 0
    for step, norm in logged(folder, "gradient_norm").items():
        assert norm == pytest.approx(float(norms[step]), rel=1e-4) and norm > 0.001


def test_waiting_for_data_is_told_from_training(folder, monkeypatch):
    from nar_t2i.data.captions import RenderedScenes

    assert fit(slow(STEP)) == 0
    quick = logged(folder, "data_wait")
    read = RenderedScenes.read
    monkeypatch.setattr(RenderedScenes, "read", lambda self, index: (time.sleep(0.01), read(self, index))[1])
    assert fit(slow(STEP), "--ckpt_path=fresh") == 0
    starved = logged(folder, "data_wait")
    assert max(quick.values()) < 0.5 < min(starved.values())


def test_goodput_counts_from_the_first_start(folder):
    assert fit(slow(STEP), "--trainer.max_steps=10") == 0
    before = logged(folder, "goodput")
    time.sleep(3)  # in the queue
    assert fit(slow(STEP), "--trainer.max_steps=20") == 0
    after = logged(folder, "goodput")
    assert after[14] < before[9] and after[14] < 15 * STEP * 2 / 3
    assert json.loads((folder / "run/started.json").read_text())["starts"] == 2
    assert fit("--ckpt_path=fresh") == 0
    assert json.loads((folder / "run/started.json").read_text())["starts"] == 1


def test_the_progress_bar_shows_the_loss_whenever_it_is_logged(folder):
    """Not in every step, for which the host would wait for the device."""
    trainer = tiny.trainer(
        "auto", 1, 5, default_root_dir=folder, callbacks=[Monitor(folder), shown := Shown()], log_every_n_steps=2
    )
    trainer.fit(tiny.Generator(), datamodule=tiny.data())
    losses = [float(loss) for loss in shown.losses]
    assert shown.on_bar == [None, losses[1], losses[1], losses[3], losses[3]]


class Shown(Callback):
    def __init__(self):
        self.losses, self.on_bar = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["loss"])
        self.on_bar.append(trainer.progress_bar_metrics.get("loss"))


@pytest.mark.parametrize("micro_batch", [16, 2])
def test_rates_are_of_whole_steps_however_many_micro_batches_they_take(folder, micro_batch, monkeypatch):
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *arguments, **more: (time.sleep(4 * STEP), step(*arguments, **more))[1])
    assert fit(f"--data.init_args.micro_batch_size={micro_batch}", "--trainer.max_steps=10", "--trainer.val_check_interval=10") == 0
    _, *rates = logged(folder, "images_per_second").values()
    assert len(rates) == 1 and 16 / (24 * STEP) < rates[0] < 16 / (4 * STEP)  # of a micro-batch alone it would be below 10
