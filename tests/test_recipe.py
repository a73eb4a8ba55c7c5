"""Recipes: merging, provenance, interpolation, overrides, and one clear error for each mistake."""

import gc
import itertools
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nar_t2i.errors import UserError
from nar_t2i.networks import CausalDecoder, EncoderDecoder
from nar_t2i.parts import build, describe, with_defaults
from nar_t2i.recipe import load, shipped
from tests.text.tiny_models import make_named


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_extends_merges_deeply_and_lists_replace(write):
    base = write("base/base.yaml", "a: {x: 1, y: [1, 2]}\nb: base\n")
    middle = write("runs/middle.yaml", "extends: ../base/base.yaml\na: {y: [3]}\nc: middle\n")
    top = write("runs/top.yaml", "extends: middle.yaml\na: {x: 2}\n")
    recipe = load(top)
    assert recipe.config == {"a": {"x": 2, "y": [3]}, "b": "base", "c": "middle"}
    assert Path(recipe.source("a.x")).samefile(top)
    assert Path(recipe.source("a.y.0")).samefile(middle)
    assert Path(recipe.source("b")).samefile(base)
    assert recipe.source("a.unknown") and recipe.source("nothing") == str(top)


def test_extends_a_list_in_order_and_a_diamond_is_no_circle(write):
    write("root.yaml", "r: 0\n")
    write("left.yaml", "extends: root.yaml\nv: left\nl: 1\n")
    write("right.yaml", "extends: root.yaml\nv: right\n")
    assert load(write("top.yaml", "extends: [left.yaml, right.yaml]\n")).config == {"r": 0, "v": "right", "l": 1}


def test_a_base_of_two_recipes_undoes_neither(write, caplog):
    write("base.yaml", "x: 1\ny: 1\nz: 1\n")
    a, b = write("a.yaml", "extends: base.yaml\nx: 2\n"), write("b.yaml", "extends: base.yaml\ny: 2\n")
    both = write("both.yaml", "extends: [a.yaml, b.yaml]\n")
    assert load(both).config == load([a, b]).config == {"x": 2, "y": 2, "z": 1} and not caplog.records
    assert load([a, write("base.yaml", "x: 1\ny: 1\nz: 1\n")]).config["x"] == 1  # what is named itself, is laid on top
    write("other.yaml", "x: 3\n")
    assert load([a, write("c.yaml", "extends: other.yaml\ny: 3\n")]).config == {"x": 3, "y": 3, "z": 1} and not caplog.records
    models = [write(f"{name}.yaml", f"model: {{class_path: {name}}}\n") for name in ("one", "two")]
    assert load([models[0], write("d.yaml", "extends: two.yaml\n")]).config == {"model": {"class_path": "two"}}
    assert "d.yaml extends" in caplog.text and "two.yaml, a whole recipe, which is laid over what was named before" in caplog.text


def test_several_recipes_are_laid_over_each_other(write):
    first, second = write("first.yaml", "a: 1\nb: 1\n"), write("second.yaml", "b: 2\n")
    assert load([first, second]).config == {"a": 1, "b": 2}


def test_changing_a_class_drops_the_arguments_of_the_old_one(write):
    write("base.yaml", "m: {class_path: A, init_args: {width: 3, part: {class_path: B, init_args: {x: 1}}}}\n")
    changed = load(write("new.yaml", "extends: base.yaml\nm: {class_path: C, init_args: {depth: 1}}\n"))
    assert changed.config["m"] == {"class_path": "C", "init_args": {"depth": 1}}
    assert not any("width" in key for key in changed.sources)
    same = load(write("same.yaml", "extends: base.yaml\nm: {class_path: A, init_args: {depth: 1}}\n"))
    assert same.config["m"]["init_args"]["width"] == 3
    inner = load(write("inner.yaml", "extends: base.yaml\n"), ["m.init_args.part.class_path=D"])
    assert inner.config["m"]["init_args"] == {"width": 3, "part": {"class_path": "D"}}


@pytest.mark.parametrize(("text", "value"), [
    ("a #1", "a #1"), ("'a #1'", "a #1"), ('"3"', "3"), ("1e-3", 1e-3), ("[a, 'b #2']", ["a", "b #2"]),
    ("!!str 3", "3"), (" 'a'", "a"), ("null", None), ("None", None), ("a: b", {"a": "b"}),
])  # fmt: skip
def test_a_value_on_the_command_line_has_no_comments(write, text, value):
    assert load(write("a.yaml", "x: 1\n"), [f"x={text}"]).config["x"] == value


