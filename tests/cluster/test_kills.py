"""A run on two ranks is killed at twenty random moments, and ends with the weights of one that was not."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from nar_t2i.training import checkpoints
from tests.cluster import ranks
from tests.cluster.test_resume import fit, went_well

KILLS, STEPS = 20, 200
SLOW = json.dumps([{"class_path": "tests.cluster.faults.SlowSaves", "init_args": {"seconds": 0.15}}])
SETTINGS = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=1000", "--checkpoint.every_steps=2"]


def last_step(folder):
    return max((checkpoints.step_of(path) for path in checkpoints.newest_first(folder / "run/checkpoints")), default=0)


def was_saving(log):
    """Whether the log ends between a checkpoint's first byte and its manifest."""
    told = re.findall(r"^(first byte|sealed)", log, re.MULTILINE)
    return bool(told) and told[-1] == "first byte"


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_run_that_is_killed_at_random_moments_ends_like_one_that_was_not(tmp_path, strategy):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    went_well(fit(whole, 2, strategy, *SETTINGS))

    moments, saving, reached = random.Random(0), 0, []
    shutil.copyfile(Path(__file__).parent / "tiny.yaml", killed / "tiny.yaml")
    line = ["-m", "nar_t2i", "fit", "--config", "tiny.yaml", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    for _ in range(KILLS):
        for log in killed.glob("rank-*.log"):
            log.unlink()
        processes = ranks.start(2, [*line, *SETTINGS, f"--trainer.callbacks={SLOW}"], killed)
        before = last_step(killed)
        deadline = time.monotonic() + 120
        while last_step(killed) < before + 2:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 1.5))
        for process in moments.sample(processes, 2):
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
        saving += was_saving((killed / "rank-0.log").read_text())
        reached.append(last_step(killed))
    assert saving >= 5, f"{saving} of {KILLS} kills fell into a save"
    assert sorted(reached) == reached and reached[-1] < STEPS

    went_well(fit(killed, 2, strategy, *SETTINGS))
    found, expected = (checkpoints.read(folder / "run/checkpoints/last.ckpt") for folder in (killed, whole))
    assert found["global_step"] == expected["global_step"] == STEPS
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
