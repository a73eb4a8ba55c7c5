"""A researcher's own parts, and frozen weights that no checkpoint holds."""

import functools
import json
import sys
from pathlib import Path

import pytest

from nar_t2i.cli import main
from nar_t2i.folders import save_part
from nar_t2i.networks import EncoderDecoder
from tests.cli.running import fit
from tests.tiny_pipeline import tiny_pipeline

OWN = """
from nar_t2i.inference import Confidence
from nar_t2i.parts import part

class Plain(Confidence):
    def __init__(self, steps: int = 2):
        super().__init__(steps)

@part
class Further(Confidence):
    def __init__(self, boost: float = 1.0, **kwargs):
        super().__init__(**kwargs)

@part
class Mistaken(Confidence):
    def __init__(self, steps: int = 2):
        super().__init__(steps)
        self.other = undefined_name
"""


@pytest.fixture
def own_package(folder, monkeypatch):
    """A package of the user's, and a generator whose recipe takes seconds; `fit` with one of its strategies."""
    (folder / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("own_parts", None)
    t2i = tiny_pipeline(folder)
    save_part(t2i.tokenizer, folder / "codec")
    small = ("text.init_args.vocabulary=tiny.model", "text.init_args.width=16", "text.init_args.depth=1", "text.init_args.heads=2",
             "text.init_args.trainable=all", "network.init_args.width=16", "network.init_args.depth=1", "network.init_args.heads=2",
             "network.init_args.code_width=0", "tokenizer=codec", "sample_prompts=[]", "optimizer.warmup_steps=1",
             "optimizer.kind=adamw")  # fmt: skip
    scenes = "{class_path: nar_t2i.data.captions.RenderedScenes, init_args: {count: 8, image_size: 16}}"
    settings = [*(f"--model.init_args.{key}" for key in small), "--init_from=null", f"--data.init_args.train={scenes}",
                "--data.init_args.validation=null", "--data.init_args.cache=null", "--data.init_args.validation_cache=null",
                "--data.init_args.image_size=16", "--data.init_args.global_batch_size=4", "--trainer.max_steps=2",
                "--run_dir=own", "--trainer.precision=32-true"]  # fmt: skip
    return lambda inference, *more: fit(*settings, f"--model.init_args.inference={inference}", *more, recipe="quickstart/generator")


def test_parts_of_ones_own_are_told_of_early_saved_and_loaded_where_they_are_trusted(own_package, folder, capsys, monkeypatch):
    assert own_package("{class_path: own_parts.Plain}") == 2 and not Path("own/checkpoints").exists()
    assert "Plain cannot be described; decorate the class with @part; without it the model" in capsys.readouterr().err
    assert own_package("{class_path: own_parts.Mistaken}") == 2
    assert f"NameError: name 'undefined_name' is not defined ({folder}/own_parts.py:18)" in capsys.readouterr().err
    assert own_package("{class_path: own_parts.Further, init_args: {boost: 2.0, steps: 3}}") == 0
    saved = json.loads(Path("own/model/config.json").read_text())["inference"]["init_args"]
    assert saved["boost"] == 2 and saved["steps"] == 3 and "kwargs" not in saved
    line = ["generate", "--model", "own/model", "--prompt", "a red star", "--steps", "2"]
    assert main(line) == 2 and "NAR_T2I_TRUST=PACKAGE in the environment" in capsys.readouterr().err
    monkeypatch.setenv("NAR_T2I_TRUST", "other,own_parts")
    assert main(line) == 0


def test_a_run_does_not_go_on_beside_other_frozen_weights(own_package, capsys, monkeypatch):
    """Which no checkpoint holds: here of a network's embedding that is frozen and starts at random."""
    made = EncoderDecoder.__init__

    @functools.wraps(made)
    def frozen(self, *arguments, **settings):
        made(self, *arguments, **settings)
        self.embedding.requires_grad_(False)

    monkeypatch.setattr(EncoderDecoder, "__init__", frozen)
    network = "--model.init_args.network={class_path: nar_t2i.networks.EncoderDecoder, init_args: {width: 16, depth: 1, heads: 2}}"
    confidence = "{class_path: nar_t2i.inference.Confidence}"
    assert own_package(confidence, network) == 0
    assert own_package(confidence, network, "--trainer.max_steps=3") == 0  # of the same seed
    capsys.readouterr()
    assert own_package(confidence, network, "--trainer.max_steps=4", "--seed_everything=7") == 2
    assert "trained beside other frozen weights than these: network.embedding." in capsys.readouterr().err
    assert own_package(confidence, network, "--run_dir=other", "--init_from=own", "--seed_everything=7") == 0
    assert "kept, frozen: network.embedding." in capsys.readouterr().err
