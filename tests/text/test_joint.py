"""Two encoders as one: side by side, or one for its states and the other for its pooled state."""

import shutil

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.inference import Confidence
from nar_t2i.networks import EncoderDecoder
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance
from nar_t2i.text import ClipTextEncoder, JointTextEncoder, NullCaption, T5TextEncoder
from tests.text.tiny_models import tiny_clip, tiny_t5
from tests.toys import ToyCodec

CAPTIONS = ["a red circle", "two blue squares", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_t5(folder / "t5"), tiny_clip(folder / "clip")


@pytest.fixture
def pair(folders):
    return T5TextEncoder(folders[0], max_length=24), ClipTextEncoder(folders[1], max_length=16, trainable="last_1")


def equal(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


def test_side_by_side(pair):
    text = JointTextEncoder(list(pair), pooled_token=False)
    found, (t5, clip) = text(CAPTIONS), (encoder(CAPTIONS) for encoder in pair)
    assert text.widths == (16, 16) and text.pooled_width == 28
    assert equal(found.states, (*t5.states, *clip.states)) and equal(found.masks, (*t5.masks, *clip.masks))
    assert torch.equal(found.pooled, torch.cat([t5.pooled, clip.pooled], -1))


@pytest.mark.parametrize("token", [False, True])
def test_the_states_of_one_and_the_pooled_state_of_the_other(pair, token):
    text = JointTextEncoder(list(pair), sequence=[0], pooled=[1], pooled_token=token)
    found, (t5, clip) = text(CAPTIONS), (encoder(CAPTIONS) for encoder in pair)
    assert torch.equal(found.pooled, clip.pooled)
    assert text.widths == ((16, 12) if token else (16,)) and text.pooled_width == 12
    assert equal(found.states, (*t5.states, clip.pooled.unsqueeze(1)) if token else t5.states)
    assert equal(found.masks, (*t5.masks, torch.ones(3, 1, dtype=torch.bool)) if token else t5.masks)


def test_captions_that_do_not_fit_are_those_of_the_shorter_encoder(pair):
    text = JointTextEncoder(list(pair))
    text(["a red circle and a red square", "red"])  # 24 letters, 16 places
    assert (text.encoded, text.truncated) == (2, 1)
    assert [encoder.truncated for encoder in pair] == [0, 1]


def test_a_dropped_caption_is_dropped_from_all_streams(pair):
    text = JointTextEncoder(list(pair), pooled_token=True)
    null = NullCaption(text.widths, text.pooled_width)
    torch.nn.init.normal_(null.pooled)
    found = null(text(CAPTIONS), torch.tensor([False, True, False]))
    whole = text(CAPTIONS)
    for row in (0, 2):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(found.states, whole.states))
    for state, mask, vector in zip(found.states, found.masks, null.states, strict=True):
        assert mask[1].tolist() == [True] + [False] * (mask.shape[1] - 1)
        assert torch.equal(state[1, 0], vector)
    assert torch.equal(found.pooled[1], null.pooled)


def test_a_saved_pipeline_holds_both(folders, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / name) for folder, name in zip(folders, ("t5", "clip"), strict=True)]
    encoders = [T5TextEncoder(str(copies[0]), max_length=24), ClipTextEncoder(str(copies[1]), max_length=16, trainable="last_1")]
    text, codec = JointTextEncoder(encoders, pooled_token=True), ToyCodec()
    network = EncoderDecoder(codec.spec, text.widths, width=16, depth=1, heads=2)
    null = NullCaption(text.widths, text.pooled_width)
    TextToImage(codec, text, null, network, Confidence(2), Guidance(2.0)).save_pretrained(tmp_path / "model")
    for folder in copies:
        shutil.rmtree(folder)
    (tmp_path / "model").rename(tmp_path / "moved")
    loaded = TextToImage.from_pretrained(tmp_path / "moved", trusted=("tests",))
    loaded.save_pretrained(tmp_path / "again")
    again = TextToImage.from_pretrained(tmp_path / "again", trusted=("tests",))
    for other in (loaded, again):
        assert equal(other.text(CAPTIONS).states, text.eval()(CAPTIONS).states)
        assert torch.equal(other.text(CAPTIONS).pooled, text(CAPTIONS).pooled)
    frozen = tmp_path / "moved/text/encoders-0/pretrained/model.safetensors"
    trained = tmp_path / "moved/text/encoders-1/pretrained/model.safetensors"
    assert frozen.is_file() and not trained.exists(), "weights are stored once"
    assert loaded(["a red circle"])[0].size == (16, 16)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"sequence": [0], "pooled": [0]}, "must name the encoders 0 to 1, each at least once, not \\[0\\] and \\[0\\]"),
    ({"sequence": [0, 2]}, "must name the encoders 0 to 1"),
    ({"sequence": []}, "sequence must name at least one"),
])  # fmt: skip
def test_mistakes_are_one_clear_error(pair, arguments, message):
    with pytest.raises(UserError, match=message):
        JointTextEncoder(list(pair), **arguments)
