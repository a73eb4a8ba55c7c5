"""BERT, T5 and CLIP from a folder: what transformers gives, frozen or trained, and whole again from a saved pipeline."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nar_t2i.errors import UserError
from nar_t2i.folders import load_part, save_part
from nar_t2i.inference import Confidence
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance
from nar_t2i.text import BertTextEncoder, ClipTextEncoder, NullCaption, T5TextEncoder
from nar_t2i.training.optim import parameter_groups
from tests.text.tiny_models import WORDS, tiny_bert, tiny_clip, tiny_t5
from tests.toys import ToyCodec, ToyMasked

CAPTIONS = ["a red circle", "two blue squares on the red circle", "", "a 😀 é"]
KINDS = {"bert": (BertTextEncoder, tiny_bert), "t5": (T5TextEncoder, tiny_t5), "clip": (ClipTextEncoder, tiny_clip)}
DEPTH = {"bert": 2, "t5": 3, "clip": 3}
LAYERS = {"bert": "encoder.layer", "t5": "encoder.block", "clip": "text_model.encoder.layers"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {kind: make(tmp_path_factory.mktemp("models") / kind) for kind, (_, make) in KINDS.items()}


@pytest.fixture(scope="session")
def bert(folders):
    return folders["bert"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def make(folders, kind):
    return lambda folder=None, **arguments: KINDS[kind][0](folder or folders[kind], **{"max_length": 16, **arguments})


def encoder(folder, **kwargs):
    return BertTextEncoder(folder, max_length=16, **kwargs)


def same(a, b):
    pairs = (a.states[0], b.states[0]), (a.masks[0], b.masks[0]), (a.pooled, b.pooled)
    return all(torch.equal(*pair) for pair in pairs)


def told_by_transformers(kind, folder, captions, **padding):
    """(states of every layer, mask, pooled) without any code of ours. CLIP's padding sees padding where it is read."""
    rows = transformers.AutoTokenizer.from_pretrained(folder)(
        captions, truncation=True, max_length=16, return_tensors="pt", **(padding or {"padding": True})
    )
    names = {"bert": "BertModel", "t5": "T5EncoderModel", "clip": "CLIPTextModelWithProjection"}
    model = getattr(transformers, names[kind]).from_pretrained(folder).eval()
    with torch.no_grad():
        seen = None if kind == "clip" and padding else rows["attention_mask"]
        output = model(input_ids=rows["input_ids"], attention_mask=seen, output_hidden_states=True)
        states = list(output.hidden_states)
        if kind == "t5":  # what it calls the last is normalised, and the others are not
            states = [model.encoder.final_layer_norm(x) for x in states[:-1]] + states[-1:]
        elif kind == "clip":  # and here none is
            states = [model.text_model.final_layer_norm(x) for x in states]
    mask = rows["attention_mask"].bool()
    means = torch.stack([state[row].mean(0) for state, row in zip(output.last_hidden_state, mask)])
    torch.testing.assert_close(states[-1], output.last_hidden_state)
    return states, mask, output.text_embeds if kind == "clip" else means


@pytest.mark.parametrize("trainable", ["none", "all"])
def test_states_are_what_transformers_gives(folders, kind, make, trainable):
    condition = make(trainable=trainable)(CAPTIONS)
    states, mask, pooled = told_by_transformers(kind, folders[kind], CAPTIONS)
    assert torch.equal(condition.masks[0], mask)
    torch.testing.assert_close(condition.states[0].detach(), states[-1])
    torch.testing.assert_close(condition.pooled.detach(), pooled)


