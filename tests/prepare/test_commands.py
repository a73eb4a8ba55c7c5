"""Every data command from end to end: shards, vocabulary, tokens."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.data.shards import ShardSource
from nar_t2i.errors import UserError
from nar_t2i.folders import save_part
from nar_t2i.prepare import folder, scenes, tokens
from nar_t2i.prepare.rendering import write_source
from nar_t2i.tokenizers import VQGAN, VectorQuantizer
from tests.data.making_shards import encoded, pixels
from tests.full_disk import files_of_at_most

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_rendered_scenes_become_shards(tmp_path, workers):
    source = RenderedScenes("train", 7, 3, 16, 2)
    summary = write_source(source, tmp_path, 3, workers)
    shards = ShardSource(str(tmp_path))
    assert summary.kept == 7 and list(shards.blocks) == [3, 3, 1]
    for index in range(7):
        assert np.array_equal(shards.read(index).image, source.read(index).image)
        assert shards.read(index).captions == source.read(index).captions


def test_an_interrupted_copy_goes_on_and_another_is_refused(tmp_path):
    source = RenderedScenes("train", 7, 3, 16)
    write_source(source, tmp_path, 3)
    kept = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "00001.tar").unlink()
    stamp = (tmp_path / "00000.tar").stat().st_mtime_ns
    write_source(source, tmp_path, 3)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == kept
    assert (tmp_path / "00000.tar").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="source differ"):
        write_source(RenderedScenes("train", 7, 4, 16), tmp_path, 3)


def test_from_scenes_to_tokens(tmp_path, capsys):
    options = ["--count", "12", "--image-size", "16", "--samples-per-shard", "5"]
    assert scenes.main([str(tmp_path / "shards"), *options]) == 0
    codec = VQGAN(16, channels=[32], blocks=1, patch=4, quantizer=VectorQuantizer(codes=32, width=4))
    save_part(codec, tmp_path / "model" / "tokenizer")
    assert tokens.main([str(tmp_path / "shards"), str(tmp_path / "model"), str(tmp_path / "tokens")]) == 0
    assert "tokens of 12 images; 0 could not be read" in capsys.readouterr().out
    data = CaptionedImages(str(tmp_path / "shards"), 16, 4, cache=str(tmp_path / "tokens"))
    batch = next(iter(data.train_dataloader()))
    assert batch.tokens.shape == (4, codec.spec.length)
    assert tokens.main([str(tmp_path / "shards"), str(tmp_path / "none"), str(tmp_path / "tokens")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("script", sorted((ROOT / "data_prep").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_starts(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0 and f"usage: {script.name}" in capsys.readouterr().out


@pytest.mark.parametrize(("script", "options", "words"), [
    ("from_folder", ["IN", "OUT", "--workers", "0"], "--workers: must be at least 1, not 0"),
    ("from_folder", ["IN", "OUT", "--max-size", "0"], "--max-size: must be at least 1"),
    ("from_folder", ["IN", "OUT", "--samples-per-shard", "few"], "invalid whole number value: 'few'"),
    ("encode_tokens", ["IN", "IN", "OUT", "--batch-size", "0"], "--batch-size: must be at least 1"),
    ("encode_tokens", ["IN", "IN", "OUT", "--device", "abacus"], "--device: abacus: "),
    ("render_scenes", ["OUT", "--samples-per-shard", "0"], "--samples-per-shard: must be at least 1"),
    ("from_folder", ["IN", "FILE"], "FILE: File exists"),
    ("make_scene_prompts", ["FILE"], "FILE: File exists"),
    ("train_scene_features", ["OUT", "--scenes", "0"], "--scenes: must be at least 64"),
    ("from_table", ["LONG", "OUT"], "e.g. a long caption"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, script, options, words):
    monkeypatch.chdir(tmp_path)
    Path("IN").mkdir()
    Path("IN/a.png").write_bytes(encoded(pixels(0)))
    Path("IN/a.txt").write_text("a star")
    Path("FILE").write_text("")
    Path("LONG.csv").write_text(f"path,caption\n{'a long caption ' * 40},a.png\n")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *("LONG.csv" if word == "LONG" else word for word in options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "data_prep" / f"{script}.py"), run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and words in error and "goes on" not in error


def test_a_full_disk_is_one_line_and_the_import_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("IN").mkdir()
    for n in range(4):
        Path(f"IN/{n}.png").write_bytes(encoded(pixels(n, 64, 64)))
        Path(f"IN/{n}.txt").write_text("noise")
    with files_of_at_most(20_000):
        assert folder.main(["IN", "OUT"]) == 2
    assert "File too large; the same command goes on" in capsys.readouterr().err.splitlines()[-1]
    assert folder.main(["IN", "OUT"]) == 0 and len(ShardSource("OUT")) == 4


def test_an_error_is_one_line_and_status_2(tmp_path):
    script = str(ROOT / "data_prep" / "from_folder.py")
    command = [sys.executable, script, str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path / 'none'} is not a folder\n"
