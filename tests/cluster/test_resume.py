"""A run that is killed and started again ends like one that was not, on as many ranks and on another number of them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from nar_t2i.pipeline import TextToImage
from nar_t2i.training import checkpoints
from tests.cluster import ranks

STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
KILL = json.dumps([{"class_path": "tests.cluster.faults.KillAt", "init_args": {"step": 8}}])
STEPS = 12


def fit(folder, count, strategy, *overrides, verb="fit"):
    shutil.copyfile(Path(__file__).parent / "tiny.yaml", folder / "tiny.yaml")
    line = ["-m", "nar_t2i", verb, "--config", "tiny.yaml", f"--trainer.devices={count}", f"--trainer.strategy={strategy}"]
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


@pytest.fixture(scope="module", params=STRATEGIES)
def runs(request, tmp_path_factory):
    """The same run on two ranks, uninterrupted, and killed at step 8."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    went_well(fit(whole, 2, request.param))
    ended = fit(killed, 2, request.param, f"--trainer.callbacks={KILL}")
    assert ended.status == [-9, -9], ended.errors
    assert [checkpoints.step_of(path) for path in checkpoints.newest_first(killed / "run/checkpoints")] == [6, 3]
    return request.param, whole, killed


def test_the_same_ranks_end_bit_for_bit_alike(runs, tmp_path):
    strategy, whole, killed = runs
    folder = shutil.copytree(killed, tmp_path / "again")
    ended = fit(folder, 2, strategy)
    went_well(ended)
    assert "going on from run/checkpoints/step-00000006.ckpt" in ended.errors[0]
    for found, expected in zip(result(folder), result(whole), strict=True):
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])), name


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_ranks_ends_alike_up_to_rounding(runs, tmp_path, count):
    strategy, whole, killed = runs
    folder = shutil.copytree(killed, tmp_path / "again")
    # Micro-batches of a size of their own, so that one rank accumulates.
    went_well(fit(folder, count, strategy, "--data.init_args.micro_batch_size=4"))
    (weights, average, _), (expected, expected_average, _) = result(folder), result(whole)
    for found, there in ((weights, expected), (average, expected_average)):
        assert found.keys() == there.keys()
        for name in found:
            torch.testing.assert_close(found[name], there[name], rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")
    # The control: six steps without the optimizer's states are told apart.
    start = checkpoints.read(killed / "run/checkpoints/step-00000006.ckpt")["state_dict"]
    assert max(float((start[name] - weights[name]).abs().max()) for name in start) > 1e-3


def test_export_is_the_model_that_the_run_wrote(runs, tmp_path):
    strategy, whole, _ = runs
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