class Unasked(TorchDispatchMode):
    """Nothing is read from the device, whose work would have to end first."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def test_the_host_runs_ahead_of_the_device(make):
    text = make(trainable="all")
    codes, mask = text.tokenize(CAPTIONS)
    assert not mask.all()
    with Unasked():
        states, _ = text.encode(codes, mask)
        with pytest.raises(AssertionError):
            text.network(input_ids=codes, attention_mask=mask.long())  # as it would be called otherwise
    text.network.set_attn_implementation("eager")
    torch.testing.assert_close(text.encode(codes, mask)[0][mask], states[mask])


@pytest.mark.parametrize("trainable", ["none", "all"])
def test_states_of_an_earlier_layer(folders, kind, make, trainable):
    text = make(layer=-2, trainable=trainable)
    condition = text(CAPTIONS)
    states, mask, pooled = told_by_transformers(kind, folders[kind], CAPTIONS)
    torch.testing.assert_close(condition.states[0].detach(), states[-2])
    assert not torch.allclose(condition.states[0].detach(), states[-1], atol=1e-3)
    if kind == "clip":
        torch.testing.assert_close(condition.pooled.detach(), pooled)
        assert len(text.layers(text.network)) == 3
    else:
        means = torch.stack([state[row].mean(0) for state, row in zip(states[-2], mask)])
        torch.testing.assert_close(condition.pooled.detach(), means)
        assert len(text.layers(text.network)) == DEPTH[kind] - 1  # nothing is computed that nothing reads


def test_padding_that_the_network_may_read_has_a_fixed_length(folders, kind, make):
    text = make(mask_padding=False)
    together, alone = text(CAPTIONS), text(CAPTIONS[:1])
    assert together.states[0].shape == (4, 16, 16) and together.masks[0].all()
    torch.testing.assert_close(together.states[0][:1], alone.states[0], rtol=1e-5, atol=1e-6)
    states, _, pooled = told_by_transformers(kind, folders[kind], CAPTIONS, padding="max_length")
    torch.testing.assert_close(together.states[0], states[-1])
    torch.testing.assert_close(together.pooled, pooled)


def test_clips_earlier_layer_without_its_final_norm(folders):
    arguments = {"layer": -2, "max_length": 16, "mask_padding": False}
    text = ClipTextEncoder(folders["clip"], **arguments, final_norm=False)
    rows = transformers.AutoTokenizer.from_pretrained(folders["clip"])(
        CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    model = transformers.CLIPTextModelWithProjection.from_pretrained(folders["clip"]).eval()
    with torch.no_grad():
        output = model(rows["input_ids"], output_hidden_states=True)
    condition, normed = text(CAPTIONS), ClipTextEncoder(folders["clip"], **arguments)
    torch.testing.assert_close(condition.states[0], output.hidden_states[-2])
    torch.testing.assert_close(condition.pooled, output.text_embeds)
    assert not torch.allclose(normed(CAPTIONS).states[0], condition.states[0], atol=0.1)
    assert normed.fingerprint() != text.fingerprint()
    with pytest.raises(UserError, match="final_norm false is for a layer before the last"):
        ClipTextEncoder(folders["clip"], final_norm=False)


def test_a_null_caption_of_several_tokens(make):
    """It takes the place of longer captions and of shorter ones, in training and in guidance."""
    text = make()
    condition = text(CAPTIONS)
    for length in (3, 20):
        null = NullCaption(text.widths, text.pooled_width, length)
        dropped = torch.tensor([True, False, True, False])
        for told in (null(condition, dropped), null(condition)):
            whole = max(length, condition.states[0].shape[1])
            assert torch.equal(told.states[0][0, :length], null.states[0]) and not told.states[0][0, length:].any()
            assert told.masks[0].shape == (4, whole) and told.masks[0].sum(1)[::2].tolist() == [length] * 2
        kept, own = null(condition, dropped), condition.states[0].shape[1]
        assert torch.equal(kept.states[0][1::2, :own], condition.states[0][1::2])
        assert torch.equal(kept.masks[0][1::2].sum(1), condition.masks[0][1::2].sum(1))
    with pytest.raises(UserError, match="at least 1 token, not 0"):
        NullCaption(text.widths, text.pooled_width, 0)


def test_padding_does_not_matter(make):
    text = make()
    together, alone = text(CAPTIONS), text(CAPTIONS[:1])
    length = alone.masks[0].shape[1]
    assert length < together.masks[0].shape[1]
    torch.testing.assert_close(together.states[0][:1, :length], alone.states[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.pooled[:1], alone.pooled, rtol=1e-5, atol=1e-6)


def test_pretrained_and_random_weights_are_other_weights(make):
    pretrained, drawn = make()(CAPTIONS), make(pretrained=False)(CAPTIONS)
    assert pretrained.states[0].shape == drawn.states[0].shape
    assert not torch.allclose(pretrained.states[0], drawn.states[0], atol=0.1)


@pytest.mark.parametrize("trainable", ["none", "last_1"])
def test_random_frozen_weights_are_the_same_after_a_restart(make, trainable):
    assert same(make(pretrained=False, trainable=trainable)(CAPTIONS), make(pretrained=False, trainable=trainable)(CAPTIONS))


class Holder(nn.Module):
    """Stands for the module that trains: its state dict is what a checkpoint holds."""

    def __init__(self, text):
        super().__init__()
        self.text = text


def test_frozen_weights_get_no_gradient_and_stay_out_of_checkpoints_and_optimizers(make):
    text = make().train()
    assert not text.network.training
    condition = text(CAPTIONS)
    assert not condition.states[0].requires_grad and not condition.pooled.requires_grad
    assert not Holder(text).state_dict() and not list(text.parameters()) and not parameter_groups(text, 0.1)
    text.to(torch.float64)
    assert text(CAPTIONS).states[0].dtype == torch.float64, "frozen weights do not follow the module"


@pytest.mark.parametrize("layer", [-1, -2])
def test_trained_weights_get_gradients_in_all_parameters(make, layer):
    text = make(trainable="all", layer=layer).train()
    text(CAPTIONS).states[0].square().mean().backward()
    assert text.model.training
    assert all(p.grad is not None for p in text.parameters()), "a parameter without gradient stops DDP"
    assert same(text(CAPTIONS), text.eval()(CAPTIONS)), "dropout is on"
    assert len(parameter_groups(text, 0.1)) == 2


def test_the_last_layers_alone_are_trained(kind, make):
    text = make(trainable="last_1").train()
    condition = text(CAPTIONS)
    (condition.states[0].square().mean() + condition.pooled.square().mean()).backward()
    trained = {name for name, p in text.network.named_parameters() if p.grad is not None}
    last = f"{LAYERS[kind]}.{DEPTH[kind] - 1}."
    behind = {"bert": (), "t5": ("encoder.final_layer_norm",), "clip": ("text_model.final_layer_norm", "text_projection")}[kind]
    assert trained == {name for name, _ in text.network.named_parameters() if name.startswith((last, *behind))}
    assert trained == {name for name, p in text.network.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in parameter_groups(text, 0.1)) == len(trained)


def test_a_trained_encoder_in_evaluation_can_still_be_told_to_keep_no_graph(make):
    with torch.no_grad():
        assert not make(trainable="all")(CAPTIONS).states[0].requires_grad


def test_long_captions_are_cut_and_counted(bert):
    text = encoder(bert)
    condition = text(["red " * 10_000, "a red circle", "red " * 14, "red " * 15])
    assert (text.encoded, text.truncated) == (4, 2)
    assert condition.masks[0].sum(1).tolist() == [16, 5, 16, 16]
    codes, _ = text.tokenize(["red " * 10_000])
    assert codes[0, -1] == WORDS.index("[SEP]")


def test_captions_of_any_kind_are_read(make):
    text = make()
    condition = text(["red " * 10_000, "", "😀", "日本語", "\udcff red", "a\x00b\n"])
    assert condition.masks[0].any(1).all() and condition.states[0].isfinite().all() and condition.pooled.isfinite().all()
    assert text.truncated == 1 and text.tokenize(["red " * 10_000])[0].shape == (1, 16)


@pytest.mark.parametrize("trainable", ["none", "last_1", "all"])
@pytest.mark.parametrize(("pretrained", "layer"), [(True, -1), (True, -2), (False, -1)])
def test_a_saved_pipeline_holds_the_encoder(folders, kind, make, tmp_path, trainable, pretrained, layer):
    original = shutil.copytree(folders[kind], tmp_path / "original")
    text = make(str(original), trainable=trainable, pretrained=pretrained, layer=layer)
    with torch.no_grad():
        for p in text.network.parameters():
            p.add_(0.01)  # as if it had been trained
    codec = ToyCodec()
    null, network = NullCaption(text.widths, text.pooled_width), ToyMasked(codec.spec, (text.pooled_width,))
    TextToImage(codec, text, null, network, Confidence(2), Guidance(2.0)).save_pretrained(tmp_path / "model")
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


def test_weights_are_stored_once_and_in_the_type_asked_for(make, tmp_path):
    save_part(make(), tmp_path / "frozen", torch.bfloat16)
    save_part(make(trainable="all"), tmp_path / "trained")
    assert (tmp_path / "frozen/weights.safetensors").stat().st_size < 100
    assert not (tmp_path / "trained/pretrained/model.safetensors").exists()
    assert (tmp_path / "frozen/pretrained/model.safetensors").stat().st_size < 0.7 * (
        (tmp_path / "trained/weights.safetensors").stat().st_size
    )
    loaded = load_part(tmp_path / "frozen")(CAPTIONS).states[0]
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, make()(CAPTIONS).states[0], rtol=0.1, atol=0.1)


def broken(folder, tmp_path, missing=(), **changes):
    copied = tmp_path / "broken"
    shutil.copytree(folder, copied)
    for name in missing:
        (copied / name).unlink()
    for name, text in changes.items():
        (copied / name.replace("__", ".")).write_text(text)
    return str(copied)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"folder": "google/none"}, "there is no folder google/none.*nothing is downloaded"),
    ({"trainable": "last"}, "trainable must be none, all or last_k, such as last_2, not 'last'"),
    ({"trainable": "last_4"}, "trainable is last_4, but there are [23] layers"),
    ({"layer": 0}, "layer must be -[23] to -1 for .*, not 0"),
    ({"layer": -9}, "layer must be -[23] to -1 for .*, not -9"),
    ({"max_length": 2}, "max_length must be "),
])  # fmt: skip
def test_mistakes_are_one_clear_error(make, arguments, message):
    with pytest.raises(UserError, match=message):
        make(**arguments)


def test_captions_cannot_be_longer_than_the_model_knows(bert):
    with pytest.raises(UserError, match="max_length must be 3 to 32"):
        BertTextEncoder(bert, max_length=33)


@pytest.mark.parametrize(
    "missing, changes, message",
    [
        (["config.json"], {}, "not a whole pretrained model"),
        (["model.safetensors"], {}, "not a whole pretrained model"),
        ([], {"config__json": "{"}, "not a whole pretrained model"),
        ([], {"model__safetensors": "cut"}, "not a whole pretrained model"),
        ([], {"config__json": '{"model_type": "gpt2"}'}, "holds a gpt2 model, .*TextEncoder needs "),
    ],
)
def test_folders_that_are_not_whole(folders, kind, make, tmp_path, missing, changes, message):
    with pytest.raises(UserError, match=message):
        make(broken(folders[kind], tmp_path, missing, **changes))


@pytest.mark.parametrize(("kind", "file"), [("bert", "tokenizer.json"), ("t5", "spiece.model"), ("clip", "tokenizer.json")])
def test_a_model_without_a_tokenizer_is_refused(folders, kind, file, tmp_path):
    with pytest.raises(UserError, match="no tokenizer's vocabulary|not a whole pretrained model"):
        KINDS[kind][0](broken(folders[kind], tmp_path, [file]), max_length=16)


def test_weights_that_lack_a_layer_are_refused(bert, tmp_path):
    folder = broken(bert, tmp_path)
    config = transformers.BertConfig.from_pretrained(folder)
    deeper = copy.deepcopy(config)
    deeper.num_hidden_layers = 3
    deeper.save_pretrained(folder)
    with pytest.raises(UserError, match="lacks weights, such as encoder.layer.2"):
        BertTextEncoder(folder, max_length=16)


@pytest.mark.parametrize("model_type", ["bert", "my_bert"])
def test_no_code_of_the_folder_runs(bert, tmp_path, monkeypatch, model_type):
    folder = broken(bert, tmp_path, evil__py=f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\n")
    config = json.loads(Path(folder, "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoModel": "evil.M", "AutoConfig": "evil.M", "AutoTokenizer": "evil.M"}}
    Path(folder, "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    try:
        BertTextEncoder(folder, max_length=16)
    except UserError:
        assert model_type == "my_bert"
    assert not (tmp_path / "ran").exists()


def test_a_saved_part_does_not_lead_out_of_its_folder(bert, tmp_path):
    save_part(encoder(bert), tmp_path / "text")
    weights = tmp_path / "text/pretrained/model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="model.safetensors: leads out of this folder"):
        load_part(tmp_path / "text")


def test_weights_of_another_architecture_are_refused(folders, tmp_path):
    """As in UMT5, where each layer has position biases of its own."""
    folder = shutil.copytree(folders["t5"], tmp_path / "other")
    state = load_file(folder / "model.safetensors")
    state["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"] = torch.zeros(32, 2)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not T5EncoderModel's: it has weights such as encoder.block.1"):
        T5TextEncoder(str(folder), max_length=16)


def test_a_tokenizer_of_another_kind_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["t5"], tmp_path / "byt5")
    (folder / "spiece.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    config = transformers.T5Config.from_pretrained(folder)
    config.vocab_size = 512
    transformers.T5EncoderModel(config).save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer in .* is none of the tokenizers library"):
        T5TextEncoder(str(folder), max_length=16)


CHANGES = {"bert": {"layer_norm_eps": 0.1}, "t5": {"relative_attention_max_distance": 4}, "clip": {"hidden_act": "gelu"}}


def test_fingerprints_differ_where_states_do(folders, kind, make, tmp_path):
    own = make().fingerprint()
    assert own == make().fingerprint() and make(trainable="all").fingerprint() == own
    text = make()
    text(CAPTIONS)  # which sets the tokenizer's length
    assert text.fingerprint() == own
    folder = shutil.copytree(folders[kind], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | CHANGES[kind]))
    assert not same(make(str(folder))(CAPTIONS), make()(CAPTIONS))
    changed = make(str(folder)).fingerprint()
    assert [key for key in own if own[key] != changed[key]] == ["configuration"]
    for arguments in ({"max_length": 12}, {"layer": -2}, {"mask_padding": False}, {"pretrained": False}):
        assert make(**arguments).fingerprint() != own


@pytest.mark.parametrize("trainable", ["none", "last_1"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_a_saved_encoder_has_the_same_fingerprint_and_can_be_named_as_a_folder(make, tmp_path, trainable, layer):
    text = make(trainable=trainable, layer=layer)
    with torch.no_grad():
        for p in text.network.parameters():
            p.add_(0.01)
    save_part(text, tmp_path / "text")
    assert load_part(tmp_path / "text").fingerprint() == text.fingerprint()
    left = layer if len(text.layers(text.network)) == 3 and text._saved_layer == layer else -1
    frozen = make(str(tmp_path / "text"), layer=left)
    assert frozen.fingerprint() == text.fingerprint() and not list(frozen.parameters())
    assert same(frozen(CAPTIONS), text.eval()(CAPTIONS))


def test_a_folder_that_holds_a_tower_for_images_too(folders, tmp_path):
    text_config = transformers.CLIPTextConfig.from_pretrained(folders["clip"])
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8,
              "patch_size": 4}  # fmt: skip
    told = {key: value for key, value in text_config.to_dict().items() if key != "projection_dim"}
    config = transformers.CLIPConfig(text_config=told, vision_config=vision, projection_dim=10)
    folder = shutil.copytree(folders["clip"], tmp_path / "both")
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    whole = transformers.CLIPModel.from_pretrained(folder).eval()
    rows = transformers.AutoTokenizer.from_pretrained(folder)(CAPTIONS[:1], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = whole.text_projection(whole.text_model(**rows).pooler_output)
    torch.testing.assert_close(ClipTextEncoder(str(folder), max_length=16)(CAPTIONS[:1]).pooled, expected)