def test_interpolation_runs_over_the_merged_whole(write, monkeypatch):
    monkeypatch.setenv("NAR_T2I_TEST", "somewhere")
    write("base.yaml", "width: 4\nmodel: {w: '${width}', all: '${extra}', path: '${oc.env:NAR_T2I_TEST}/x'}\n")
    recipe = load(write("top.yaml", "extends: base.yaml\nwidth: 8\nextra: {k: [1]}\n"), ["width=16"])
    assert recipe.config["model"] == {"w": 16, "all": {"k": [1]}, "path": "somewhere/x"}


@pytest.mark.parametrize(
    "text, value",
    [
        ("1", 1),
        ("1e-3", 1e-3),
        ("true", True),
        ("null", None),
        ("None", None),
        ("[1, None, 'a']", [1, None, "a"]),
        ("{'a': 0.5}", {"a": 0.5}),
        ("two words", "two words"),
        ("x=y", "x=y"),
        ("-1", -1),
        ("", None),
    ],
)
def test_override_values_are_yaml(write, text, value):
    recipe = load(write("r.yaml", "a: {b: {c: 0, d: 5}}\n"), [f"a.b.c={text}"])
    assert recipe.config == {"a": {"b": {"c": value, "d": 5}}}
    assert recipe.source("a.b.c") == "command line"
    assert recipe.source("a.b.d").endswith("r.yaml")


def test_overrides_reach_into_lists(write):
    path = write("r.yaml", "callbacks: [{class_path: A, init_args: {x: 1}}, {class_path: B}]\n")
    recipe = load(path, ["callbacks.0.init_args.x=2"])
    assert recipe.config == {"callbacks": [{"class_path": "A", "init_args": {"x": 2}}, {"class_path": "B"}]}
    with pytest.raises(UserError, match="command line: key callbacks: the list has no item 7"):
        load(write("t.yaml", "callbacks: [1, 2]\n"), ["callbacks.7=3", "callbacks.0=4"])
    with pytest.raises(UserError, match="command line: key callbacks: the list has no item 5"):
        load(path, ["callbacks.5.init_args.x=2"])


def test_numbers_of_list_items_may_have_zeros_in_front(write):
    assert load(write("t.yaml", "a: [1, 2]\n"), ["a.01=5"]).config == {"a": [1, 5]}


def test_order_of_class_and_argument_overrides_does_not_matter(write):
    path = write("r.yaml", "m: {class_path: A, init_args: {x: 1}}\n")
    for overrides in (["m.init_args.y=2", "m.class_path=B"], ["m.class_path=B", "m.init_args.y=2"]):
        assert load(path, overrides).config == {"m": {"class_path": "B", "init_args": {"y": 2}}}


