"""A step whose loss is no number, or leaps, on two ranks under each strategy."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from nar_t2i.training import checkpoints
from tests.cluster import ranks
from tests.cluster.test_resume import STRATEGIES, fit, went_well


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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skipped_step_changes_nothing(tmp_path, strategy):
    """Weights after 8 steps of which the last was skipped are those after 7, and the run goes on."""
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
    went_well(fit(eight, 2, strategy, *constant, "--trainer.max_steps=10"))
    assert any(not torch.equal(weights(eight)[name], value) for name, value in weights(seven).items())


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_a_gradient_without_a_number_counts_too(tmp_path, strategy):
    ended = fit(tmp_path, 2, strategy, f"--trainer.callbacks={bad(7, factor='gradient')}")
    assert ended.status == [2, 2], ended.errors
    assert "step 7: a gradient is not finite; samples of rank 0" in ended.errors[0].replace("step 8", "step 7")


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
