"""Evaluation and suites on several ranks: each sample once, the numbers of one process, and on again after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.ranks import ROOT
from tests.cluster.test_slurm import cluster  # noqa: F401  (a fixture)
from tests.data.making_shards import write_shards
from tests.evaluation.test_features import Means, saved
from tests.tiny_pipeline import tiny_pipeline

COUNT = 23  # two ranks and pieces of 4 share it unevenly
LINE = [
    "evaluate",
    "model",
    "--metrics",
    "fid,kid,precision_recall,scene_frechet",
    "--data",
    "shards",
    "--inception",
    "inception.pt",
    "--batch-size",
    "4",
    "--out",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_pipeline(folder).save_pretrained(folder / "model")
    write_shards(folder / "shards", [10, 13])
    saved(Means(), folder / "inception.pt")
    (folder / "prompts.txt").write_text("".join(f"thing number {n}\n" for n in range(5)))
    return folder


@pytest.fixture(scope="module")
def alone(place):
    """What one process finds."""
    assert subprocess.run([sys.executable, "-m", "nar_t2i", *LINE, "alone.json"], cwd=place, env=environment()).returncode == 0
    return json.loads((place / "alone.json").read_text())


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(count, place, *line):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={count}",
        f"--master-port={port}",
        "-m",
        "nar_t2i",
        *line,
    ]
    return subprocess.Popen(command, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.parametrize("count", [2, 3])
def test_the_numbers_of_several_ranks_are_those_of_one(place, alone, count):
    finished(torchrun(count, place, *LINE, f"of-{count}.json"))
    found = json.loads((place / f"of-{count}.json").read_text())
    assert found["results"] == alone["results"]  # to the last bit
    assert found["results"]["model"]["fid"]["samples"] == COUNT
    for name in ("model-captions", "real"):
        one, several = (sorted(p.name for p in (place / f"{out}.work" / name).iterdir()) for out in ("alone", f"of-{count}"))
        assert one == several and len(one) == 6


def test_ranks_that_are_killed_go_on(place, alone):
    line = [*LINE[:-3], "--batch-size", "1", "--out", "killed.json"]
    process = torchrun(2, place, *line)
    pieces = place / "killed.work/model-captions"
    deadline = time.monotonic() + 120
    while len(list(pieces.glob("0*.safetensors"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()  # which are no group of torchrun's
    for each in (*map(int, workers), process.pid):
        os.kill(each, signal.SIGKILL)
    assert len(workers) == 2
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in (place / "killed.work").rglob("0*.safetensors")}
    assert not (place / "killed.json").exists() and 3 <= sum(path.parent == pieces for path in before) < COUNT
    finished(torchrun(2, place, *line))
    found, expected = (content["results"]["model"] for content in (json.loads((place / "killed.json").read_text()), alone))
    for metric in ("fid", "kid", "scene_frechet"):  # in batches of another size, which round otherwise
        assert found[metric]["value"] == pytest.approx(expected[metric]["value"], rel=1e-4)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list(pieces.iterdir())) == COUNT


def test_a_mistake_of_one_rank_ends_all(place):
    """A picture that the second rank reads is broken; the first would wait for ever."""
    write_shards(place / "broken", [8])
    tar = place / "broken/00000.tar"
    content = bytearray(tar.read_bytes())
    start = content.index(b"\x89PNG", content.index(b"s000005.png"))
    content[start + 40 : start + 60] = b"x" * 20
    tar.write_bytes(content)
    line = ["evaluate", "model", "--metrics", "scene_frechet", "--data", "broken", "--batch-size", "4", "--out", "broken.json"]
    process = torchrun(2, place, *line)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and output.count("s000005") >= 2 and "leaves no sample out" in output, output[-3000:]


def test_a_suite_on_two_ranks_draws_what_one_does(place):
    line = ["suite", "draw", "t2i-compbench", "model", "--prompts", "prompts.txt", "--pictures", "2", "--steps", "2", "--out"]
    assert subprocess.run([sys.executable, "-m", "nar_t2i", *line, "one"], cwd=place, env=environment()).returncode == 0
    finished(torchrun(2, place, *line, "two"))
    one, two = ({p.name: p.read_bytes() for p in (place / out / "samples").iterdir()} for out in ("one", "two"))
    assert len(one) == 10 and one == two and len(set(one.values())) == 10


def test_srun_splits_the_work_too(cluster, place, alone):  # noqa: F811
    """Two tasks on two nodes, as on a cluster; and a command beside srun, in the same job, is one process."""
    command = f"{sys.executable} -m nar_t2i {' '.join(LINE)} slurm.json"
    script = f"#!/bin/bash\ncd {place}\nsrun {command}\n{command}\n"
    path = Path(place, "job.sh")
    path.write_text(script)
    variables = {name: value for name, value in environment().items() if name in ("OMP_NUM_THREADS", "PYTHONPATH")}
    number = cluster.call(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={place}/job.log", str(path), cwd=place, **variables
    )
    cluster.wait(number, "COMPLETED", "FAILED")
    log = (place / "job.log").read_text()
    assert cluster.job(number)["JobState"] == "COMPLETED", log
    assert json.loads((place / "slurm.json").read_text())["results"] == alone["results"]
    assert log.count("written to slurm.json") == 2
