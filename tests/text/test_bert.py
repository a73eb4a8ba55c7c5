"""BERT from a folder: what transformers gives, frozen or trained, and whole again from a saved pipeline."""

import copy
import shutil

import pytest
import torch
import transformers
from torch import nn

from nar_t2i.errors import UserError
from nar_t2i.folders import load_part, save_part
from nar_t2i.inference import Confidence
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance
from nar_t2i.text import BertTextEncoder, NullCaption
from nar_t2i.training.optim import parameter_groups
from tests.text.tiny_bert import WORDS, tiny_bert
from tests.toys import ToyCodec, ToyMasked

CAPTIONS = ["a red circle", "two blue squares on the red circle", "", "a 😀 é"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def encoder(folder, **kwargs):
    return BertTextEncoder(folder, max_length=16, **kwargs)


def same(a, b):
    pairs = (a.states[0], b.states[0]), (a.masks[0], b.masks[0]), (a.pooled, b.pooled)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("trainable", [False, True])
def test_states_are_what_transformers_gives(bert, trainable):
    condition = encoder(bert, trainable=trainable)(CAPTIONS)
    model = transformers.BertModel.from_pretrained(bert).eval()
    rows = transformers.BertTokenizer.from_pretrained(bert)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
    assert torch.equal(condition.masks[0], rows["attention_mask"].bool())
    torch.testing.assert_close(condition.states[0].detach(), expected)
    means = [states[mask].mean(0) for states, mask in zip(expected, condition.masks[0])]
    torch.testing.assert_close(condition.pooled.detach(), torch.stack(means))


def test_padding_does_not_matter(bert):
    text = encoder(bert)
    together, alone = text(CAPTIONS), text(CAPTIONS[:1])
    length = alone.masks[0].shape[1]
    assert length < together.masks[0].shape[1]
    torch.testing.assert_close(together.states[0][:1, :length], alone.states[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.pooled[:1], alone.pooled, rtol=1e-5, atol=1e-6)


def test_pretrained_and_random_weights_are_other_weights(bert):
    pretrained, drawn = encoder(bert)(CAPTIONS), encoder(bert, pretrained=False)(CAPTIONS)
    assert pretrained.states[0].shape == drawn.states[0].shape
    assert not torch.allclose(pretrained.states[0], drawn.states[0], atol=0.1)


def test_random_frozen_weights_are_the_same_after_a_restart(bert):
    assert same(encoder(bert, pretrained=False)(CAPTIONS), encoder(bert, pretrained=False)(CAPTIONS))


class Holder(nn.Module):
    """Stands for the module that trains: its state dict is what a checkpoint holds."""

    def __init__(self, text):
        super().__init__()
        self.text = text


def test_frozen_weights_get_no_gradient_and_stay_out_of_checkpoints_and_optimizers(bert):
    text = encoder(bert).train()
    assert not text.network.training
    condition = text(CAPTIONS)
    assert not condition.states[0].requires_grad and not condition.pooled.requires_grad
    assert not Holder(text).state_dict() and not list(text.parameters()) and not parameter_groups(text, 0.1)
    text.to(torch.float64)
    assert text(CAPTIONS).states[0].dtype == torch.float64, "frozen weights do not follow the module"


def test_trained_weights_get_gradients_in_all_parameters(bert):
    text = encoder(bert, trainable=True).train()
    text(CAPTIONS).states[0].square().mean().backward()
    assert text.model.training
    assert all(p.grad is not None for p in text.parameters()), "a parameter without gradient stops DDP"
    assert same(text(CAPTIONS), text.eval()(CAPTIONS)), "dropout is on"
    assert len(parameter_groups(text, 0.1)) == 2


def test_a_trained_encoder_in_evaluation_can_still_be_told_to_keep_no_graph(bert):
    with torch.no_grad():
        assert not encoder(bert, trainable=True)(CAPTIONS).states[0].requires_grad


def test_long_captions_are_cut_and_counted(bert):
    text = encoder(bert)
    condition = text(["red " * 10_000, "a red circle", "red " * 14, "red " * 15])
    assert text.truncated == 2
    assert condition.masks[0].sum(1).tolist() == [16, 5, 16, 16]
    codes, _ = text.tokenize(["red " * 10_000])
    assert codes[0, -1] == WORDS.index("[SEP]")


def test_lone_surrogates_are_read(bert):
    assert encoder(bert)(["\udcff red"]).masks[0].any()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_saved_pipeline_holds_the_encoder(bert, tmp_path, trainable, pretrained):
    original = tmp_path / "original"
    shutil.copytree(bert, original)
    text = encoder(str(original), trainable=trainable, pretrained=pretrained)
    with torch.no_grad():
        for p in text.network.parameters():
            p.add_(0.01)  # as if it had been trained
    codec = ToyCodec()
    parts = (codec, text, NullCaption(text.widths, text.pooled_width), ToyMasked(codec.spec, text.widths))
    TextToImage(*parts, Confidence(2), Guidance(2.0)).save_pretrained(tmp_path / "model")
    shutil.rmtree(original)
    (tmp_path / "model").rename(tmp_path / "moved")
    loaded = TextToImage.from_pretrained(tmp_path / "moved", trusted=("tests",))
    assert same(loaded.text(CAPTIONS), text.eval()(CAPTIONS))
    assert loaded.text.trainable == trainable
    loaded.save_pretrained(tmp_path / "moved")  # over itself
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("moved", "again"):
        again = TextToImage.from_pretrained(tmp_path / folder, trusted=("tests",))
        assert same(again.text(CAPTIONS), text(CAPTIONS))


def test_weights_are_stored_once_and_in_the_type_asked_for(bert, tmp_path):
    save_part(encoder(bert), tmp_path / "frozen", torch.bfloat16)
    save_part(encoder(bert, trainable=True), tmp_path / "trained")
    assert (tmp_path / "frozen/weights.safetensors").stat().st_size < 100
    assert not (tmp_path / "trained/pretrained/model.safetensors").exists()
    assert (tmp_path / "frozen/pretrained/model.safetensors").stat().st_size < 0.7 * (
        (tmp_path / "trained/weights.safetensors").stat().st_size
    )
    loaded = load_part(tmp_path / "frozen")(CAPTIONS).states[0]
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, encoder(bert)(CAPTIONS).states[0], rtol=0.1, atol=0.1)


def broken(bert, tmp_path, missing=(), **changes):
    folder = tmp_path / "broken"
    shutil.copytree(bert, folder)
    for name in missing:
        (folder / name).unlink()
    for name, text in changes.items():
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


def test_mistakes_are_one_clear_error(bert, tmp_path):
    with pytest.raises(UserError, match="there is no folder google/none.*nothing is downloaded"):
        BertTextEncoder("google/none")
    with pytest.raises(UserError, match="max_length must be 3 to 32"):
        BertTextEncoder(bert, max_length=33)


@pytest.mark.parametrize(
    "missing, changes, message",
    [
        (["config.json"], {}, "not a whole pretrained model"),
        (["model.safetensors"], {}, "not a whole pretrained model"),
        (["tokenizer.json"], {}, "no tokenizer's vocabulary"),
        ([], {"config__json": "{"}, "not a whole pretrained model"),
        ([], {"model__safetensors": "cut"}, "not a whole pretrained model"),
        ([], {"config__json": '{"model_type": "t5"}'}, "holds a t5 model, BertTextEncoder needs bert"),
    ],
)
def test_folders_that_are_not_whole(bert, tmp_path, missing, changes, message):
    with pytest.raises(UserError, match=message):
        BertTextEncoder(broken(bert, tmp_path, missing, **changes), max_length=16)


def test_weights_that_lack_a_layer_are_refused(bert, tmp_path):
    folder = broken(bert, tmp_path)
    config = transformers.BertConfig.from_pretrained(folder)
    deeper = copy.deepcopy(config)
    deeper.num_hidden_layers = 3
    deeper.save_pretrained(folder)
    with pytest.raises(UserError, match="lacks weights, such as encoder.layer.2"):
        BertTextEncoder(folder, max_length=16)


def test_no_code_of_the_folder_runs(bert, tmp_path):
    folder = broken(bert, tmp_path, evil__py=f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\n")
    config = transformers.BertConfig.from_pretrained(folder)
    config.auto_map = {"AutoModel": "evil.M", "AutoConfig": "evil.M", "AutoTokenizer": "evil.M"}
    config.save_pretrained(folder)
    try:
        BertTextEncoder(folder, max_length=16)
    except UserError:
        pass
    assert not (tmp_path / "ran").exists()
