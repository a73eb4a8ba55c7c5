"""What the scripts of slurm/ do before anything is queued. tests/cluster/test_slurm.py runs them on a Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
