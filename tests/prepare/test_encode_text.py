"""Text caches: the states of every caption once, refusal of what does not belong together, and the same training."""

import csv
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nar_t2i.cli import main as nar_t2i
from nar_t2i.data import CaptionedImages
from nar_t2i.data.mixture import Mixture
from nar_t2i.data.shards import ShardSource
from nar_t2i.data.text_cache import MANIFEST, TextCache, pack_states, unpack_states
from nar_t2i.errors import UserError
from nar_t2i.folders import load_part, save_part
from nar_t2i.prepare import text as command
from nar_t2i.prepare.sentencepiece import train_sentencepiece
from nar_t2i.prepare.shards import ShardFile
from nar_t2i.prepare.text import encode_text
from nar_t2i.text import BertTextEncoder, ClipTextEncoder, JointTextEncoder, T5TextEncoder
from tests.cluster.ranks import ROOT
from tests.data.making_shards import encoded, pixels, write_shards
from tests.text.tiny_models import tiny_bert, tiny_clip, tiny_t5
from tests.toys import ToyCodec

ERRORS = {"float32": 0.0, "float16": 3e-4, "bfloat16": 3e-3, "int8": 1e-2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"bert": tiny_bert(folder / "bert"), "t5": tiny_t5(folder / "t5"), "clip": tiny_clip(folder / "clip")}


@pytest.fixture
def bert(models):
    return BertTextEncoder(models["bert"], max_length=16)


@pytest.fixture
def joint(models):
    return JointTextEncoder([T5TextEncoder(models["t5"], max_length=24), ClipTextEncoder(models["clip"], max_length=16)],
                            pooled_token=True)  # fmt: skip


