"""A validation that was due when the run was interrupted is made up for, whole, and no other is repeated."""

import csv
import json

import pytest

from tests.cluster.test_resume import assert_exactly, fit, result, went_well

# After every fourth of twelve steps; four batches on each of two ranks.
OPTIONS = ("--trainer.val_check_interval=4", "--data.init_args.validation.init_args.count=64", "--checkpoint.every_steps=4")


def validations(folder):
    """(step, loss) in the order of the log."""
    with open(folder / "run/metrics.csv", newline="") as file:
        return [(int(row["step"]), float(row["validation_loss"])) for row in csv.DictReader(file) if row["validation_loss"]]


@pytest.fixture(scope="module", params=[(1, "auto"), (2, "deepspeed_stage_3")], ids=lambda x: f"{x[0]}-{x[1]}")
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    went_well(fit(folder, *request.param, *OPTIONS))
    return request.param, folder


@pytest.mark.parametrize(("kind", "step", "name", "status", "validated"), [
    ("SignalAt", 7, "SIGUSR1", 85, [3]),  # heard of when the validation of step 8 was due
    ("SignalAt", 11, "SIGTERM", 143, [3, 7]),  # after the last step: nothing is left to train
    ("SignalAtValidation", 8, "SIGUSR1", 85, [3]),
    ("SignalAtValidation", 12, "SIGKILL", -9, [3, 7]),
])  # fmt: skip
def test_what_was_due_is_made_up_for(whole, tmp_path, kind, step, name, status, validated):
    (count, strategy), expected = whole
    step -= kind == "SignalAt" and count > 1  # the other rank hears of it one batch later
    fault = {"class_path": f"tests.cluster.faults.{kind}", "init_args": {"step": step, "rank": 0, "name": name}}
    both = [fault] if name != "SIGKILL" else [{**fault, "init_args": {**fault["init_args"], "rank": r}} for r in range(count)]
    ended = fit(tmp_path, count, strategy, *OPTIONS, f"--trainer.callbacks={json.dumps(both)}")
    assert ended.status == [status] * count, ended.errors[0][-2000:]
    assert [step for step, _ in validations(tmp_path)] == validated
    went_well(fit(tmp_path, count, strategy, *OPTIONS))
    assert validations(tmp_path) == validations(expected)
    assert_exactly(result(tmp_path), result(expected))


def test_a_run_that_has_ended_owes_nothing(whole):
    (count, strategy), folder = whole
    before = validations(folder)
    assert [step for step, _ in before] == [3, 7, 11]
    went_well(fit(folder, count, strategy, *OPTIONS))
    assert validations(folder) == before


def test_ranks_meet_where_prompts_decide_how_many_passes_they_take(tmp_path):
    """Under ZeRO-3 each call of the network gathers weights from all ranks."""
    adaptive = {"class_path": "nar_t2i.inference.EntropyBounded", "init_args": {"bound": 1.38}}  # of 1.386: 2 and 3 passes
    codec = {"class_path": "tests.toys.ToyCodec", "init_args": {"image_size": 48}}  # which the detector needs
    options = (
        f"--model.init_args.inference={json.dumps(adaptive)}",
        "--model.init_args.scene_prompts=1",
        "--data.init_args.image_size=48",
        f"--model.init_args.tokenizer={json.dumps(codec)}",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
    )
    for part in ("train", "validation"):
        options += (f"--data.init_args.{part}.init_args.image_size=48",)
    scores = {}
    for count, strategy in ((2, "deepspeed_stage_3"), (2, "ddp")):
        folder = tmp_path / strategy
        folder.mkdir()
        went_well(fit(folder, count, strategy, *options))
        with open(folder / "run/metrics.csv", newline="") as file:
            scores[strategy] = [
                row["validation_scene_accuracy"] for row in csv.DictReader(file) if row["validation_scene_accuracy"]
            ]
    assert len(scores["ddp"]) == 2 and scores["deepspeed_stage_3"] == scores["ddp"]
