"""What the doctor says of a recipe."""

import json
import re
import shutil

import pytest
import sentencepiece
import torch

from nar_t2i.cli import main
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.training.doctor import Activations, largest_micro_batch
from nar_t2i.training.memory import STAGES, Trained, held
from tests.cluster.ranks import ROOT
from tests.text.tiny_models import tiny_clip, tiny_t5


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
    assert "one GPU a node is taken, since trainer.devices is auto; --gpus-per-node says otherwise" in out
    assert int(re.search(r"([\d,]+) trained", out)[1].replace(",", "")) > 50_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "3"], "wrong        global_batch_size 16"),
        (["--nodes", "4", "--data.init_args.validation.init_args.count=3"], "wrong        validation has 3 samples for 4 ranks"),
        (["--data.init_args.train=nowhere"], "nowhere"),
        (
            ["--model.init_args.network.init_args.width=2048", "--gpu-memory-gib", "0.1"],
            "MiB of 102: set data.init_args.micro_batch_size",
        ),
        (["--model.init_args.ema_decay=often"], "ema_decay: expected float"),
        # Beside a part that is only complete once it is called with more.
        (["--model.init_args.sample_prompts=[a, null]"], "key model.init_args.sample_prompts: expected str or null, got None"),
        (["--init_from=nowhere"], "init_from: nowhere does not exist"),
        (["--data.init_args.flip=true"], "flip: true needs flip_safe"),
        (["--nodes", "0"], "--nodes: must be at least 1, not 0"),
        (["--gpu-memory-gib", "-3"], "--gpu-memory-gib: must be above 0, not -3"),
        (["--data.init_args.image_size=24"], "data.init_args.image_size 24: the tokenizer is one of 16 px"),
    ],
)
def test_what_is_wrong_is_said(capsys, arguments, message):
    assert main(["doctor", "tiny.yaml", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.out + said.err and "Traceback" not in said.err


def test_captions_that_do_not_fit_are_counted(capsys, folder):
    t5 = {"class_path": "nar_t2i.text.T5TextEncoder", "init_args": {"folder": tiny_t5(folder / "t5"), "max_length": 16}}
    clip = {"class_path": "nar_t2i.text.ClipTextEncoder", "init_args": {"folder": tiny_clip(folder / "clip"), "max_length": 32}}
    joint = {"class_path": "nar_t2i.text.JointTextEncoder", "init_args": {"encoders": [t5, clip]}}
    assert main(["doctor", "tiny.yaml", "--nodes", "1", "--gpus-per-node", "1", f"--model.init_args.text={json.dumps(joint)}"]) == 0
    told = re.findall(r"captions     600 read: (\S+)% do not fit into .* tokens of (\w+)", capsys.readouterr().out)
    shares = {name: float(share) for share, name in told}
    scenes = RenderedScenes(count=300, image_size=16)
    captions = [caption for index in range(300) for caption in scenes.read_text(index).captions]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "t5/spiece.model"))
    long = sum(len(pieces.encode(caption)) + 1 > 16 for caption in captions)
    assert shares["T5TextEncoder"] == round(100 * long / 600, 1) and 0 < long < 600
    assert 0 < shares["ClipTextEncoder"] < 100


def test_saved_activations_are_counted_each_once_and_without_weights():
    module = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4, bias=False))
    counter, x = Activations(), torch.randn(10, 8)
    counter.on_train_batch_start(None, module, None, 0)
    loss = module(x).square().sum()
    counter.on_before_backward(None, module, loss)
    # The input, what ReLU gives (which the next layer keeps, too), and the output that is squared.
    assert counter.bytes == 4 * 10 * (8 + 32 + 4)


def of_sizes(*groups):
    total = sum(map(sum, groups))
    return Trained(groups, [], 0, 8 * total, 4 * total)


def test_the_largest_micro_batch_is_the_largest_share_of_a_step_that_fits():
    row, image, fixed, share = held(of_sizes([10_000_000], [500]), 2, 0, False), 3_000_000, 77, 48
    found = [largest_micro_batch(row, limit, share, image, fixed) for limit in (150e6, 300e6, 330e6, 400e6, 1e9)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == share and 0 < found[2] < share
    for size, limit in zip(found, (150e6, 300e6, 330e6, 400e6, 1e9), strict=True):
        assert size == 0 or share % size == 0
        for other in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48):
            fits = row.peak(other * image + fixed, other < share) <= limit
            assert fits <= (other <= size)


def test_dividing_more_leaves_less_on_each_gpu():
    trained = of_sizes([300_000_000, 40_000_000], [6_000_000])
    lasting = [held(trained, 8, stage, True).lasting for stage in STAGES.values()]
    assert lasting[0] > lasting[1] == lasting[2] > lasting[3]
    assert held(trained, 8, 2, True).gradients < held(trained, 8, 1, True).gradients
    assert held(trained, 64, 3, True).optimizer * 8 == pytest.approx(held(trained, 8, 3, True).optimizer, rel=1e-3)


def test_what_a_strategy_refuses_is_said(capsys):
    assert main(["doctor", "tiny.yaml", "--model.init_args.optimizer.kind=muon", "--trainer.strategy=deepspeed_stage_2"]) == 2
    out = capsys.readouterr().out
    assert "muon needs whole matrices" in out and list(table(out)) == ["ddp"]
    tokenizer = str(ROOT / "tests/cluster/tiny_tokenizer.yaml")
    assert main(["doctor", tokenizer, "--trainer.strategy=deepspeed_stage_2"]) == 2
    assert "two optimizers, which DeepSpeed cannot train" in capsys.readouterr().out
    assert main(["doctor", tokenizer]) == 0
    assert list(table(capsys.readouterr().out)) == ["ddp"]


def test_a_strategy_given_as_a_class(capsys):
    strategy = "{class_path: nar_t2i.training.zero.ZeRO, init_args: {stage: 3}}"
    assert main(["doctor", "tiny.yaml", f"--trainer.strategy={strategy}", "--gpu-memory-gib", "1"]) == 2
    assert "deepspeed_stage_3 needs " in capsys.readouterr().out


def test_streamed_shards_are_not_opened_twice(capsys, tmp_path):
    from nar_t2i.prepare.scenes import main as render

    render([str(tmp_path / "shards"), "--count", "8", "--image-size", "48", "--samples-per-shard", "4"])
    streamed = f"pipe:cat {tmp_path}/shards/{{00000..00001}}.tar"
    assert main(["doctor", "tiny.yaml", f"--data.init_args.train={streamed}", "--data.init_args.global_batch_size=2"]) == 0
    assert "streamed" in capsys.readouterr().out