ERRORS = {
    "missing file": ({}, "a.yaml", [], "key --config: recipe .*a.yaml' does not exist"),
    "missing base": ({"a.yaml": "extends: nope.yaml"}, "a.yaml", [], "a.yaml: key extends: recipe 'nope.yaml' "),
    "circle": (
        {"a.yaml": "extends: b.yaml", "b.yaml": "extends: a.yaml"},
        "a.yaml",
        [],
        "key extends: circular: a.yaml → b.yaml → a.yaml",
    ),
    "self": ({"a.yaml": "extends: a.yaml"}, "a.yaml", [], "circular: a.yaml → a.yaml"),
    "extends a number": ({"a.yaml": "extends: 3"}, "a.yaml", [], "a.yaml: key extends: must be a path"),
    "syntax": ({"a.yaml": "a: 1\nb: [1,\n"}, "a.yaml", [], "a.yaml: line 3: not valid YAML"),
    "duplicate key": ({"a.yaml": "a: 1\na: 2\n"}, "a.yaml", [], "a.yaml: line 2: not valid YAML: .*duplicate"),
    "a list": ({"a.yaml": "- 1\n"}, "a.yaml", [], "a.yaml: a recipe is a mapping"),
    "interpolation": (
        {"a.yaml": "extends: b.yaml\n", "b.yaml": "m: {x: '${nothing}'}"},
        "a.yaml",
        [],
        "b.yaml: key m.x: .*nothing",
    ),
    "interpolation in a list": ({"a.yaml": "m: [1, '${nothing}']"}, "a.yaml", [], "a.yaml: key m.1: .*nothing"),
    "environment": ({"a.yaml": "x: '${oc.env:NAR_T2I_UNSET}'"}, "a.yaml", [], "a.yaml: key x: .*NAR_T2I_UNSET"),
    "no such resolver": ({"a.yaml": "x: '${shell:ls}'"}, "a.yaml", [], "a.yaml: key x: .*shell"),
    "no value": ({"a.yaml": "m: {x: '???'}"}, "a.yaml", [], r"a.yaml: key m.x: has no value yet \(\?\?\?\)"),
    "a sweep": (
        {"a.yaml": "method: grid\nparameters: {x: {values: [1]}}\ncommand: ['${env}']"},
        "a.yaml",
        [],
        "a.yaml: a sweep, for wandb sweep",
    ),
    "override without value": ({"a.yaml": "x: 1"}, "a.yaml", ["x"], "command line: 'x' is not of the form"),
    "override without key": ({"a.yaml": "x: 1"}, "a.yaml", ["x..y=1"], "command line: 'x..y=1' is not of the form"),
    "override no YAML": ({"a.yaml": "x: 1"}, "a.yaml", ["x=[1"], "command line: key x: .* is not a YAML value"),
    "override interpolation": ({"a.yaml": "x: 1"}, "a.yaml", ["x=${y}"], "command line: key x: .*'y'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_name_file_and_key(write, tmp_path, case):
    files, name, overrides, message = ERRORS[case]
    for file, text in files.items():
        write(file, text)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / name, overrides)
    assert "\n" not in str(caught.value)


def test_not_utf8_is_named(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(UserError, match="a.yaml"):
        load(tmp_path / "a.yaml")


SWEEPS = sorted((Path(__file__).parents[1] / "recipes/sweeps").glob("*.yaml"))
RECIPES = sorted(path for path in (Path(__file__).parents[1] / "recipes").rglob("*.yaml") if path not in SWEEPS)


EARLIER = ("vocabulary", "tokenizer", "generator", "critic")  # keys that name what another stage makes
MADE: dict[str, Path] = {}  # by earlier tests of this session, by the name that recipes have for it
SMALL = shipped() / "scale/small.yaml"


def scaled(path):
    """Ablations are built as their headers say they are run where there is no cluster."""
    return [path, SMALL] if path.parent.name in ("learning", "inference") else [path]


def built(path):
    from nar_t2i.training.command import RecipeCLI

    # How large emage's and aMUSEd's networks are is told below; to build one block of a network is enough.
    network = load(scaled(path)).config["model"]["init_args"].get("network", {}).get("init_args", {})
    shallow = [f"model.init_args.network.init_args.{key}=1" for key in ("depth", "stages") if isinstance(network.get(key), int)]
    cli = RecipeCLI(load(scaled(path), ["run_dir=run", *shallow]))
    make_earlier_stages(path, cli.config)
    cli.build("fit")
    return cli


def make_earlier_stages(path, config):
    """What other stages would have left where a recipe looks for it: a vocabulary, a tokenizer of the same folder."""
    from nar_t2i.folders import save_part
    from nar_t2i.prepare.sentencepiece import train_sentencepiece

    for key, value in config.items(branches=False):
        kind = key.rpartition(".")[2]
        if kind not in EARLIER or not isinstance(value, str) or Path(value).exists():
            continue
        Path(value).parent.mkdir(parents=True, exist_ok=True)
        if value in MADE:
            Path(value).symlink_to(MADE[value])
            continue
        if kind == "vocabulary":
            train_sentencepiece(["a red circle above two blue squares"] * 9, value, 300)
        elif kind == "tokenizer":
            save_part(built(shipped() / Path(value).parts[1] / "tokenizer.yaml").model.codec, value)
        else:  # the network of the run beside
            save_part(built(shipped() / "learning" / f"{Path(value).parts[-2]}.yaml").model.network, Path(value) / "network")
        MADE[value] = Path(value).resolve()
    if (text := load(scaled(path)).config["model"]["init_args"].get("text")) is not None:
        make_named(text)


@pytest.fixture
def forgotten():
    """A model that is built, and all that points to it in circles: the next one, of a gigabyte, too, stands in its place."""
    yield
    gc.collect()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(shipped())))
def test_every_shipped_recipe_resolves_and_builds(path, tmp_path, monkeypatch):
    """A recipe that sets no model is a base for others: it only has to resolve."""
    monkeypatch.chdir(tmp_path)
    if "class_path" in load(path).config.get("model", {}):
        cli = built(path)
        assert cli.model is not None and cli.datamodule is not None and cli.trainer is not None
        if "inference" in (given := cli.recipe.config["model"]["init_args"]):
            # A strategy's own defaults, which nar-t2i ablate builds it with, and none of what it stands in place of.
            assert describe(cli.model.inference) == describe(build(with_defaults(given["inference"])))


