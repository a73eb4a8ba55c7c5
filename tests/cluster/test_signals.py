"""Whichever rank is told to stop, all do, after the same step and with a checkpoint of it; a rank that hangs ends the run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nar_t2i.training import checkpoints
from tests.cluster import ranks
from tests.cluster.forks import ROOT
from tests.cluster.test_resume import assert_closely, fit, result, went_well

STATUS = {"SIGUSR1": 85, "SIGUSR2": 85, "SIGTERM": 143, "SIGINT": 130}


def fault(kind, **arguments):
    return f"--trainer.callbacks={json.dumps([{'class_path': f'tests.cluster.faults.{kind}', 'init_args': arguments}])}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    went_well(fit(folder, 2, "ddp"))
    return result(folder)


@pytest.mark.parametrize(("name", "strategy"), [*((name, "ddp") for name in STATUS), ("SIGUSR1", "deepspeed_stage_2")])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, whole, name, strategy):
    ended = fit(tmp_path, 2, strategy, fault("SignalAt", step=4, rank=1, name=name))
    assert ended.status == [STATUS[name]] * 2, ended.errors[0][-2000:]
    assert "the same command goes on from the checkpoint in run" in ended.errors[0]
    last = checkpoints.read(tmp_path / "run/checkpoints/last.ckpt")
    assert 5 <= last["global_step"] <= 6  # the step that was being taken, or, once all have heard of it, the next
    again = fit(tmp_path, 2, strategy)
    went_well(again)
    if strategy == "ddp":
        found, _, losses = result(tmp_path)
        assert losses == whole[2] and all(torch.equal(found[name], whole[0][name]) for name in found)


def test_a_signal_between_micro_batches_is_gone_on_from_the_last_whole_step(tmp_path, whole):
    four = "--data.init_args.micro_batch_size=4"
    ended = fit(tmp_path, 1, "auto", fault("SignalAt", step=4, rank=0, name="SIGUSR1"), four)
    assert ended.status == [85], ended.errors[0][-2000:]
    saved = checkpoints.read(tmp_path / "run/checkpoints/last.ckpt")
    assert saved["global_step"] == 4 and saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 17
    went_well(fit(tmp_path, 1, "auto", four))
    assert_closely(result(tmp_path), whole)  # the steps that its curves name, too


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_a_rank_that_stalls_is_shown_and_ends_the_run(tmp_path, strategy):
    ended = fit(tmp_path, 2, strategy, fault("StallAt", step=4, rank=1), "--stall_minutes=0.25")
    assert all(status == 1 for status in ended.status)
    waiting, hanging = ended.errors
    assert "Timeout (0:00:15" in hanging and "faults.py" in hanging and "on_train_batch_start" in hanging  # where it hangs
    assert "faults.py" not in waiting and "training_step" in waiting  # where it waited, until its own watch or its peer's end
    assert "Timeout (0:00:15" in waiting or "onnection" in waiting
    went_well(fit(tmp_path, 2, strategy))
    result(tmp_path)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_an_error_of_one_rank_in_validation_is_told_by_it_and_hangs_nobody(tmp_path, strategy):
    """Where the averaged weights are in the place of the others, which under ZeRO are put back by all ranks together."""
    options = ("--trainer.val_check_interval=4", "--data.init_args.validation.init_args.count=64", "--stall_minutes=1")
    ended = fit(tmp_path, 2, strategy, fault("RaiseAt", where="validation", rank=1, step=4), *options)
    assert ended.status[1] == 2 and ended.status[0] != 0, ended.status
    assert "nar-t2i: error: rank 1 alone cannot go on" in ended.errors[1]
    assert not any("Timeout (0:01:00" in error for error in ended.errors)
    went_well(fit(tmp_path, 2, strategy, *options))
    result(tmp_path)


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_a_model_that_cannot_be_written_ends_all_ranks(tmp_path, strategy):
    ended = fit(tmp_path, 2, strategy, fault("RaiseAt", where="write", rank=0), "--stall_minutes=1")
    assert ended.status == [2, 2], ended.errors
    assert "nar-t2i: error: run/model: No space left on device; the same command goes on where it can" in ended.errors[0]
    assert "nar-t2i: error: the first rank: OSError(28, 'No space left on device')" in ended.errors[1]
    went_well(fit(tmp_path, 2, strategy))
    assert (tmp_path / "run/model/config.json").is_file()


def test_ranks_that_a_command_has_started_itself_end_with_it(tmp_path):
    """Without Slurm: one rank gives up, and the other stands where nothing tells it."""
    shutil.copyfile(Path(__file__).parent / "tiny.yaml", tmp_path / "tiny.yaml")
    faults = [
        {"class_path": "tests.cluster.faults.RaiseAt", "init_args": {"where": "training", "rank": 0, "step": 2}},
        {"class_path": "tests.cluster.faults.StallAt", "init_args": {"step": 2, "rank": 1}},
    ]
    line = [sys.executable, "-m", "nar_t2i", "fit", "--config", "tiny.yaml", "--trainer.devices=2", "--trainer.strategy=ddp",
            f"--trainer.callbacks={json.dumps(faults)}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "nar-t2i: error: rank 0 alone cannot go on" in done.stderr
    assert not [process for process in Path("/proc").glob("[0-9]*") if marked(process, f"MARK={tmp_path}")]


def marked(process, mark):
    """Whether a process has that in its environment."""
    try:
        return mark.encode() in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False  # it has ended, or is another user's


def test_a_signal_before_training_begins_hangs_nobody(tmp_path):
    ended = fit(tmp_path, 2, "ddp", fault("SignalAtSanityCheck", rank=1, name="SIGTERM"), "--trainer.num_sanity_val_steps=1")
    assert ended.status == [143, 143], ended.errors
    assert checkpoints.latest(tmp_path / "run") is not None


def test_a_run_folder_is_held_by_one_process(tmp_path):
    shutil.copyfile(Path(__file__).parent / "tiny.yaml", tmp_path / "tiny.yaml")
    line = ["-m", "nar_t2i", "fit", "--config", "tiny.yaml", "--trainer.devices=1", fault("Slow", seconds=1.0)]
    [first] = ranks.start(1, line, tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/lock").exists() or not (tmp_path / "run/lock").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = tmp_path / "second"
        second.mkdir()
        ended = fit(second, 2, "ddp", f"--run_dir={tmp_path}/run")
        assert ended.status == [2, 2], ended.errors
        for error in ended.errors:
            assert f"run_dir: {tmp_path}/run is in use by process {first.pid} on " in error and "Traceback" not in error
    finally:
        first.kill()
        first.wait()
    went_well(fit(tmp_path, 1, "auto"))  # who was killed holds nothing


def test_a_run_folder_that_cannot_be_made_is_one_error_on_all_ranks(tmp_path):
    ended = fit(tmp_path, 2, "ddp", "--run_dir=/dev/null/run")
    assert ended.status == [2, 2], ended.errors
    assert all("key run_dir: /dev/null/run: Not a directory" in error and "Traceback" not in error for error in ended.errors)
