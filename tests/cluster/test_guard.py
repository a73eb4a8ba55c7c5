"""A step whose loss is no number, or leaps, on two ranks under each strategy."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from nar_t2i.training import checkpoints
from nar_t2i.training.guard import Guard, GuardConfig
from tests.cluster import ranks
from tests.cluster.test_resume import fit, went_well

STRATEGIES = ("ddp", "deepspeed_stage_2", "deepspeed_stage_3")


def bad(step, rank=1, factor="nan"):
    return json.dumps([{"class_path": "tests.cluster.faults.BadLoss", "init_args": {"step": step, "rank": rank, "factor": factor}}])


def weights(folder):
    return checkpoints.read(folder / "run/checkpoints/last.ckpt")["state_dict"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_without_a_number_ends_the_run_and_names_its_samples(tmp_path, strategy):
    ended = fit(tmp_path, 2, strategy, f"--trainer.callbacks={bad(7)}")
    assert ended.status == [2, 2], ended.errors
    for error in ended.errors:
        assert "nar-t2i: error: step 7: the loss is nan; samples of rank 0 (1." in error
        assert "rank 1 (nan): " in error and "Traceback" not in error
    found = checkpoints.latest(tmp_path / "run")
    assert checkpoints.step_of(found) == 6
    assert all(value.isfinite().all() for value in checkpoints.read(found)["state_dict"].values())


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_without_a_number_is_not_saved_either_when_the_run_is_told_to_save(tmp_path, count):
    faults = [
        *json.loads(bad(7, rank=0)),
        {"class_path": "tests.cluster.faults.SignalAt", "init_args": {"step": 7, "rank": 0, "name": "SIGUSR1"}},
    ]
    ended = fit(tmp_path, count, "ddp", f"--trainer.callbacks={json.dumps(faults)}")
    assert ended.status == [2] * count, ended.errors
    assert "step 7: the loss is nan" in ended.errors[0]
    assert checkpoints.step_of(checkpoints.latest(tmp_path / "run")) == 6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skipped_step_changes_nothing(tmp_path, strategy):
    """Weights after 8 steps of which the last was skipped are those after 7."""
    seven, eight = tmp_path / "seven", tmp_path / "eight"
    for folder in (seven, eight):
        folder.mkdir()
    constant = ["--model.init_args.optimizer.schedule=constant", "--model.init_args.optimizer.warmup_steps=0"]
    went_well(fit(seven, 2, strategy, *constant, "--trainer.max_steps=7"))
    ended = fit(eight, 2, strategy, *constant, "--trainer.max_steps=8", "--bad_steps.policy=skip", f"--trainer.callbacks={bad(7)}")
    went_well(ended)
    assert "nar-t2i: step 7: the loss is nan; samples of rank 0 (1." in ended.errors[0]
    assert ended.errors[0].count("the step is skipped") == 1 and "the step is skipped" not in ended.errors[1]
    for name, value in weights(seven).items():
        assert torch.equal(weights(eight)[name], value), name


def test_a_gradient_without_a_number_counts_too(tmp_path):
    ended = fit(tmp_path, 2, "deepspeed_stage_2", f"--trainer.callbacks={bad(7, factor='gradient')}")
    assert ended.status == [2, 2], ended.errors
    assert "step 7: a gradient is not finite; samples of rank 0" in ended.errors[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_patience_ends_alike_under_all_strategies(tmp_path, strategy):
    fault = bad(list(range(3, 12)), factor="gradient")
    ended = fit(tmp_path, 2, strategy, f"--trainer.callbacks={fault}", "--bad_steps.policy=skip", "--bad_steps.patience=2")
    assert ended.status == [2, 2], ended.errors
    assert "step 5: a gradient is not finite" in ended.errors[0]
    assert "3 steps in a row are more than bad_steps.patience" in ended.errors[0]


@pytest.mark.parametrize("factor", ["nan", "gradient", "second"])
def test_a_tokenizer_keeps_the_checkpoint_of_before(tmp_path, factor):
    """Also where the discriminator is to blame, which makes its update last; the module's weights then are not saved."""
    fault = f"--trainer.callbacks={bad(13, 0, factor)}"
    ended = fit(tmp_path, 1, "auto", fault, recipe="tiny_tokenizer.yaml")
    assert ended.status == [2], ended.errors
    assert "step 13: " in ended.errors[0]
    assert ("The codec's update was made, the discriminator's was not" in ended.errors[0]) == (factor == "second")
    assert ended.errors[0].count("train/00000") <= 17  # one batch's samples
    found = checkpoints.latest(tmp_path / "run")
    assert checkpoints.step_of(found) == 12
    assert all(value.isfinite().all() for value in checkpoints.read(found)["state_dict"].values() if value.is_floating_point())
    went_well(fit(tmp_path, 1, "auto", recipe="tiny_tokenizer.yaml"))


