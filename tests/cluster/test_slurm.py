"""slurm/train.sh on a real Slurm with two nodes: it finishes, goes on after a requeue, and stays cancelled."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nar_t2i.training import checkpoints
from tests.cluster.ranks import ROOT
from tests.cluster.slurm import Cluster, missing
from tests.cluster.test_resume import result
from tests.cluster.wandb_server import Server
from tests.test_ablate import LINE, beside_a_quickstart  # noqa: F401  (a fixture)

SLOW = f"--trainer.callbacks={json.dumps([{'class_path': 'tests.cluster.faults.Slow', 'init_args': {'seconds': 0.6}}])}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing() and os.environ.get("NAR_T2I_REQUIRE_SLURM") != "1":
        pytest.skip(f"no Slurm on this machine ({', '.join(missing())}); Debian: apt install slurm-wlm munge")
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()


def submit(cluster, folder, *overrides, strategy="ddp", nodes=2, options=(), **environment):
    line = ["slurm/train.sh", "tests/cluster/tiny.yaml", f"--run_dir={folder}/run", f"--trainer.strategy={strategy}", *overrides]
    asked = ["--parsable", *options, f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", f"--output={folder}/job.log"]
    python = {"NAR_T2I_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    return cluster.call("sbatch", *asked, *line, cwd=ROOT, **{**python, **environment})


def wait_for_step(folder, step, timeout=180):
    deadline = time.monotonic() + timeout
    while not any(checkpoints.step_of(path) >= step for path in checkpoints.newest_first(folder / "run/checkpoints")):
        assert time.monotonic() < deadline, log(folder)
        time.sleep(0.2)


def log(folder):
    path = folder / "job.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(("strategy", "nodes"), [("ddp", 2), ("deepspeed_stage_2", 2), ("ddp", 1)])
def test_a_job_of_two_ranks_finishes(cluster, tmp_path, strategy, nodes):
    number = submit(cluster, tmp_path, strategy=strategy, nodes=nodes)
    cluster.wait(number, "COMPLETED", "FAILED")
    assert cluster.job(number)["JobState"] == "COMPLETED", log(tmp_path)
    result(tmp_path)
    manifest = checkpoints.manifest(tmp_path / "run/checkpoints/last.ckpt")
    assert manifest["world_size"] == 2
    snapshot = tmp_path / "run/slurm" / number
    assert (snapshot / "recipe.yaml").is_file() and (snapshot / "nar_t2i/training/preemption.py").is_file()


@pytest.mark.parametrize(("how", "begin"), [
    ("scontrol requeue", "null"), ("scancel --signal=USR1", "null"), ("scancel --signal=USR1", "fresh"),
])  # fmt: skip
def test_a_requeued_job_goes_on_and_finishes(cluster, tmp_path, how, begin):
    folder = tmp_path / "a folder whose name is long and has spaces, so that YAML breaks it into lines, is one as well"
    folder.mkdir()
    number = submit(cluster, folder, SLOW, f"--ckpt_path={begin}")
    wait_for_step(folder, 3)
    cluster.call(*how.split(), number)
    job = cluster.wait(number, "COMPLETED", "FAILED", "CANCELLED")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log(folder)
    said = log(folder)
    assert "start 0" in said and "start 1" in said  # one log, continued
    assert "going on from" in said
    assert ("train.sh: queueing" in said) == ("scancel" in how)
    result(folder)


def test_a_cancelled_job_has_saved_and_stays_cancelled(cluster, tmp_path):
    # Slurm signals the workers, too.
    number = submit(
        cluster, tmp_path, SLOW, "--checkpoint.every_steps=1000", "--trainer.max_steps=100", "--data.init_args.workers=2"
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.csv").exists():
        assert time.monotonic() < deadline, log(tmp_path)
        time.sleep(0.2)
    cluster.call("scancel", number)
    job = cluster.wait(number, "CANCELLED", "COMPLETED", "FAILED")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    wait_for_step(tmp_path, 1, timeout=40)
    time.sleep(5)
    assert cluster.job(number)["JobState"] == "CANCELLED"


def told_at_once(cluster, folder, number):
    """Send SIGUSR1 as soon as both ranks would hear it: that bit of the mask of signals that a process handles."""

    def ranks():
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (process / "cmdline").read_text()
                if line.startswith(f"{sys.executable}\0-m\0nar_t2i\0fit") and str(folder) in line and "--print_config" not in line:
                    mask = re.search(r"SigCgt:\s*(\w+)", (process / "status").read_text())[1]
                    yield bool(int(mask, 16) & 1 << (signal.SIGUSR1 - 1))

    while not (len(hear := list(ranks())) == 2 and all(hear) and "start 0" in log(folder)):
        assert cluster.job(number)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log(folder)
        time.sleep(0.02)
    cluster.call("scancel", "--signal=USR1", number)


def test_a_short_job_that_is_told_as_it_begins_is_not_queued_for_ever(cluster, tmp_path):
    """As Slurm tells one of five minutes, of which 300 seconds are left."""
    number = submit(cluster, tmp_path, SLOW, "--trainer.max_steps=400", options=["--time=5"])
    told_at_once(cluster, tmp_path, number)
    job = cluster.wait(number, "FAILED", "COMPLETED")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log(tmp_path)
    assert (
        "before a step was finished; not queued again" in log(tmp_path)
        and "has 300 s" in log(tmp_path)
        and "User defined signal" not in log(tmp_path)
    )


def test_a_job_that_is_told_before_it_has_begun_is_queued_once_more(cluster, tmp_path):
    number = submit(cluster, tmp_path, SLOW, options=["--time=60"])
    told_at_once(cluster, tmp_path, number)
    job = cluster.wait(number, "COMPLETED", "FAILED")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log(tmp_path)
    result(tmp_path)


def test_a_job_that_exports_nothing_runs_the_code_that_it_started_with(cluster, tmp_path):
    code = json.dumps([{"class_path": "tests.cluster.measure.Code"}])
    # The nodes of this Slurm have no addresses.
    kept = f"--export=NAR_T2I_PYTHON={sys.executable},PYTHONPATH={ROOT},MASTER_ADDR=127.0.0.1"
    number = submit(cluster, tmp_path, f"--trainer.callbacks={code}", options=[kept])
    cluster.wait(number, "COMPLETED", "FAILED")
    told = [path.read_text() for path in tmp_path.rglob("code-*.txt")]
    assert len(told) == 2 and all(f"run/slurm/{number}/nar_t2i" in text for text in told), log(tmp_path)


def test_a_job_that_fails_is_not_queued_again(cluster, tmp_path):
    number = submit(cluster, tmp_path, "--data.init_args.global_batch_size=15")
    job = cluster.wait(number, "FAILED", "COMPLETED")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert "nar-t2i: error" in log(tmp_path)


def test_the_same_command_again_goes_on(cluster, tmp_path):
    first = submit(cluster, tmp_path, "--trainer.max_steps=6")
    cluster.wait(first, "COMPLETED")
    second = submit(cluster, tmp_path)
    cluster.wait(second, "COMPLETED")
    assert "going on from" in log(tmp_path) and "step-00000006.ckpt" in log(tmp_path)
    result(tmp_path)


APPTAINER = """#!/bin/bash
# What `apptainer exec --nv --bind FOLDER --pwd FOLDER IMAGE …` does, without the image.
[ "$1 $2 $3 $5 $7" = "exec --nv --bind --pwd {image}" ] || {{ echo "apptainer: $*" >&2; exit 9; }}
cd "$6" && folders=$4 && shift 7 && echo "in the container: $1, with $folders" >&2 && exec "$@"
"""


def test_a_job_runs_in_the_container_that_is_named(cluster, tmp_path):
    """Apptainer itself is not at hand; the script in its place checks how it is called."""
    image, programs = tmp_path / "image.sif", tmp_path / "bin"
    programs.mkdir()
    (programs / "apptainer").write_text(APPTAINER.format(image=image))
    (programs / "apptainer").chmod(0o755)
    environment = {"NAR_T2I_CONTAINER": str(image), "PATH": f"{programs}:{os.environ['PATH']}"}
    missing_image = submit(cluster, tmp_path, **environment)
    cluster.wait(missing_image, "FAILED", "COMPLETED")
    assert f"train.sh: NAR_T2I_CONTAINER: there is no {image}" in log(tmp_path)
    image.touch()
    number = submit(cluster, tmp_path, "--trainer.max_steps=12", **environment)
    job = cluster.wait(number, "FAILED", "COMPLETED")
    assert job["JobState"] == "COMPLETED", log(tmp_path)
    # To resolve the recipe, to read its folder, and each rank.
    assert log(tmp_path).count(f"in the container: {sys.executable}, with {ROOT}\n") == 2
    assert log(tmp_path).count(f"in the container: {sys.executable}, with {ROOT},{tmp_path}/run\n") == 2
    result(tmp_path)


def test_a_job_runs_the_code_that_it_started_with(cluster, tmp_path):
    where = json.dumps([{"class_path": "tests.cluster.measure.Code"}])
    number = submit(cluster, tmp_path, f"--trainer.callbacks={where}")
    cluster.wait(number, "COMPLETED", "FAILED")
    for rank in (0, 1):
        assert (tmp_path / f"run/code-{rank}.txt").read_text() == f"{tmp_path}/run/slurm/{number}/nar_t2i/__init__.py", log(
            tmp_path
        )
    commit = (tmp_path / f"run/slurm/{number}/commit").read_text().strip()
    assert json.loads((tmp_path / "run/versions.json").read_text())["git_commit"] == (commit or None)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert commit.removesuffix("+changes") == head


def test_recipes_with_one_run_folder_are_not_queued(cluster, tmp_path):
    for seed in (1, 2):
        (tmp_path / f"{seed}.yaml").write_text(f"extends: {ROOT}/tests/cluster/tiny.yaml\nseed_everything: {seed}\n")
    recipes = [str(tmp_path / "1.yaml"), str(tmp_path / "2.yaml")]
    with pytest.raises(RuntimeError, match="several recipes have the run_dir run; give each its own"):
        cluster.call("slurm/ablate.sh", *recipes, cwd=ROOT, NAR_T2I_PYTHON=sys.executable, PYTHONPATH=str(ROOT))


def test_an_array_trains_each_recipe_in_a_folder_of_its_own(cluster, tmp_path):
    recipes = []
    for name in ("one", "two"):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            f"extends: {ROOT}/tests/cluster/tiny.yaml\nrun_dir: {tmp_path}/{name}/run\nseed_everything: {len(name)}\n"
        )
        recipes.append(str(recipe))
    said = cluster.call(
        "slurm/ablate.sh", "--parsable", f"--output={tmp_path}/job-%a.log", *recipes, cwd=ROOT, AT_ONCE="1",
        NAR_T2I_PYTHON=sys.executable, PYTHONPATH=str(ROOT),
    )  # fmt: skip
    for task in (0, 1):
        job = cluster.wait(f"{said}_{task}", "COMPLETED", "FAILED")
        assert job["JobState"] == "COMPLETED", (tmp_path / f"job-{task}.log").read_text()
    for name in ("one", "two"):
        assert (tmp_path / name / "run/config.yaml").read_text().count(f"{tmp_path}/{name}/run") == 1
        assert (tmp_path / name / "run/checkpoints/last.ckpt").exists()


def test_an_array_trains_and_judges_an_ablation(cluster, beside_a_quickstart, tmp_path):  # noqa: F811
    quickstart = beside_a_quickstart / "runs/quickstart"
    elsewhere = {
        "model.init_args.tokenizer": "tokenizer/model", "model.init_args.text.init_args.vocabulary": "data/vocabulary.model",
        "data.init_args.train": "data/train", "data.init_args.validation": "data/validation",
        "data.init_args.cache": "tokens/train", "data.init_args.validation_cache": "tokens/validation",
    }  # fmt: skip
    options = [part if part != "out" else f"{tmp_path}/out" for part in LINE]
    for key, path in elsewhere.items():
        options += ["--override", f"{key}={quickstart / path}"]
    said = cluster.call(
        "slurm/ablate.sh",
        "--parsable",
        f"--output={tmp_path}/job-%a.log",
        "learning/masked",
        "learning/unrolled",
        "inference/halton",
        "--",
        *options,
        cwd=ROOT,
        AT_ONCE="1",
        NAR_T2I_PYTHON=sys.executable,
        PYTHONPATH=str(ROOT),
    )
    for task in (0, 1):
        job = cluster.wait(f"{said}_{task}", "COMPLETED", "FAILED")
        assert job["JobState"] == "COMPLETED", (tmp_path / f"job-{task}.log").read_text()
    rows = json.loads((tmp_path / "out/comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["masked", "unrolled", "halton"]
    assert "1 of the entries are other tasks'" in (tmp_path / "job-0.log").read_text()


def test_the_trials_of_a_sweep_are_tasks_of_an_array_and_a_preempted_one_goes_on(cluster, tmp_path):
    shutil.copyfile(ROOT / "tests/cluster/tiny.yaml", tmp_path / "tiny.yaml")
    command = ["${env}", "${interpreter}", "-m", "nar_t2i", "fit", "--config", str(tmp_path / "tiny.yaml"),
               f"--run_dir={tmp_path}/run", SLOW, "${args}"]  # fmt: skip
    trials = [{"model.init_args.caption_dropout": 0.2}, {"model.init_args.caption_dropout": 0.3}]
    with Server({"method": "grid", "parameters": {}, "command": command}, trials) as server:
        options = ["--parsable", "--array=0-1%1", f"--output={tmp_path}/job.log"]
        environment = {"NAR_T2I_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "WANDB_MODE": "online",
                       **server.environment}  # fmt: skip
        number = cluster.call("sbatch", *options, "slurm/sweep.sh", "team/project/sweep", cwd=ROOT, **environment)
        first = tmp_path / "run/sweeps/sweep/trial000"
        deadline = time.monotonic() + 180
        while not any(checkpoints.step_of(path) >= 3 for path in checkpoints.newest_first(first / "checkpoints")):
            assert time.monotonic() < deadline, log(tmp_path)
            time.sleep(0.2)
        cluster.call("scancel", "--signal=USR1", f"{number}_0")
        for task in (0, 1):
            job = cluster.wait(f"{number}_{task}", "COMPLETED", "FAILED", "CANCELLED")
            assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(1 - task)), log(tmp_path)
        assert "asked to make room" in log(tmp_path) and "going on from" in log(tmp_path)
        assert [(name, run["exit"], run.get("preempted")) for name, run in server.runs.items()] == \
               [("trial000", 0, True), ("trial001", 0, None)]  # fmt: skip
        for trial, dropout in (("trial000", 0.2), ("trial001", 0.3)):
            assert server.runs[trial]["config"]["model"]["init_args"]["caption_dropout"] == dropout
            assert [row["trainer/global_step"] for row in server.runs[trial]["history"] if "loss" in row] == list(range(12))
            assert checkpoints.manifest(tmp_path / "run/sweeps/sweep" / trial / "checkpoints/last.ckpt")["step"] == 12
