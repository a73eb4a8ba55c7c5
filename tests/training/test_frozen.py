"""Frozen weights come from where the recipe says, at every start, and are in no checkpoint."""

import shutil

import pytest
import torch
import yaml

from nar_t2i.cli import main
from nar_t2i.parts import part
from nar_t2i.pipeline import TextToImage
from nar_t2i.training import checkpoints
from tests.cluster.ranks import ROOT
from tests.toys import ToyText


@part
class FrozenText(ToyText):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((ROOT / "tests/cluster/tiny.yaml").read_text())
    recipe["trainer"].update(max_steps=6, num_sanity_val_steps=0)
    (tmp_path / "text.yaml").write_text(yaml.safe_dump({**recipe, "run_dir": "text"}))
    recipe["model"]["init_args"]["text"] = {"class_path": "tests.training.test_frozen.FrozenText"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**recipe, "init_from": "text"}))
    assert main(["fit", "--config", "text.yaml"]) == 0
    return tmp_path


def text_of(model):
    return TextToImage.from_pretrained(model, trusted=("tests",)).text.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_they_are_taken_over_again_when_a_run_goes_on(folder):
    assert main(["fit", "--config", "tiny.yaml", "--run_dir=whole"]) == 0
    assert main(["fit", "--config", "tiny.yaml", "--run_dir=halves", "--checkpoint.every_steps=3", "--checkpoint.keep=0"]) == 0
    checkpoints.remove(folder / "halves/checkpoints/step-00000006.ckpt")
    assert main(["fit", "--config", "tiny.yaml", "--run_dir=halves"]) == 0
    assert same(text_of("whole/model"), text_of("text/model")) and same(text_of("halves/model"), text_of("text/model"))
    whole, halves = (checkpoints.read(folder / f"{name}/checkpoints/last.ckpt")["state_dict"] for name in ("whole", "halves"))
    assert same(whole, halves) and not any(name.startswith("text.") for name in whole)


def test_they_are_exported(folder):
    assert main(["fit", "--config", "tiny.yaml", "--run_dir=run"]) == 0
    assert main(["export", "run", "exported"]) == 0
    assert same(text_of("exported"), text_of("text/model"))


@pytest.mark.parametrize("verb", [["fit", "--config", "tiny.yaml", "--run_dir=run"], ["export", "run", "exported"]])
def test_without_them_nothing_starts(folder, capsys, verb):
    assert main(["fit", "--config", "tiny.yaml", "--run_dir=run"]) == 0
    shutil.rmtree(folder / "text")
    assert main(verb) == 2
    assert "init_from: text does not exist" in capsys.readouterr().err
