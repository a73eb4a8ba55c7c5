"""Every recipe of recipes/emoji trains on real emoji, after the commands of its header."""

import csv
import os
from pathlib import Path

import pytest

from nar_t2i.cli import main
from nar_t2i.data.shards import ShardSource
from nar_t2i.folders import load_part
from nar_t2i.pipeline import TextToImage
from nar_t2i.prepare.emoji import CLDR, FONT, UNICODE, EmojiPictures, read_emoji, split_emoji
from nar_t2i.prepare.rendering import write_source
from nar_t2i.prepare.sentencepiece import captions_of, train_sentencepiece
from nar_t2i.prepare.text import main as encode_text
from nar_t2i.prepare.tokens import main as encode_tokens
from nar_t2i.recipe import load, shipped
from tests.text.tiny_models import make_named

TOKENIZERS = ("tokenizer", "tokenizer_128")
GENERATORS = sorted(path.stem for path in (shipped() / "emoji").glob("*.yaml") if path.stem not in TOKENIZERS)
MISSING = [path for path in (FONT, UNICODE, CLDR) if not Path(path).exists()]
pytestmark = pytest.mark.skipif(
    bool(MISSING) and not os.environ.get("NAR_T2I_REQUIRE_EMOJI"), reason=f"{MISSING} are not here; see tests/prepare/test_emoji.py"
)
SHORT = ["--trainer.max_steps=2", "--trainer.precision=32-true", "--trainer.log_every_n_steps=1"]


def losses(run, name):
    with open(f"{run}/metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def write_data(size):
    for split, emoji in split_emoji(read_emoji()).items():
        if split != "unseen":
            write_source(EmojiPictures(emoji[:40], size), f"runs/emoji/{size}/{split}")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_trains(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    size = load(f"emoji/{name}").config["data"]["init_args"]["image_size"]
    write_data(size)
    assert main(["fit", "--config", f"emoji/{name}", "--data.init_args.global_batch_size=4", *SHORT]) == 0
    assert len(losses(f"runs/emoji/{name}", "reconstruction_loss")) == 2
    codec = load_part(f"runs/emoji/{name}/model")
    assert codec.image_size == size and codec.spec.shape == (8, 8)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_trains(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = load(f"emoji/{name}").config
    text, data = config["model"]["init_args"]["text"], config["data"]["init_args"]
    size, tokenizer = data["image_size"], config["model"]["init_args"]["tokenizer"].split("/")[2]
    write_data(size)
    make_named(text)
    line = ["--data.init_args.global_batch_size=4", *SHORT]
    assert main(["fit", "--config", f"emoji/{tokenizer}", *line, "--trainer.max_steps=1"]) == 0
    train_sentencepiece(captions_of(ShardSource(data["train"])), "runs/emoji/vocabulary.model", 600)
    for shards, tokens, states in (
        (data["train"], "cache", "text_cache"),
        (data["validation"], "validation_cache", "validation_text_cache"),
    ):
        assert encode_tokens([shards, f"runs/emoji/{tokenizer}/model", data[tokens]]) == 0
        if states in data:
            assert encode_text([shards, f"emoji/{name}", data[states]]) == 0
    assert main(["fit", "--config", f"emoji/{name}", *line, "--model.init_args.sample_prompts=[]"]) == 0
    assert len(losses(config["run_dir"], "loss")) == 2
    assert TextToImage.from_pretrained(f"{config['run_dir']}/model")("red heart", steps=2)[0].size == (size, size)
