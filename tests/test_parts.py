"""Parts describe themselves as plain JSON, and only parts of trusted packages are built from it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nar_t2i.errors import UserError
from nar_t2i.inference import Confidence
from nar_t2i.networks import EncoderDecoder
from nar_t2i.parts import build, describe, part, resolve
from nar_t2i.schedules import Guidance
from nar_t2i.tokenizers import VQGAN, VectorQuantizer
from nar_t2i.types import TokenSpec


@part
class Box:
    def __init__(self, inner=None, *, path=Path("a/b"), numbers=(1, 2.5, None), named=None):
        self.inner, self.path, self.numbers, self.named = inner, path, numbers, named


class Bare:
    pass


class Undecorated(Box):
    pass


@dataclass
class Plain:
    size: int = 3


HERE = Box.__module__
TRUSTED = (HERE.split(".")[0],)


def round_trip(value):
    return build(json.loads(json.dumps(describe(value))), TRUSTED)


def test_a_part_in_a_part_survives_json():
    box = round_trip(Box(Box(numbers=[]), named={"x": Confidence(3), "y": [Plain(7)]}))
    assert isinstance(box.inner, Box) and box.inner.numbers == []
    assert box.path == "a/b" and box.numbers == [1, 2.5, None]
    assert box.named["x"].steps == 3 and box.named["y"][0] == Plain(7)


def test_defaults_are_written_out():
    """So that a later version with other defaults builds the same part."""
    assert describe(Box())["init_args"]["numbers"] == [1, 2.5, None]
    assert describe(Confidence(8))["init_args"].keys() >= {"steps", "schedule", "temperature", "choice_temperature"}


def test_real_parts_survive():
    spec = TokenSpec((2, 2), "categorical", 8)
    network = round_trip(EncoderDecoder(spec, [6], width=8, depth=1, heads=2))
    assert network.spec.length == 4 and network.spec.kind == "categorical" and len(network.blocks) == 1
    codec = round_trip(VQGAN(16, (16, 16), blocks=1, patch=2, quantizer=VectorQuantizer(8, 4, "loss")))
    assert codec.quantizer.update == "loss" and codec.quantizer.codes == 8
    assert round_trip(Guidance(2.0, ramp="cosine")) == Guidance(2.0, ramp="cosine")


def test_what_has_no_description_is_refused():
    with pytest.raises(TypeError, match="Bare cannot be described"):
        describe(Box(Bare()))
    with pytest.raises(TypeError, match="Undecorated cannot be described"):
        describe(Undecorated())


FOREIGN = ["os.system", "subprocess.Popen", "builtins.eval", "torch.nn.Linear", "nar_t2i_evil.X", "", 3, None]


@pytest.mark.parametrize("path", FOREIGN)
def test_foreign_classes_are_refused(path):
    with pytest.raises(UserError, match="is not part of nar_t2i"):
        build({"class_path": path, "init_args": {}})


def test_foreign_classes_inside_of_arguments_are_refused():
    inner = {"class_path": "subprocess.Popen", "init_args": {"args": "touch /tmp/never"}}
    for wrapped in ([inner], {"key": inner}, {"class_path": f"{HERE}.Box", "init_args": {"inner": [{"deep": inner}]}}):
        with pytest.raises(UserError, match="subprocess.Popen"):
            build(wrapped, TRUSTED)


def test_trust_is_by_the_whole_name_of_a_package():
    description = describe(Box())
    with pytest.raises(UserError, match="is not part of nar_t2i; NAR_T2I_TRUST=PACKAGE"):
        build(description)
    with pytest.raises(UserError, match="is not part of nar_t2i; NAR_T2I_TRUST=PACKAGE"):
        build(description, (TRUSTED[0][:-1],))
    assert isinstance(build(description, TRUSTED), Box)


@pytest.mark.parametrize(
    "path",
    [
        "nar_t2i.folders.save_part",  # a function
        "nar_t2i.folders.Path",  # a class, and no part
        "nar_t2i.folders.nn",  # a module
        "nar_t2i.pipeline.TextToImage",
        "nar_t2i.types.TokenCodec",
        "nar_t2i.training.base.Trainer",  # foreign, imported by a module of ours
    ],
)
def test_what_is_no_part_is_refused(path):
    with pytest.raises(UserError, match="is not a part that can be built"):
        resolve(path)


@pytest.mark.parametrize(
    "path", ["nar_t2i.inference.Nothing", "nar_t2i.nowhere.X", "nar_t2i.parts.os.system", "nar_t2i", "nar_t2i.__main__.main"]
)
def test_what_does_not_exist_is_named(path):
    with pytest.raises(UserError, match="does not exist in this version"):
        resolve(path)


def test_an_argument_without_type_and_default_must_be_given():
    @part
    class Needs:
        def __init__(self, steps, scale=None, *others, typed: int | None, **more):
            self.steps = steps

    assert describe(Needs(3, typed=None))["init_args"] == {"steps": 3, "scale": None, "typed": None}

    @part
    class Further(Needs):
        def __init__(self, **more):
            super().__init__(**more)

    assert describe(Further(steps=2, typed=1))["init_args"] == {"steps": 2, "typed": 1}
    for cls in (Needs, Further):
        with pytest.raises(UserError, match="^Needs: steps must be given; where None is meant, make it the default$"):
            cls(steps=None, typed=None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nothing_there", "No module named 'nothing_there'"),
        ("def f(:", r"invalid syntax \(mistaken.py, line 1\)"),
        ("", "module 'own_parts.mistaken' has no attribute 'Mine'"),
    ],
)
def test_why_a_class_of_ones_own_cannot_be_loaded_is_told(tmp_path, monkeypatch, text, told):
    (tmp_path / "own_parts").mkdir()
    (tmp_path / "own_parts/mistaken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NAR_T2I_TRUST", "own_parts")
    try:
        with pytest.raises(UserError, match=f"^class 'own_parts.mistaken.Mine' cannot be loaded: {told}"):
            resolve("own_parts.mistaken.Mine")
    finally:
        for name in ("own_parts", "own_parts.mistaken"):
            sys.modules.pop(name, None)


def test_a_refused_package_is_not_even_imported(tmp_path):
    (tmp_path / "evil.py").write_text("print('ran')\nclass X: pass\n")
    code = "from nar_t2i.parts import resolve\ntry: resolve('evil.X')\nexcept Exception as e: print(type(e).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
    )  # fmt: skip
    assert done.stdout == "UserError\n", done.stdout + done.stderr


def test_a_part_without_arguments_is_built_from_its_defaults():
    path = f"{HERE}.Box"
    for description in ({"class_path": path}, {"class_path": path, "init_args": None}):
        assert isinstance(build(description, TRUSTED), Box)
        assert isinstance(build({"class_path": path, "init_args": {"inner": description}}, TRUSTED).inner, Box)
    assert build({"class_path": path, "other": 1}, TRUSTED) == {"class_path": path, "other": 1}