def test_a_scaler_that_looks_for_its_scale_is_left_alone(tmp_path):
    """Under fp16 the first gradients overflow; the losses that are compared are not those that were scaled."""
    from lightning.pytorch.plugins import MixedPrecision

    from nar_t2i.training.guard import Guard, GuardConfig
    from nar_t2i.training.monitor import Monitor
    from tests.cluster import tiny

    guard = Guard(GuardConfig(spike=3.0))
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))
    trainer = tiny.trainer(
        "auto", 1, 40, default_root_dir=tmp_path, plugins=[precision], callbacks=[guard, Monitor(tmp_path)], log_every_n_steps=1
    )
    trainer.fit(tiny.Generator(), datamodule=tiny.data())
    assert 2.0**10 < precision.scaler.get_scale() < 2.0**40  # it did overflow
    assert trainer.callback_metrics["gradient_norm"] > 0.01  # of the loss itself
    assert 0 < guard.mean < 10


def test_under_fp16_no_update_is_left_out_but_the_scalers(tmp_path):
    from lightning.pytorch.plugins import MixedPrecision

    from nar_t2i.training.guard import Guard, GuardConfig
    from tests.cluster import tiny
    from tests.cluster.faults import BadLoss

    module, sums = tiny.Generator(), []

    class Sums(Callback):
        def on_train_batch_end(self, *arguments):
            sums.append(sum(float(p.detach().double().sum()) for p in module.parameters()))

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    callbacks = [Guard(GuardConfig("skip")), BadLoss(5, 0, "gradient"), Sums()]
    tiny.trainer("auto", 1, 9, default_root_dir=tmp_path, plugins=[precision], callbacks=callbacks).fit(
        module, datamodule=tiny.data()
    )
    assert sums[5] == sums[4] and precision.scaler.get_scale() < 1
    assert len({*sums[5:8]}) == 3  # each later step updates, but for the last, at a rate of 0


def test_a_leap_of_the_loss_is_skipped_until_patience_ends(tmp_path):
    shutil.copyfile(Path(__file__).parent / "tiny.yaml", tmp_path / "tiny.yaml")
    line = ["-m", "nar_t2i", "fit", "--config", "tiny.yaml", "--trainer.max_steps=80", "--bad_steps.policy=skip",
            "--bad_steps.spike=3", "--bad_steps.patience=2"]  # fmt: skip
    ended = ranks.run(1, [*line, f"--trainer.callbacks={bad(60, 0, 10)}"], tmp_path)
    assert ended.status == [0], ended.errors
    assert "nar-t2i: step 60: the loss is " in ended.errors[0] and ", and the mean of those before " in ended.errors[0]
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        assert sum(bool(row["loss"]) for row in csv.DictReader(file)) == 80
    shutil.rmtree(tmp_path / "run")
    ended = ranks.run(1, [*line, f"--trainer.callbacks={bad([60, 61, 62], 0, 10)}"], tmp_path)
    assert ended.status == [2]
    assert "3 steps in a row are more than bad_steps.patience" in ended.errors[0]


def test_the_mean_of_the_first_losses_is_theirs():
    guard = Guard(GuardConfig(spike=3.0))
    for loss in (2.0, 4.0, 6.0):
        guard._accept(loss)
    assert guard.mean == pytest.approx(4.0)
    for _ in range(400):
        guard._accept(1.0)
    assert guard.mean == pytest.approx(1.0, abs=0.01)  # and later of the last some fifty
