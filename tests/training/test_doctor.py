"""What the doctor says of a recipe."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from nar_t2i.cli import main
from nar_t2i.training.doctor import Activations, _largest
from nar_t2i.training.memory import STAGES, held
from tests.cluster.ranks import ROOT


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "tests/cluster/tiny.yaml", tmp_path / "tiny.yaml")
    return tmp_path


def table(out):
    """{strategy: the numbers of its row}"""
    rows = re.findall(r"^(ddp|deepspeed_stage_\d) +(.*)$", out, re.M)
    return {name: [int(value.replace(",", "")) for value in values.split()] for name, values in rows}


def test_a_sound_recipe(capsys, folder):
    assert main(["doctor", "tiny.yaml", "--nodes", "2", "--gpus-per-node", "2", "--gpu-memory-gib", "80"]) == 0
    out = capsys.readouterr().out
    assert "recipe       tiny.yaml: 2 × 2 = 4 ranks" in out
    assert "300 samples in 1 shards" in out
    assert "batch        16 images a step = 4 ranks × 4 × 1 in turn; 12 steps see 192 images, 0.6 times each" in out
    assert "parameters   6,004 trained" in out
    assert list(table(out)) == list(STAGES)
    assert not (folder / "run").exists()  # nothing was trained there


def test_overrides_count(capsys):
    wider = ["--model.init_args.network.init_args.width=64", "--data.init_args.micro_batch_size", "4"]
    assert main(["doctor", "tiny.yaml", "--nodes", "1", *wider]) == 0
    out = capsys.readouterr().out
    assert "1 ranks × 4 × 4 in turn" in out
    assert int(re.search(r"([\d,]+) trained", out)[1].replace(",", "")) > 50_000


@pytest.mark.parametrize(("arguments", "message"), [
    (["--nodes", "3"], "wrong        global_batch_size 16"),
    (["--data.init_args.train=nowhere"], "nowhere"),
    (["--model.init_args.network.init_args.width=2048", "--gpu-memory-gib", "0.1"], "MiB of 102: set data.init_args.micro_batch_size"),
    (["--model.init_args.ema_decay=often"], "ema_decay: expected float"),
    # Beside a part that is only complete once it is called with more.
    (["--model.init_args.sample_prompts=[a, null]"], "key model.init_args.sample_prompts: expected str or null, got None"),
    (["--nodes", "0"], "--nodes: must be at least 1, not 0"),
])  # fmt: skip
def test_what_is_wrong_is_said(capsys, arguments, message):
    assert main(["doctor", "tiny.yaml", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.out + said.err and "Traceback" not in said.err


def test_saved_activations_are_counted_each_once_and_without_weights():
    module = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4, bias=False))
    counter, x = Activations(), torch.randn(10, 8)
    counter.on_train_batch_start(None, module, None, 0)
    loss = module(x).square().sum()
    counter.on_before_backward(None, module, loss)
    # The input, what ReLU gives (which the next layer keeps, too), and the output that is squared.
    assert counter.bytes == 4 * 10 * (8 + 32 + 4)


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_largest_micro_batch_is_the_last_that_fits(accumulates):
    row, image, fixed = held([[10_000_000], [500]], 1000, 2, 0, False, True), 3_000_000, 77
    for limit in (150e6, 400e6, 1e9):
        size = _largest(row, limit, accumulates, image, fixed)
        assert size == 0 or row.peak(size * image + fixed, accumulates) <= limit
        assert row.peak((size + 1) * image + fixed, accumulates) > limit


def test_dividing_more_leaves_less_on_each_gpu():
    groups = [[300_000_000, 40_000_000], [6_000_000]]
    lasting = [held(groups, 0, 8, stage, True, True).lasting for stage in STAGES.values()]
    assert lasting[0] > lasting[1] == lasting[2] > lasting[3]
    assert held(groups, 0, 8, 2, True, True).gradients < held(groups, 0, 8, 1, True, True).gradients
    more = SimpleNamespace(**vars(held(groups, 0, 64, 3, True, True)))
    assert more.optimizer * 8 == pytest.approx(held(groups, 0, 8, 3, True, True).optimizer, rel=1e-3)