def test_emage_is_as_large_as_the_paper_says():
    """346M parameters, a BERT-base encoder among them; its autoregressive twin as many; and 38M of the tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from nar_t2i.types import TokenSpec

    with torch.device("meta"):
        codec = build(load("emage/tokenizer").config["model"]["init_args"]["codec"])
        text = BertModel(BertConfig(), add_pooling_layer=False)  # whose defaults are google-bert/bert-base-uncased's
        sizes = {}
        for name in ("346m-256", "ar-346m-256"):
            network = load(f"emage/{name}").config["model"]["init_args"]["network"]
            cls = {"EncoderDecoder": EncoderDecoder, "CausalDecoder": CausalDecoder}[network["class_path"].rpartition(".")[2]]
            parts = cls(codec.spec, (768,), **network["init_args"]), text
            sizes[name] = sum(p.numel() for part in parts for p in part.parameters())
    assert codec.spec == TokenSpec((32, 32), "categorical", 8192)
    assert sizes["346m-256"] == pytest.approx(346e6, rel=0.01) and sizes["ar-346m-256"] == sizes["346m-256"]
    assert sum(p.numel() for p in codec.parameters()) == pytest.approx(38e6, rel=0.01)


@pytest.mark.parametrize("path", sorted((shipped() / "learning").glob("*.yaml")), ids=lambda path: path.stem)
def test_learning_strategies_teach_networks_of_one_size(path):
    network = load(path).config["model"]["init_args"]["network"]["init_args"]
    assert {key: network[key] for key in ("width", "depth", "heads")} == {"width": 1024, "depth": 13, "heads": 16}


def test_amused_is_as_large_as_the_paper_says():
    """603M parameters at 256 px and 608M at 512 px; one embedding a code and one for MASK, where theirs has 8,256 rows."""
    import torch

    from nar_t2i.networks import UVit
    from nar_t2i.types import TokenSpec

    codec = load("amused/tokenizer").config["model"]["init_args"]["codec"]
    with torch.device("meta"):
        for name, pixels, millions in (("603m-256", 256, 603), ("608m-512", 512, 608)):
            recipe = load(f"amused/{name}").config
            codec["init_args"]["image_size"] = recipe["data"]["init_args"]["image_size"]
            spec = build(codec).spec
            assert spec == TokenSpec((pixels // 16, pixels // 16), "categorical", 8192)
            network = UVit(spec, (768,), **recipe["model"]["init_args"]["network"]["init_args"])
            assert sum(p.numel() for p in network.parameters()) == pytest.approx(millions * 1e6, rel=0.002)
            assert network.micro_conditions["original_width"] == pixels and len(network.micro_conditions) == 5


ABLATIONS = [path for folder in ("learning", "inference") for path in sorted((shipped() / folder).glob("*.yaml"))]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: str(path.relative_to(shipped())))
def test_ablations_are_a_diff_of_few_lines_and_say_how_they_are_run(path):
    lines = path.read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith("#")]) <= 10
    header = "\n".join(line for line in lines if line.startswith("#"))
    for told in ("Hardware", "ores"):
        assert told in header, told
    command = re.search(r"Command: +nar-t2i (fit|validate) (.+)", header)[2].split()
    names = [value for flag, value in itertools.pairwise(command) if flag == "--config"]
    assert names == [str(path.relative_to(shipped()).with_suffix("")), "scale/small"] and load(names).config
    assert command[command.index("--run_dir") + 1].startswith("runs/small/")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_parameters_of_a_sweep_are_keys_of_its_recipe(path):
    """tests/cluster/test_wandb.py lets W&B's agent run them."""
    sweep = yaml.safe_load(path.read_text())
    recipe = load(sweep["command"][sweep["command"].index("--config") + 1])
    for key, parameter in sweep["parameters"].items():
        assert len(parameter["values"]) > 1
        parent = OmegaConf.select(OmegaConf.create(recipe.config), key.rpartition(".")[0])
        assert parent is not None and key.rpartition(".")[2] in parent, key


def test_a_shipped_recipe_is_found_by_its_name():
    for path in RECIPES:
        assert load(str(path.relative_to(shipped()).with_suffix(""))).name
    with pytest.raises(UserError, match="'no/such/recipe' does not exist"):
        load("no/such/recipe")