@pytest.fixture
def shards(tmp_path):
    """Of captions that the tiny vocabularies tell apart."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, letters in enumerate(("abcde", "fgh", "ijkl")):
        with ShardFile(folder / f"{shard:05d}.tar") as file:
            for letter in letters:
                file.add(letter, encoded(pixels(ord(letter))), "png", [f"{letter} red circle", f"a blue square {letter}"], {})
    return str(folder)


def batches(shards, cache, count=6, **options):
    data = CaptionedImages(shards, 8, 4, text_cache=str(cache), **options)
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("stored", ERRORS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_the_states_of_its_captions(shards, tmp_path, joint, stored, workers):
    manifest = encode_text(joint, ShardSource(shards), tmp_path / "text", stored, batch_size=3, captions_a_file=7)
    assert manifest["error"] <= ERRORS[stored] and (stored == "float32" or manifest["error"] > ERRORS[stored] / 30)
    for batch in batches(shards, tmp_path / "text", workers=workers):
        expected = joint(batch.captions)
        assert len(batch.condition.states) == 3
        for stream in range(3):
            found, mask = batch.condition.states[stream].float(), expected.masks[stream]
            assert torch.equal(batch.condition.masks[stream], mask)
            off = (found - expected.states[stream])[mask].square().mean().sqrt() / expected.states[stream][
                mask
            ].square().mean().sqrt()
            assert off <= max(2 * manifest["error"], 1e-6)
            assert not found[~mask].any()
        torch.testing.assert_close(batch.condition.pooled, expected.pooled)


def test_a_caption_that_many_share_is_stored_once(tmp_path, bert):
    shards = str(write_shards(tmp_path / "shards", [50, 50]))
    source = ShardSource(shards)
    captions = {caption for index in range(100) for caption in source.read_text(index).captions}
    source.read_text = lambda index, read=source.read_text: read(index % 5)
    manifest = encode_text(bert, source, tmp_path / "text")
    assert manifest["captions"] == 5 < len(captions)
    assert len(load_file(tmp_path / "text/00000.text.safetensors")["ends0"]) == 6


@pytest.mark.parametrize("stored", ERRORS)
def test_pack_and_unpack_are_inverse(stored):
    states = torch.randn(50, 8) * torch.logspace(-3, 2, 50)[:, None]
    found = unpack_states(pack_states(states, stored), stored).float()
    assert ((found - states).norm() / states.norm()) <= ERRORS[stored]
    if stored == "int8":  # one large row does not spoil a small one
        assert ((found - states).norm(dim=1) / states.norm(dim=1)).max() < 0.02


def test_captions_that_do_not_fit_are_counted(shards, tmp_path, models):
    manifest = encode_text(BertTextEncoder(models["bert"], max_length=4), ShardSource(shards), tmp_path / "text", captions_a_file=7)
    assert manifest["captions"] == 24 and 0 < manifest["truncated"] <= 24


def test_an_interrupted_encoding_goes_on_and_an_array_shares_the_work(shards, tmp_path, bert, monkeypatch):
    whole = encode_text(bert, ShardSource(shards), tmp_path / "whole", captions_a_file=5)
    assert encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5, shards="0:2") is None
    with pytest.raises(UserError, match="is no finished cache: text.json is missing"):
        TextCache(str(tmp_path / "text"))
    before = (tmp_path / "text/00001.text.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5, shards="array")
    assert encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5) == whole
    assert (tmp_path / "text/00001.text.safetensors").stat().st_mtime_ns == before
    (tmp_path / "text/00000.text.safetensors").unlink()
    (tmp_path / "text/00002.text.safetensors").write_bytes(b"damaged")
    assert encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5) == whole  # makes both anew
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        found, expected = load_file(tmp_path / "text" / file.name), load_file(file)
        assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)


def test_tasks_that_end_while_others_work_leave_a_manifest(shards, tmp_path, bert, monkeypatch):
    """The first file is made by another task while this one is at its own."""
    inner = command._encode

    def meanwhile(*arguments):
        monkeypatch.setattr(command, "_encode", inner)
        assert encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=12, shards="0:1") is None
        return inner(*arguments)

    monkeypatch.setattr(command, "_encode", meanwhile)
    assert encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=12, shards="1:") is not None
    TextCache(str(tmp_path / "text"))


def test_captions_are_numbered_once_for_all_tasks(shards, tmp_path, bert, monkeypatch):
    first = encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5, shards="0:2")
    inner, numbered = command._number, []
    monkeypatch.setattr(command, "_number", lambda *arguments: numbered.append(1) or inner(*arguments))
    assert (
        first is None and encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5) is not None and not numbered
    )
    damaged = next((tmp_path / "text").glob("*.captions.safetensors"))
    for file, content in ((damaged, b"damaged"), (tmp_path / "text/captions.npy", b"")):
        numbered.clear()
        file.write_bytes(content)
        encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5)
        assert numbered and load_file(damaged)


def test_numbers_of_other_captions_are_never_taken_for_these(shards, tmp_path, bert, monkeypatch):
    """Two encodings into one folder, each stopped before its first file, and the second before it had recorded its numbers."""
    other = str(write_shards(tmp_path / "other", [3, 5], captions=1, first=50))

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "_encode", stop)
        encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5)
    inner = command.write_json
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "write_json", lambda path, value: stop() if path.name == "captions.json" else inner(path, value))
        encode_text(bert, ShardSource(other), tmp_path / "text", captions_a_file=5)
    assert (
        encode_text(bert, ShardSource(shards), tmp_path / "text", captions_a_file=5)["captions"]
        == encode_text(bert, ShardSource(shards), tmp_path / "whole", captions_a_file=5)["captions"]
    )


def test_a_mixture_tells_what_did_not_fit_by_weight(shards):
    parts = [ShardSource(shards), ShardSource(shards)]
    parts[0].truncated, parts[1].truncated = 0.1, 0.4
    assert Mixture(parts, [1, 2]).truncated == pytest.approx(0.3)
    parts[0].truncated = None
    assert Mixture(parts, [1, 2]).truncated is None


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path, joint):
    for folder, letters in (("a", "abc"), ("b", "def")):
        (tmp_path / folder).mkdir()
        with ShardFile(tmp_path / folder / "00000.tar") as file:
            for letter in letters:
                file.add(letter, encoded(pixels(ord(letter))), "png", [f"{letter} red circle"], {})
    both = f"{tmp_path}/{{a,b}}/*.tar"
    encode_text(joint, ShardSource(both), tmp_path / "text", "float32")
    for batch in batches(both, tmp_path / "text"):
        torch.testing.assert_close(batch.condition.pooled, joint(batch.captions).pooled)


def test_mismatches_are_refused_by_name(shards, tmp_path, models, bert):
    encode_text(bert, ShardSource(shards), tmp_path / "text")
    data = CaptionedImages(shards, 8, 4, text_cache=str(tmp_path / "text"))
    data.check_text(bert)
    data.check_text(BertTextEncoder(models["bert"], max_length=16))
    for other, named in (
        (BertTextEncoder(models["bert"], max_length=12), "max_length: 16 there, 12 here"),
        (BertTextEncoder(models["bert"], max_length=16, layer=-2), "weights: .* there, .* here"),
        (BertTextEncoder(models["bert"], max_length=16, pretrained=False), "weights: "),
        (BertTextEncoder(models["bert"], max_length=16, mask_padding=False), "mask_padding: True there, False here"),
        (T5TextEncoder(models["t5"], max_length=16), "kind: BertTextEncoder there, T5TextEncoder here"),
    ):
        with pytest.raises(UserError, match=f"made by another text encoder \\(.*{named}"):
            data.check_text(other)
    with pytest.raises(UserError, match="the text encoder is trained, so that its states change"):
        data.check_text(BertTextEncoder(models["bert"], max_length=16, trainable="last_1"))
    other = str(write_shards(tmp_path / "other", [5, 3, 4], first=1, captions=2))
    with pytest.raises(UserError, match="made from another shard 00000"):
        CaptionedImages(other, 8, 4, text_cache=str(tmp_path / "text")).train_dataloader()
    with pytest.raises(UserError, match="differ in encoder"):
        encode_text(BertTextEncoder(models["bert"], max_length=12), ShardSource(shards), tmp_path / "text")
    with pytest.raises(UserError, match="differ in stored"):
        encode_text(bert, ShardSource(shards), tmp_path / "text", "int8")
    with pytest.raises(UserError, match="differ in source shards"):
        encode_text(bert, ShardSource(other), tmp_path / "text")
    with pytest.raises(UserError, match="one that is trained"):
        encode_text(BertTextEncoder(models["bert"], max_length=16, trainable="all"), ShardSource(shards), tmp_path / "new")


@pytest.mark.parametrize("file", ["00000.text.safetensors", "00001.captions.safetensors"])
def test_damaged_caches_are_refused(shards, tmp_path, bert, file):
    encode_text(bert, ShardSource(shards), tmp_path / "text")
    path = tmp_path / "text" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        batches(shards, tmp_path / "text")
    (tmp_path / "text" / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is not readable JSON"):
        batches(shards, tmp_path / "text")


def test_a_mixture_names_a_cache_for_each_part(tmp_path, bert):
    parts = []
    for name, first in (("one", 0), ("two", 20)):
        shards = str(write_shards(tmp_path / name, [4, 3], first=first))
        encode_text(bert, ShardSource(shards), tmp_path / f"{name}-text")
        parts.append({"source": shards, "text_cache": str(tmp_path / f"{name}-text")})
    loader = iter(CaptionedImages(parts, 8, 8).train_dataloader())
    for _ in range(4):
        batch = next(loader)
        expected = bert(batch.captions)
        assert torch.equal(batch.condition.masks[0], expected.masks[0])
        torch.testing.assert_close(
            batch.condition.states[0].float(), expected.states[0] * expected.masks[0][..., None], rtol=1e-3, atol=2e-3
        )
    del parts[0]["text_cache"]
    with pytest.raises(UserError, match="either all sources of a mixture have a text cache, or none"):
        CaptionedImages(parts, 8, 8).train_dataloader()


def test_a_mixture_of_types_is_float32_whichever_parts_a_batch_holds(tmp_path, bert):
    parts = []
    for name, stored in (("one", "float16"), ("two", "bfloat16")):
        shards = str(write_shards(tmp_path / name, [6]))
        encode_text(bert, ShardSource(shards), tmp_path / f"{name}-text", stored)
        parts.append({"source": shards, "text_cache": str(tmp_path / f"{name}-text")})
    batch = next(iter(CaptionedImages(parts, 8, 8).train_dataloader()))
    assert batch.condition.states[0].dtype == torch.float32


def test_what_is_streamed_has_no_cache():
    for option in ("cache", "text_cache"):
        with pytest.raises(UserError, match="is streamed, and what is streamed has no cache"):
            CaptionedImages("https://example.org/0.tar", 8, 8, **{option: "folder"})


@pytest.fixture
def recipe(tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "tests/cluster/tiny.yaml", tmp_path / "tiny.yaml")
    text = {"class_path": "nar_t2i.text.T5TextEncoder", "init_args": {"folder": models["t5"], "max_length": 24}}
    data = str(write_shards(tmp_path / "shards", [20, 20], captions=2))
    (tmp_path / "text.yaml").write_text(json.dumps({
        "extends": "tiny.yaml",
        "model": {"init_args": {"text": text}},
        "data": {"class_path": "nar_t2i.data.CaptionedImages",
                 "init_args": {"train": data, "validation": data, "image_size": 16, "global_batch_size": 8}},
    }))  # fmt: skip
    return data


def logged(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder):
    return [float(row["loss"] or row["validation_loss"]) for row in logged(folder)]


@pytest.mark.parametrize(("stored", "off"), [("float32", 1e-5), ("float16", 2e-3)])
def test_training_from_the_cache_is_training_without_it(recipe, tmp_path, stored, off):
    assert command.main([recipe, "text.yaml", "text", "--dtype", stored]) == 0
    caches = ["--data.init_args.text_cache=text", "--data.init_args.validation_text_cache=text"]
    assert nar_t2i(["fit", "--config", "text.yaml", "--run_dir=cached", *caches]) == 0
    assert nar_t2i(["fit", "--config", "text.yaml", "--run_dir=plain"]) == 0
    assert nar_t2i(["fit", "--config", "text.yaml", "--run_dir=other", "--data.init_args.seed=1"]) == 0
    cached, plain, other = (losses(tmp_path / name) for name in ("cached", "plain", "other"))
    assert len(cached) == len(plain) > 12
    assert max(abs(a - b) for a, b in zip(cached, plain)) < off
    assert max(abs(a - b) for a, b in zip(other, plain)) > 10 * off


def test_captions_that_do_not_fit_are_told_in_training_from_the_cache_too(recipe, tmp_path):
    short = "--model.init_args.text.init_args.max_length=4"
    (tmp_path / "short.yaml").write_text(
        '{"extends": "text.yaml", "model": {"init_args": {"text": {"init_args": {"max_length": 4}}}}}'
    )
    assert command.main([recipe, "short.yaml", "text"]) == 0
    manifest = json.loads((tmp_path / "text/text.json").read_text())
    line = ["--data.init_args.text_cache=text", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", short]
    assert nar_t2i(["fit", "--config", "text.yaml", "--run_dir=cached", *line]) == 0
    told = [float(row["truncated_captions"]) for row in logged(tmp_path / "cached") if row.get("truncated_captions")]
    assert told and told == pytest.approx([manifest["truncated"] / manifest["captions"]] * len(told))
    assert manifest["truncated"] > 0


def test_a_recipe_that_does_not_match_is_one_error(recipe, capsys):
    assert command.main([recipe, "text.yaml", "text"]) == 0
    line = ["fit", "--config", "text.yaml", "--data.init_args.text_cache=text"]
    assert nar_t2i([*line, "--model.init_args.text.init_args.max_length=20"]) == 2
    assert "made by another text encoder (max_length: 24 there, 20 here); encode anew" in capsys.readouterr().err
    assert nar_t2i([*line, "--model.init_args.text.init_args.trainable=all"]) == 2
    assert "the text encoder is trained" in capsys.readouterr().err
    assert nar_t2i(["fit", "--config", "text.yaml", "--data.init_args.text_cache=nowhere"]) == 2
    assert "nowhere is no finished cache" in capsys.readouterr().err


def test_training_in_bfloat16_from_the_cache(recipe):
    assert command.main([recipe, "text.yaml", "text"]) == 0
    line = ["--data.init_args.text_cache=text", "--trainer.precision=bf16-true", "--trainer.max_steps=2"]
    assert nar_t2i(["fit", "--config", "text.yaml", *line]) == 0


def test_the_doctor_takes_a_frozen_encoder_from_where_training_does(recipe, tmp_path, models, capsys):
    """The states of an encoder that another run has trained."""
    trained = ["--model.init_args.text.init_args.trainable=all", "--trainer.max_steps=2", "--run_dir=first"]
    assert nar_t2i(["fit", "--config", "text.yaml", *trained]) == 0
    assert command.main([recipe, "first", "text"]) == 0
    frozen = [f"--model.init_args.text.init_args.folder={tmp_path}/first/model/text", "--data.init_args.text_cache=text"]
    assert nar_t2i(["doctor", "text.yaml", "--nodes", "1", "--gpus-per-node", "1", *frozen]) == 0, capsys.readouterr().out
    assert nar_t2i(["fit", "--config", "text.yaml", *frozen]) == 0


@pytest.mark.parametrize(("model", "message"), [
    ("nowhere", "nowhere"), ("shards", "holds no text encoder"), ("empty.yaml", "names no text encoder"),
    ("quickstart/generator", "has weights from init_from"), ("tokenizer", "is a ToyCodec, and no text encoder"),
])  # fmt: skip
def test_what_is_no_text_encoder_is_one_error(recipe, tmp_path, capsys, monkeypatch, model, message):
    (tmp_path / "empty.yaml").write_text("run_dir: run\n")
    train_sentencepiece(["a red circle above two blue squares"] * 9, "runs/quickstart/data/vocabulary.model", 300)
    save_part(ToyCodec(), tmp_path / "tokenizer")
    monkeypatch.setattr(command, "load_part", partial(load_part, trusted=("tests",)))
    assert command.main([recipe, model, "text"]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_states_that_cannot_be_stored_are_refused():
    large = torch.full((1, 2), 7e4)
    assert unpack_states(pack_states(large, "bfloat16"), "bfloat16").isfinite().all()
    with pytest.raises(UserError, match="7e.04 do not fit float16; encode with --dtype bfloat16"):
        pack_states(large, "float16")
    with pytest.raises(UserError, match="not finite"):
        pack_states(large / 0, "float32")
