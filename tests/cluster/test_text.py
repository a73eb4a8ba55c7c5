"""Text encoders of transformers, frozen, partly and wholly trained, on two ranks under each strategy."""

import json

import pytest
import torch

from nar_t2i.pipeline import TextToImage
from nar_t2i.training import checkpoints
from tests.cluster.test_resume import STEPS, STRATEGIES, fit, result, went_well
from tests.text.tiny_models import tiny_bert, tiny_clip, tiny_t5

TRAINED = {"bert": "none", "t5": "last_1", "clip": "all"}
CLASSES = {"bert": "BertTextEncoder", "t5": "T5TextEncoder", "clip": "ClipTextEncoder"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"bert": tiny_bert(folder / "bert"), "t5": tiny_t5(folder / "t5"), "clip": tiny_clip(folder / "clip")}


@pytest.fixture(scope="module")
def overrides(models):
    encoders = [
        {"class_path": f"nar_t2i.text.{CLASSES[kind]}",
         "init_args": {"folder": folder, "trainable": TRAINED[kind], "max_length": 32}}
        for kind, folder in models.items()
    ]  # fmt: skip
    joint = {"class_path": "nar_t2i.text.JointTextEncoder", "init_args": {"encoders": encoders, "pooled_token": True}}
    return [f"--model.init_args.text={json.dumps(joint)}", "--model.init_args.text_learning_rate=1e-3",
            "--model.init_args.text_weight_decay=0.0"]  # fmt: skip


@pytest.fixture(scope="module")
def under_ddp(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    went_well(fit(folder, 2, "ddp", *overrides))
    return folder


def weights(folder):
    """Of each encoder in the run's model, by kind."""
    text = TextToImage.from_pretrained(folder / "run/model", trusted=("tests",)).text
    return {kind: encoder.network.state_dict() for kind, encoder in zip(TRAINED, text.encoders, strict=True)}


def test_what_is_frozen_stays_and_what_is_trained_does_not(under_ddp, models):
    from nar_t2i import text

    found = weights(under_ddp)
    for kind, folder in models.items():
        before = getattr(text, CLASSES[kind])(folder, max_length=32).network.state_dict()
        changed = {name for name in before if not torch.equal(before[name], found[kind][name])}
        floats = {name for name in before if before[name].is_floating_point()}
        top = {name for name in floats if name.startswith(("encoder.block.2.", "encoder.final_layer_norm"))}
        # The key's bias moves all scores of a query alike, so that it has no gradient, but for what rounding leaves.
        vain = {name for name in floats if name.endswith("k_proj.bias")}
        assert changed - vain == {"bert": set(), "t5": top, "clip": floats}[kind] - vain, kind


def test_checkpoints_hold_what_is_trained_alone(under_ddp):
    checkpoint = checkpoints.read(under_ddp / "run/checkpoints/last.ckpt")
    held = [name for name in checkpoint["state_dict"] if name.startswith("text.")]
    assert not any("encoders.0." in name or "encoder.block.1." in name for name in held)
    assert any("encoders.1.model.encoder.block.2." in name for name in held)
    parameters = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    assert parameters == len([name for name in checkpoint["state_dict"] if "position_ids" not in name])


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_zero_trains_them_as_ddp_does(under_ddp, overrides, tmp_path, strategy):
    went_well(fit(tmp_path, 2, strategy, *overrides))
    expected, found = result(under_ddp)[2], result(tmp_path)[2]
    assert len(found) == STEPS and all(abs(found[step] - expected[step]) < 1e-4 for step in expected)
    for kind, states in weights(under_ddp).items():
        for name, value in weights(tmp_path)[kind].items():
            torch.testing.assert_close(value, states[name], rtol=0, atol=1e-4, msg=lambda text: f"{kind} {name}: {text}")
