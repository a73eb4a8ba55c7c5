"""Every recipe of recipes/text trains, beside what a quickstart leaves behind, with models of its kind that are tiny."""

import csv
import shutil

import pytest

from nar_t2i.cli import main
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.data.shards import ShardSource
from nar_t2i.folders import save_part
from nar_t2i.pipeline import TextToImage
from nar_t2i.prepare.rendering import write_source
from nar_t2i.prepare.sentencepiece import train_sentencepiece
from nar_t2i.prepare.text import main as encode_text
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.recipe import load, shipped
from tests.text.tiny_models import make_named

RECIPES = sorted(path.stem for path in (shipped() / "text").glob("*.yaml"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """runs/quickstart, as far as it is needed; the tokenizer has not learned anything."""
    from nar_t2i.training.command import RecipeCLI

    folder = tmp_path_factory.mktemp("quickstart")
    codec = RecipeCLI(load("quickstart/tokenizer")).build_model().codec
    save_part(codec, folder / "tokenizer/model")
    for split in ("train", "validation"):
        write_source(RenderedScenes(split, 40), folder / "data" / split)
        encode_tokens(codec, ShardSource(str(folder / "data" / split)), folder / "tokens" / split)
    scenes = RenderedScenes("train", 200)
    captions = [caption for index in range(200) for caption in scenes.read_text(index).captions]
    train_sentencepiece(captions, str(folder / "data/vocabulary.model"), 300)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(quickstart, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quickstart, "runs/quickstart")
    make_named(load(f"text/{name}").config["model"]["init_args"]["text"])
    if name == "minilm_frozen":  # the commands of its header
        for split in ("train", "validation"):
            assert encode_text([f"runs/quickstart/data/{split}", "text/minilm_frozen", f"runs/text/states/{split}"]) == 0
    line = ["--trainer.max_steps=2", "--trainer.precision=32-true", "--data.init_args.global_batch_size=4",
            "--trainer.log_every_n_steps=1"]  # fmt: skip
    assert main(["fit", "--config", f"text/{name}", *line]) == 0
    with open(f"runs/text/{name}/metrics.csv", newline="") as file:
        assert len([row for row in csv.DictReader(file) if row["loss"]]) == 2
    t2i = TextToImage.from_pretrained(f"runs/text/{name}/model")
    assert t2i("a red circle", steps=2)[0].size == (64, 64)
