"""A run that is killed and started again ends like one that was not, on as many ranks and on another number of them."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nar_t2i.pipeline import TextToImage
from nar_t2i.training import checkpoints
from tests.cluster import ranks

STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
MOVED = json.dumps([{"class_path": "tests.cluster.faults.Moved"}])
KILL = json.dumps([{"class_path": "tests.cluster.faults.KillAt", "init_args": {"step": 8}}])
STEPS = 12


def fit(folder, count, strategy, *overrides, verb="fit", recipe="tiny.yaml"):
    shutil.copyfile(Path(__file__).parent / recipe, folder / recipe)
    line = ["-m", "nar_t2i", verb, "--config", recipe, f"--trainer.devices={count}", f"--trainer.strategy={strategy}"]
    return ranks.run(count, [*line, *overrides], folder)


def went_well(ended):
    assert set(ended.status) == {0}, "\n".join(error[-2000:] for error in ended.errors)


def result(folder):
    """Weights, averages and logged losses."""
    checkpoint = checkpoints.read(folder / "run/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == STEPS
    average = next(state["average"] for name, state in checkpoint["callbacks"].items() if name.startswith("EMA"))
    with open(folder / "run/metrics.csv", newline="") as file:
        losses = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}
    assert sorted(losses) == list(range(STEPS))
    return checkpoint["state_dict"], average, losses


def assert_exactly(found, expected):
    """Two results of `result` are the same bit for bit."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])), name


def assert_closely(found, expected):
    """Weights, averages and losses, which are those of the global batch, are the same up to rounding."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="module", params=STRATEGIES)
def runs(request, tmp_path_factory):
    """The same run on two ranks, uninterrupted, at whose end the module moves, and killed at step 8."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    went_well(fit(whole, 2, request.param, f"--trainer.callbacks={MOVED}"))
    ended = fit(killed, 2, request.param, f"--trainer.callbacks={KILL}")
    assert ended.status == [-9, -9], ended.errors
    assert [checkpoints.step_of(path) for path in checkpoints.newest_first(killed / "run/checkpoints")] == [6, 3]
    return request.param, whole, killed


def test_saving_changes_nothing(runs, tmp_path):
    """The uninterrupted run saved at every third step, and this one saves at its end only."""
    strategy, whole, _ = runs
    went_well(fit(tmp_path, 2, strategy, "--checkpoint.every_steps=1000"))
    assert_exactly(result(tmp_path), result(whole))


def test_the_same_ranks_end_bit_for_bit_alike(runs, tmp_path):
    strategy, whole, killed = runs
    folder = shutil.copytree(killed, tmp_path / "again")
    ended = fit(folder, 2, strategy)
    went_well(ended)
    assert "going on from run/checkpoints/step-00000006.ckpt" in ended.errors[0]
    assert_exactly(result(folder), result(whole))


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_ranks_ends_alike_up_to_rounding(runs, tmp_path, count):
    strategy, whole, killed = runs
    folder = shutil.copytree(killed, tmp_path / "again")
    # Micro-batches of a size of their own, so that one rank accumulates.
    went_well(fit(folder, count, strategy, "--data.init_args.micro_batch_size=4"))
    assert_closely(result(folder), result(whole))
    weights = result(folder)[0]
    # The control: six steps without the optimizer's states are told apart.
    start = checkpoints.read(killed / "run/checkpoints/step-00000006.ckpt")["state_dict"]
    assert max(float((start[name] - weights[name]).abs().max()) for name in start) > 1e-3


def test_one_rank_goes_on_as_two(runs, tmp_path):
    strategy, whole, _ = runs
    assert fit(tmp_path, 1, strategy, f"--trainer.callbacks={KILL}").status == [-9]
    went_well(fit(tmp_path, 2, strategy))
    assert_closely(result(tmp_path), result(whole))


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_take_the_same_steps_and_go_on(tmp_path, stage):
    kept, killed = tmp_path / "kept", tmp_path / "killed"
    for folder in (kept, killed):
        folder.mkdir()
    went_well(fit(kept, 2, f"deepspeed_stage_{stage}"))
    strategy = f"deepspeed_stage_{stage}_offload"
    assert fit(killed, 2, strategy, f"--trainer.callbacks={KILL}").status == [-9, -9]
    went_well(fit(killed, 2, strategy))
    assert_closely(result(killed), result(kept))


def test_a_tokenizer_that_was_killed_ends_bit_for_bit_alike(tmp_path):
    ends = []
    for name, overrides in {"whole": [], "killed": [f"--trainer.callbacks={KILL}"]}.items():
        folder = tmp_path / name
        folder.mkdir()
        ended = fit(folder, 2, "ddp", *overrides, recipe="tiny_tokenizer.yaml")
        if overrides:
            assert ended.status == [-9, -9], ended.errors
            ended = fit(folder, 2, "ddp", recipe="tiny_tokenizer.yaml")
            assert "going on from" in ended.errors[0]
        went_well(ended)
        checkpoint = checkpoints.read(folder / "run/checkpoints/last.ckpt")
        average = next(state["average"] for key, state in checkpoint["callbacks"].items() if key.startswith("EMA"))
        assert any(key.startswith("discriminator.") for key in checkpoint["state_dict"])
        ends.append((checkpoint["state_dict"], average))
    assert_exactly(*ends)


