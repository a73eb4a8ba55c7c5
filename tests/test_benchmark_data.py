"""The benchmark of data runs in small, and reports nothing where a side gives other samples."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from benchmarks import data
from benchmarks.results import ROOT
from nar_t2i.errors import UserError

SAMPLES = 64


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return data.Material(tmp_path_factory.mktemp("material"), SAMPLES, batch_size=16, small=True)


def test_all_sides_give_the_same_samples(material):
    sides = material.sides()
    assert len(sides) == 9 and {side.group for side in sides.values()} == {"images", "tokens", "states"}
    data.agree(sides, SAMPLES)


@pytest.mark.parametrize("change", ["pixel", "caption", "lost"])
def test_a_side_that_differs_is_refused(material, tmp_path, change):
    for path in (material.folder / "files").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = min(tmp_path.glob("*.png"))
    if change == "pixel":
        image = Image.open(first).convert("RGB")
        image.putpixel((0, 0), (1, 2, 3))
        image.save(first)
    elif change == "caption":
        first.with_suffix(".txt").write_text("another")
    else:
        first.unlink()
    told = {"pixel": f"gives sample {first.stem} another content", "caption": "another caption", "lost": "gives other samples"}

    def changed(workers):
        files = data.Files(tmp_path)
        order = iter(range(len(files)))
        while rows := [files[i] for _, i in zip(range(16), order, strict=False)]:
            yield data._collated(rows)

    with pytest.raises(UserError, match=told[change]):
        data.agree({**material.sides(), "files": data.Side("images", changed)}, SAMPLES)


def test_tokens_that_were_made_otherwise_are_refused(material):
    def other(workers):
        for batch in material.cached(workers):
            tokens = batch.contents.clone()
            tokens[:, :2] += 1
            yield batch._replace(contents=tokens)

    with pytest.raises(UserError, match="other tokens"):
        data.agree({"cached": material.sides()["cached"], "anew": data.Side("tokens", other, exact=False)}, SAMPLES)
    with pytest.raises(UserError, match="another content"):
        data.agree({"cached": material.sides()["cached"], "arrays": data.Side("tokens", other)}, SAMPLES)


def test_it_runs_and_the_cache_is_the_quickest(tmp_path):
    line = [sys.executable, ROOT / "benchmarks/data.py", "--small", "--samples", "64", "--batch-size", "16", "--rounds", "1",
            "--seconds", "0.1", "--workers", "0", "1", "--out", tmp_path / "data.json"]  # fmt: skip
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["commit"] and found["machine"]["cores"] and found["tokens"] == 64 and found["pixels"] == 64
    rows = {(row["side"], row["workers"]): row for row in found["rows"]}
    assert len(rows) == 18 and all(row["samples_per_second"] > 0 and row["bytes_a_sample"] > 0 for row in found["rows"])
    assert rows["webdataset, images", 0]["cached_over_this"] > 2  # 5 and more on an idle machine
    assert rows["cached", 0]["bytes_a_sample"] < rows["shards", 0]["bytes_a_sample"] / 10
    assert min(rows[side, 0]["cached_over_this"] for side in ("encoded anew", "encoded anew, states")) > 1
