"""A run's folder: its history is never half written, and a lock of its own job's last start is waited for."""

import csv
import errno
import subprocess
import sys
import time

import pytest

from nar_t2i.errors import UserError
from nar_t2i.training import run_folder
from nar_t2i.training.run_folder import RunFolder, RunLogger

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 5 on node of job 7\\n"); file.flush()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def logged(folder, steps=20):
    logger = RunLogger(folder)
    for step in range(steps):
        logger.log_metrics({"loss": 1.0 / (1 + step)}, step)
    logger.save()
    return RunLogger(folder)  # as a run that goes on has it


def test_rows_behind_a_checkpoint_are_dropped_and_a_new_column_keeps_the_others(tmp_path):
    logger = logged(tmp_path)
    logger.forget_after(11)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(12))
    logger.log_metrics({"loss": 0.0, "psnr": 30.0}, 12)
    logger.save()
    found = rows(tmp_path)
    assert len(found) == 13 and found[3]["loss"] == str(1 / 4) and found[3]["psnr"] == "" and found[12]["psnr"] == "30.0"
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.csv"]


@pytest.mark.parametrize("what", ["forget", "column"])
def test_a_history_that_cannot_be_written_anew_stays(tmp_path, monkeypatch, what):
    logger, before = logged(tmp_path), (tmp_path / "metrics.csv").read_bytes()

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_folder, "write_text", full)
    with pytest.raises(OSError, match="metrics.csv"):
        if what == "forget":
            logger.forget_after(3)
        else:
            logger.log_metrics({"psnr": 1.0}, 20)
            logger.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before


def hold(folder, seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder / "lock"), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(("job", "restarts", "waits"), [("7", "1", True), ("7", "0", False), ("8", "1", False)])
def test_the_lock_of_a_job_s_last_start_is_waited_for(tmp_path, monkeypatch, job, restarts, waits):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    holder, begun = hold(tmp_path, 2.0 if waits else 30), time.monotonic()
    folder = RunFolder(tmp_path, "", {})
    try:
        if waits:
            folder._take()
            assert "of job 7" in (tmp_path / "lock").read_text() and str(holder.pid) not in (tmp_path / "lock").read_text()
        else:
            with pytest.raises(UserError, match="in use by process 5 on node of job 7"):
                folder._take()
            assert time.monotonic() - begun < 20
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_that_is_never_left_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(run_folder, "WAIT_FOR_OWN", 1)
    holder = hold(tmp_path, 60)
    try:
        with pytest.raises(UserError, match="in use by process 5 on node of job 7"):
            RunFolder(tmp_path, "", {})._take()
    finally:
        holder.kill()
        holder.wait()
