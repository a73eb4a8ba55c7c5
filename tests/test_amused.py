"""aMUSEd's weights in diffusers' layout, imported: the same tokens and pictures as diffusers' own pipeline, given the same
draws.
"""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from benchmarks.amused import one_table
from nar_t2i.cli import main
from nar_t2i.inference import Confidence
from nar_t2i.learning import Masked
from nar_t2i.networks import UVit
from nar_t2i.noise import Noise
from nar_t2i.parts import changed
from nar_t2i.pipeline import TextToImage
from nar_t2i.text import ClipTextEncoder
from nar_t2i.training import GeneratorModule
from nar_t2i.training.init_from import load_weights
from tests.text.tiny_models import LETTERS

PROMPTS = ["a red circle", "two blue squares on the red circle, and more than fits into its length", "b"]
NEGATIVE = ["a blue one", "red", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of 6 × 6 tokens with random weights, saved as the published ones are."""
    torch.manual_seed(0)
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "re", "red</w>", "!", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: code for code, piece in enumerate(pieces)}
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")], pad_token="!", model_max_length=20
    )
    text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, projection_dim=12,
        max_position_embeddings=20, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, pad_token_id=vocabulary["!"],
    )).eval()  # fmt: skip
    for p in text.parameters():  # transformers begins so near to zero that all captions are alike
        torch.nn.init.normal_(p, std=0.3)
    vq = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 32),
        latent_channels=8, num_vq_embeddings=64, norm_num_groups=8, mid_block_add_attention=False, lookup_from_codebook=True,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(vq.quantize.embedding.weight, std=0.4)
    network = diffusers.UVit2DModel(
        hidden_size=32, in_channels=24, block_out_channels=24, block_num_heads=2, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=64, num_res_blocks=1, codebook_size=64, vocab_size=72, cond_embed_dim=12, encoder_hidden_size=16,
        micro_cond_encode_dim=8, micro_cond_embed_dim=40, sample_size=6,
    ).eval()  # fmt: skip
    for name, p in network.named_parameters():
        if name.endswith((".gamma", ".beta")):
            torch.nn.init.normal_(p, std=0.1)
    network.mlm_layer.conv2.weight.data.mul_(3)
    folder = tmp_path_factory.mktemp("published") / "amused"
    scheduler = diffusers.AmusedScheduler(mask_token_id=71)
    diffusers.AmusedPipeline(vq, tokenizer, text, network, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    out = folder.parent / "model"
    assert main(["import", str(folder), str(out)]) == 0
    assert not list(folder.parent.glob("*.part"))
    return out


@pytest.fixture
def t2i(model):
    return TextToImage.from_pretrained(model)


def theirs(folder, output, **arguments):
    pipeline = diffusers.AmusedPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with one_table(Noise(0, torch.arange(len(PROMPTS))), 36):
        images = pipeline(PROMPTS, output_type=output, **arguments).images
    return images.flatten(1) if output == "latent" else torch.from_numpy(images)


@pytest.mark.parametrize("ours, of_theirs", [
    ({}, {}),
    ({"negative_prompts": NEGATIVE}, {"negative_prompt": NEGATIVE}),
    ({"steps": 7, "guidance_scale": 3.0}, {"num_inference_steps": 7, "guidance_scale": 3.0}),
    ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
])  # fmt: skip
def test_the_same_tokens_from_one_table(folder, t2i, ours, of_theirs):
    drawn = t2i.sample(PROMPTS, **ours)
    assert torch.equal(drawn.tokens, theirs(folder, "latent", **of_theirs))
    assert drawn.passes == ours.get("steps", 12)
    assert len(drawn.tokens.unique()) > 8 and not torch.equal(drawn.tokens[0], drawn.tokens[2])


def test_the_same_pictures(folder, t2i):
    levels = (theirs(folder, "np") * 255).permute(0, 3, 1, 2)
    assert levels.std() > 5
    assert (t2i.sample(PROMPTS).images - levels).abs().max() <= 0.51  # rounded


def test_pictures_become_the_codes_of_their_own(folder, t2i):
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vq = diffusers.VQModel.from_pretrained(folder / "vqvae").eval()
    with torch.no_grad():
        latents = vq.encode((images + 1) / 2).latents
        quantized, _, (*_, codes) = vq.quantize(latents)
    encoded = t2i.tokenizer.encode(images)
    assert torch.equal(encoded.tokens, codes.view(2, 36)) and len(codes.unique()) > 4
    torch.testing.assert_close(encoded.error, (latents - quantized).square().sum(1).flatten(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t2i.tokenizer.code_vectors(), vq.quantize.embedding.weight.detach())


def test_control_each_difference_from_our_own_training_counts(folder, t2i):
    expected = theirs(folder, "latent")
    for name, value in (("final_norm", True), ("mask_padding", True), ("layer", -3)):
        kept = getattr(t2i.text, name)
        setattr(t2i.text, name, value)
        assert not torch.equal(t2i.sample(PROMPTS).tokens, expected), name
        setattr(t2i.text, name, kept)
    amused = t2i.inference
    t2i.inference = Confidence(12, choice_temperature=2.0)  # another luck, and one token more after the eighth pass
    assert not torch.equal(t2i.sample(PROMPTS).tokens, expected)
    t2i.inference = amused
    assert torch.equal(t2i.sample(PROMPTS).tokens, expected)
    t2i.network.micro_conditions["original_width"] = 256.0  # pixels of the published ones, which are not this one's
    assert not torch.equal(t2i.sample(PROMPTS).tokens, expected)
    t2i.network.micro_conditions["original_width"] = 12.0
    torch.nn.init.zeros_(t2i.null.states[0])
    assert not torch.equal(t2i.sample(PROMPTS).tokens, expected)


def test_a_training_starts_from_it(model, t2i):
    """As docs/text-encoders.md says: the same parts, and weights for all of them."""
    text = ClipTextEncoder(str(model / "text"), layer=-2, max_length=20, mask_padding=False, final_norm=False)
    network = t2i.network._described_args
    module = GeneratorModule(
        str(model / "tokenizer"), text, lambda spec, widths: UVit(**{**network, "spec": spec, "text_widths": widths}),
        Masked(), null_length=20,
    )  # fmt: skip
    report = load_weights(module, model)
    assert not report.missing and not report.wrong_shape and not report.resized
    assert torch.equal(module.null.states[0], t2i.null.states[0]) and module.null.states[0].requires_grad
    begun = TextToImage(module.codec, module.text, module.null, module.network, t2i.inference, t2i.guidance)
    assert torch.equal(begun.sample(PROMPTS).tokens, t2i.sample(PROMPTS).tokens)


def spoilt(folder, tmp_path, file, change):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    if change is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    return copy


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("model_index.json", None, "model_index.json: No such file"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline"},
            "a StableDiffusionPipeline; of diffusers' pipelines only aMUSEd's",
        ),
        ("transformer/diffusion_pytorch_model.safetensors", None, "transformer/diffusion_pytorch_model.safetensors: No such file"),
        ("vqvae/diffusion_pytorch_model.safetensors", None, "vqvae/diffusion_pytorch_model.safetensors: No such file"),
        ("vqvae/config.json", {"num_vq_embeddings": 32}, "vqvae/diffusion_pytorch_model.safetensors: Error"),
        ("vqvae/config.json", {"norm_num_groups": 7}, "not the configuration of a VQModel"),
        ("scheduler/scheduler_config.json", {"mask_token_id": 70}, "mask_token_id is 70, and transformer's last code is 71"),
        ("scheduler/scheduler_config.json", {"masking_schedule": "sqrt"}, "masking_schedule is sqrt"),
        ("text_encoder/model.safetensors", None, "is not a whole pretrained model"),
        (
            "text_encoder/config.json",
            {"projection_dim": 14},
            "text_encoder,tokenizer}: text_projection.weight has the shape (12, 16)",
        ),
        ("transformer/config.json", {"cond_embed_dim": 14}, "cond_embed.linear_1.weight makes vector.0.weight of the shape"),
        ("tokenizer/tokenizer.json", None, "holds no tokenizer's vocabulary"),
    ],
)
def test_a_folder_that_is_not_whole_is_one_error(folder, tmp_path, capsys, file, change, message):
    copy = spoilt(folder, tmp_path, file, change)
    assert main(["import", str(copy), str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1, error
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("*.part"))


def test_a_linear_schedule_is_taken_over(folder, tmp_path):
    copy = spoilt(folder, tmp_path, "scheduler/scheduler_config.json", {"masking_schedule": "linear"})
    assert main(["import", str(copy), str(tmp_path / "model")]) == 0
    t2i = TextToImage.from_pretrained(tmp_path / "model")
    assert torch.equal(t2i.sample(PROMPTS).tokens, theirs(copy, "latent"))
    assert t2i.inference.schedule == "linear" and changed(t2i.inference, steps=3).schedule == "linear"


def test_a_folder_with_something_in_it_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").touch()
    assert main(["import", str(folder), str(tmp_path / "model")]) == 2
    assert "not an empty folder" in capsys.readouterr().err and [*tmp_path.iterdir()] == [tmp_path / "model"]


def test_without_diffusers_the_error_says_what_to_install(model, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert main(["generate", "--model", str(model), "--prompt", "a"]) == 2
    assert "pip install 'nar-t2i[amused]'" in capsys.readouterr().err
