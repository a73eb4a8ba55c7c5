"""What the scripts of slurm/ do before anything is queued. tests/cluster/test_slurm.py runs them on a Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nar_t2i.errors import REQUEUE

ROOT = Path(__file__).parents[1]
# Names the folders that it is given, and what it would run.
APPTAINER = '#!/bin/bash\necho "in the container: $4" >&2; shift 7; exec "$@"\n'
SBATCH = '#!/bin/bash\necho "queued: $*"\n'


@pytest.fixture
def script(tmp_path):
    """Run a script from the project's folder, with an sbatch that tells what it is asked for."""
    for name, text in {"sbatch": SBATCH, "apptainer": APPTAINER}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def script(name, *arguments, cwd=ROOT, **environment):
        environment = {
            **os.environ,
            "NAR_T2I_PYTHON": sys.executable,
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            **environment,
        }
        line = ["bash", str(ROOT / "slurm" / name), *map(str, arguments)]
        return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)

    return script


def recipe(folder, name, text=""):
    path = folder / f"{name}.yaml"
    path.write_text(f"extends: {ROOT}/tests/cluster/tiny.yaml\nrun_dir: {folder}/{name}/run\n{text}")
    return path


@pytest.mark.parametrize("order", ["good bad", "bad good"])
def test_a_recipe_with_a_mistake_keeps_all_from_being_queued(script, tmp_path, order):
    recipes = [recipe(tmp_path, name, "model: {init_args: {learnin: 1}}" if name == "bad" else "") for name in order.split()]
    done = script("ablate.sh", "--nodes", 1, *recipes)
    assert done.returncode == 2 and "queued" not in done.stdout
    assert (
        "bad.yaml: key model.init_args.learnin: unknown key; did you mean 'learning'?" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_recipes_are_resolved_in_the_container_that_is_named(script, tmp_path):
    image = tmp_path / "image.sif"
    one = recipe(tmp_path, "one")
    missing = script("ablate.sh", one, NAR_T2I_CONTAINER=str(image))
    assert missing.returncode == 2 and f"ablate.sh: NAR_T2I_CONTAINER: there is no {image}" in missing.stderr
    image.touch()
    done = script("ablate.sh", "--nodes", 1, one, NAR_T2I_CONTAINER=str(image))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"--nodes 1 slurm/train.sh --one-of {one}") and f"in the container: {ROOT}\n" in done.stderr


def test_recipes_are_files_from_where_one_stands_or_names(script, tmp_path, monkeypatch):
    recipe(tmp_path, "one"), recipe(tmp_path, "two")
    done = script("ablate.sh", "--exclusive", "one.yaml", "two.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"--exclusive slurm/train.sh --one-of {tmp_path}/one.yaml {tmp_path}/two.yaml")
    further = script("ablate.sh", "--exclusive", "--gpus", 1, "one.yaml", cwd=tmp_path)
    assert further.stdout.strip().endswith(f"--exclusive --gpus 1 slurm/train.sh --one-of {tmp_path}/one.yaml"), further.stderr
    (tmp_path / "before.log").touch()
    logged = script("ablate.sh", "--output", "before.log", "one.yaml", cwd=tmp_path)
    assert logged.stdout.strip().endswith(f"--output before.log slurm/train.sh --one-of {tmp_path}/one.yaml"), logged.stderr
    named = script("ablate.sh", "--nodes", 1, "learning/masked")
    assert named.returncode == 0 and named.stdout.strip().endswith("--nodes 1 slurm/train.sh --one-of learning/masked"), (
        named.stderr
    )
    unknown = script("ablate.sh", "none.yaml")
    assert unknown.returncode == 2 and "recipe 'none.yaml' does not exist" in unknown.stderr
    assert "RECIPE…" in script("ablate.sh", cwd=tmp_path).stderr


@pytest.mark.parametrize("option", ["--trainer.devices=4", "--trainer.num_nodes"])
def test_what_the_job_says_is_not_said_again(script, tmp_path, option):
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "1"}
    done = script("train.sh", recipe(tmp_path, "one"), option, **job)
    assert done.returncode == 2 and f"train.sh: {option.partition('=')[0]}: the job says it" in done.stderr


def test_a_run_folder_that_cannot_be_made_is_named(script, tmp_path):
    (tmp_path / "one").write_text("a file where a folder should be")
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "1"}
    done = script("train.sh", recipe(tmp_path, "one"), **job)
    (line,) = [line for line in done.stderr.splitlines() if "train.sh" in line]
    assert done.returncode == 2 and line.startswith(f"train.sh: {tmp_path}/one/run cannot be made: cannot create directory"), line
    assert "mkdir:" not in done.stderr


def in_a_job(lines, **job):
    """What bash prints in a script of a job that sources python.sh, with an scontrol and a sleep that tell what they are given."""
    told = 'scontrol() { echo "scontrol $*"; }; sleep() { echo "sleep $*"; }; fail() { echo "fail $*"; exit 2; }'
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_", "OMP_"))}
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; {told}; . slurm/python.sh; {lines}"],
        cwd=ROOT, env=environment | job, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_job_or_its_own_task_of_an_array_is_queued_again():
    assert in_a_job("requeue train.sh", SLURM_JOB_ID="7") == ["train.sh: queueing 7 again", "scontrol requeue 7", "sleep 600"]
    task = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert in_a_job("requeue sweep.sh", **task)[:2] == ["sweep.sh: queueing 7_2 again", "scontrol requeue 7_2"]


def test_a_task_has_as_many_threads_as_cores_unless_it_is_told_otherwise():
    show = "use_cores_of_task; printenv SRUN_CPUS_PER_TASK OMP_NUM_THREADS"
    assert in_a_job(show) == ["1", "1"] and in_a_job(show, SLURM_CPUS_PER_TASK="8") == ["8", "8"]
    assert in_a_job(show, SLURM_CPUS_PER_TASK="8", OMP_NUM_THREADS="3") == ["8", "3"]


def test_the_status_that_asks_for_another_start_is_the_programs():
    assert in_a_job('echo "$REQUEUE"') == [str(REQUEUE)]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("5:00", 300), ("1:00:00", 3600), ("2-03:04:05", 183845), ("30", 30), ("UNLIMITED", 10**9), ("", 10**9)],
)
def test_times_as_slurm_writes_them(written, seconds):
    done = subprocess.run(["bash", "-c", ". slurm/python.sh; seconds_of"], cwd=ROOT, input=written, capture_output=True, text=True)
    assert int(done.stdout) == seconds


def test_a_sweep_says_that_it_runs_outside_of_containers(script, tmp_path):
    done = script("sweep.sh", "team/project/sweep", NAR_T2I_CONTAINER="image.sif", SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 2 and "outside of containers" in done.stderr