def test_export_is_the_model_that_the_run_wrote(runs, tmp_path):
    _, whole, _ = runs
    for name, options in {"averaged": [], "raw": ["--raw"]}.items():
        ended = ranks.run(1, ["-m", "nar_t2i", "export", str(whole / "run"), str(tmp_path / name), *options], tmp_path)
        went_well(ended)
    prompts = ["a red circle", "two blue squares"]
    pictures = {
        name: TextToImage.from_pretrained(path, trusted=("tests",)).sample(prompts).tokens
        for name, path in {"run": whole / "run/model", **{n: tmp_path / n for n in ("averaged", "raw")}}.items()
    }
    assert torch.equal(pictures["run"], pictures["averaged"])
    average = TextToImage.from_pretrained(tmp_path / "averaged", trusted=("tests",)).network.state_dict()
    written = TextToImage.from_pretrained(whole / "run/model", trusted=("tests",)).network.state_dict()
    assert written.keys() == average.keys() and all(torch.equal(value, average[name]) for name, value in written.items())
    raw = TextToImage.from_pretrained(tmp_path / "raw", trusted=("tests",)).network.state_dict()
    assert any(not torch.equal(average[name], raw[name]) for name in raw)
    weights, _, _ = result(whole)
    assert all(torch.equal(value, weights[f"network.{name}"]) for name, value in raw.items())


def test_validation_gives_what_training_logged(runs, tmp_path):
    strategy, whole, _ = runs
    folder = shutil.copytree(whole, tmp_path / "again")
    ended = fit(folder, 2, strategy, verb="validate")
    went_well(ended)
    assert "validation_loss" in ended.errors[0]


def test_a_checkpoint_of_another_kind_of_strategy_says_what_to_do(runs, tmp_path):
    strategy, whole, _ = runs
    folder = shutil.copytree(whole, tmp_path / "again")
    ended = fit(folder, 1, "deepspeed_stage_2" if strategy == "ddp" else "auto", "--trainer.max_steps=14")
    assert ended.status == [2]
    assert "start" in ended.errors[0] and "init_from" in ended.errors[0]


@pytest.mark.parametrize("lost", ["a flipped byte", "a truncated part", "a missing rank"])
def test_a_broken_part_of_one_rank_makes_all_ranks_fall_back(runs, tmp_path, lost):
    strategy, whole, killed = runs
    folder = shutil.copytree(killed, tmp_path / "again")
    path = folder / "run/checkpoints/step-00000006.ckpt/rank-00001.pt"
    content = bytearray(path.read_bytes())
    if lost == "a flipped byte":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif lost == "a truncated part":
        path.write_bytes(content[:-10])
    else:
        path.unlink()
    ended = fit(folder, 2, strategy)
    went_well(ended)
    assert "trying the checkpoint before" in ended.errors[0]
    assert "going on from run/checkpoints/step-00000003.ckpt" in ended.errors[0]
    for name, value in result(folder)[0].items():
        assert torch.equal(value, result(whole)[0][name])


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_a_disk_that_fills_up_on_one_rank_ends_all_and_loses_nothing(tmp_path, strategy):
    rank = 0 if strategy == "ddp" else 1
    fault = json.dumps([{"class_path": "tests.cluster.faults.FullDisk", "init_args": {"step": 7, "rank": rank}}])
    ended = fit(tmp_path, 2, strategy, f"--trainer.callbacks={fault}")
    assert ended.status == [2, 2], ended.errors
    assert all("step-00000009.ckpt: could not be written" in error for error in ended.errors)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000003.ckpt", "step-00000006.ckpt"]
    whole = tmp_path / "whole"
    whole.mkdir()
    went_well(fit(whole, 2, strategy))
    went_well(fit(tmp_path, 2, strategy))
    assert_exactly(result(tmp_path), result(whole))


def test_a_data_worker_that_dies_is_one_clear_error_and_the_run_goes_on(tmp_path):
    fault = json.dumps([{"class_path": "tests.cluster.faults.KillWorkerAt", "init_args": {"step": 7, "rank": 1}}])
    ended = fit(tmp_path, 2, "ddp", "--data.init_args.workers=1", f"--trainer.callbacks={fault}")
    assert ended.status[1] == 2 and ended.status[0] != 0
    assert "nar-t2i: error: DataLoader worker (pid " in ended.errors[1] and "is killed by signal: Killed." in ended.errors[1]
    assert "take fewer data.init_args.workers" in ended.errors[1]
    whole = tmp_path / "whole"
    whole.mkdir()
    went_well(fit(whole, 2, "ddp"))
    went_well(fit(tmp_path, 2, "ddp", "--data.init_args.workers=1"))
    assert_exactly(result(tmp_path), result(whole))


def test_one_shard_is_enough_for_two_ranks_of_two_workers(tmp_path):
    """And gives what one process that reads for itself gives."""
    prepare = [
        sys.executable,
        str(ranks.ROOT / "data_prep/render_scenes.py"),
        str(tmp_path / "shards"),
        "--count",
        "40",
        "--image-size",
        "48",
    ]
    subprocess.run(prepare, check=True, capture_output=True)
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 1
    data = [f"--data.init_args.train={tmp_path}/shards", "--data.init_args.validation=null"]
    one, four = tmp_path / "one", tmp_path / "four"
    for folder, count, workers in ((one, 1, 0), (four, 2, 2)):
        folder.mkdir()
        went_well(fit(folder, count, "ddp", *data, f"--data.init_args.workers={workers}"))
    assert_closely(result(four), result(one))


def test_ranks_that_torchrun_starts_in_a_job_of_slurms_are_torchruns(tmp_path):
    shutil.copyfile(Path(__file__).parent / "tiny.yaml", tmp_path / "tiny.yaml")
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1",
           "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
    line = [
        "torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "nar_t2i",
        "fit",
        "--config",
        "tiny.yaml",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
    ]
    environment = {**os.environ, **job, "PYTHONPATH": str(ranks.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [Path(sys.executable).parent / line[0], *line[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result(tmp_path)
    assert checkpoints.manifest(tmp_path / "run/checkpoints/last.ckpt")["world_size"] == 2
