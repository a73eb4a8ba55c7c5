"""Features of pictures and captions: what the user's weights get, what is told of them, and what the scene features see."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from nar_t2i.data.captions import RenderedScenes
from nar_t2i.errors import UserError
from nar_t2i.evaluation.features import ClipFeatures, InceptionFeatures, SceneFeatures, resized
from nar_t2i.evaluation.metrics.frechet import frechet_distance, moments
from nar_t2i.evaluation.scene_features import accuracy, loss, shipped_network, train, truth
from tests.text.tiny_models import tiny_clip

CPU = torch.device("cpu")


class Means(torch.nn.Module):
    """Eight numbers of a picture, as it came."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)
        return torch.cat([pooled, x.float().amax((1, 2, 3))[:, None], torch.full((len(x), 1), float(x.shape[-1]))], 1)


class Choosy(torch.nn.Module):
    """As StyleGAN's Inception: uint8 only, and features on request."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8
        return x.float().mean((2, 3)) if return_features else x.float().mean((1, 2, 3))


def saved(module, path):
    torch.jit.script(module).save(str(path))
    return path


def pictures(count=5, side=20):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def means(tmp_path_factory):
    return saved(Means(), tmp_path_factory.mktemp("inception") / "means.pt")


def test_a_module_gets_what_it_is_said_to_take(means, tmp_path):
    images = pictures()
    found = {kind: InceptionFeatures(means, CPU, kind).of_images(images) for kind in ("uint8", "unit", "symmetric")}
    top = images.amax((1, 2, 3)).float()
    torch.testing.assert_close(found["uint8"][:, -2], top)
    torch.testing.assert_close(found["unit"][:, -2], top / 255)
    torch.testing.assert_close(found["symmetric"][:, -2], top / 127.5 - 1)
    assert (found["uint8"][:, -1] == 20).all()
    smaller = InceptionFeatures(means, CPU, "unit", 10, "bilinear").of_images(images)
    assert (smaller[:, -1] == 10).all() and (smaller[:, -2] < found["unit"][:, -2]).all()  # smoothed where it shrinks
    choosy = InceptionFeatures(saved(Choosy(), tmp_path / "choosy.pt"), CPU).of_images(images)
    torch.testing.assert_close(choosy, images.float().mean((2, 3)))


def test_the_protocol_names_the_weights_and_the_resize(means):
    protocol = InceptionFeatures(means, CPU, "unit", 299).protocol
    assert protocol["sha256"] == hashlib.sha256(means.read_bytes()).hexdigest() and protocol["file"] == "means.pt"
    assert protocol["input"] == "unit" and "bicubic" in protocol["resize"] and "299" in protocol["resize"]
    assert InceptionFeatures(means, CPU).protocol["resize"] == "left to the module"
    json.dumps(protocol)


def test_the_resize_is_pillows():
    images = pictures()
    theirs = np.asarray(Image.fromarray(images[2].permute(1, 2, 0).numpy()).resize((11, 11), Image.Resampling.BICUBIC))
    ours = resized(images, 11, "bicubic")[2].permute(1, 2, 0).numpy()
    assert np.abs(ours.clip(0, 255) - theirs).max() < 1.01 and ours.dtype == np.float32  # which Pillow rounds, twice


def test_what_is_no_such_module_is_named(tmp_path, means):
    (tmp_path / "words.pt").write_text("weights")
    with pytest.raises(UserError, match="words.pt: not a TorchScript file"):
        InceptionFeatures(tmp_path / "words.pt", CPU)
    with pytest.raises(UserError, match="absent.pt: not a TorchScript file"):
        InceptionFeatures(tmp_path / "absent.pt", CPU)

    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean()

    with pytest.raises(UserError, match=r"must give \(B, D\) features, and gives \(\) for 5 images"):
        InceptionFeatures(saved(Flat(), tmp_path / "flat.pt"), CPU).of_images(pictures())
    with pytest.raises(UserError, match="choosy.pt: does not take unit images"):
        InceptionFeatures(saved(Choosy(), tmp_path / "choosy.pt"), CPU, "unit").of_images(pictures())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Both towers of a CLIP of a few layers, with its tokenizer and its preprocessing."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder)
    text = transformers.CLIPTextConfig.from_pretrained(folder)
    vision = transformers.CLIPVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                           image_size=16, patch_size=8, projection_dim=12)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    )
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(crop_size={"height": 16, "width": 16}, size={"shortest_edge": 18}, resample=3,
                                             image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])  # fmt: skip
    transformers.CLIPProcessor(images, transformers.AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_clip_embeds_as_transformers_does(clip):
    features, model = ClipFeatures(clip, CPU), transformers.CLIPModel.from_pretrained(clip).eval()
    images, texts = pictures(), ["red", "a red square and a blue circle", "two"]
    seen = [
        Image.fromarray(image).resize((18, 18), Image.Resampling.BICUBIC).crop((1, 1, 17, 17))
        for image in images.permute(0, 2, 3, 1).numpy()
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in seen])).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    codes = transformers.AutoTokenizer.from_pretrained(clip)(texts, padding=True, return_tensors="pt")
    theirs = model(pixel_values=pixels, **codes)
    torch.testing.assert_close(features.of_images(images), theirs.image_embeds)
    torch.testing.assert_close(features.of_texts(texts), theirs.text_embeds)
    torch.testing.assert_close(features.of_texts(texts)[:1], features.of_texts(texts[:1]))  # padding makes no difference
    assert features.of_texts(["red " * 100]).isfinite().all()  # longer than the model reads
    weights = clip / "model.safetensors"
    assert features.protocol["sha256"] == {"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert "18 px, bicubic, centre crop of 16 px" in features.protocol["resize"]


def test_a_clip_folder_of_older_versions_is_read_too(clip, tmp_path):
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    how = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(how))
    assert torch.equal(ClipFeatures(tmp_path, CPU).of_images(pictures()), ClipFeatures(clip, CPU).of_images(pictures()))


def copied(clip, folder, *left_out):
    folder.mkdir()
    for file in clip.iterdir():
        if not file.name.startswith(left_out):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_clip_without_its_tokenizer_is_refused(clip, tmp_path):
    """In whose place transformers has one that knows no word, so that all captions are alike."""
    folder = copied(clip, tmp_path / "clip", "tokenizer", "vocab", "merges", "special")
    with pytest.raises(UserError, match="not a whole folder of a CLIPModel: its tokenizer is not that of its"):
        ClipFeatures(folder, CPU)


def test_a_clip_that_is_cut_off_is_refused(clip, tmp_path):
    folder = copied(clip, tmp_path / "clip")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole folder of a CLIPModel: "):
        ClipFeatures(folder, CPU)


@pytest.mark.parametrize("changed", ["image_mean", "hidden_act", "vocabulary"])
def test_the_protocol_of_a_clip_tells_what_else_decides_the_numbers(clip, tmp_path, changed):
    folder = copied(clip, tmp_path / "clip")
    if changed == "image_mean":
        path = folder / "processor_config.json"
        how = json.loads(path.read_text())
        how["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
        path.write_text(json.dumps(how))
    elif changed == "hidden_act":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["hidden_act"] = "relu"
        (folder / "config.json").write_text(json.dumps(config))
    else:
        path = folder / "tokenizer.json"
        words = json.loads(path.read_text())
        one, other = list(words["model"]["vocab"])[:2]
        vocabulary = words["model"]["vocab"]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        path.write_text(json.dumps(words))
    assert ClipFeatures(folder, CPU).protocol | {"folder": ""} != ClipFeatures(clip, CPU).protocol | {"folder": ""}
    assert ClipFeatures(copied(clip, tmp_path / "same"), CPU).protocol | {"folder": ""} == ClipFeatures(clip, CPU).protocol | {
        "folder": ""
    }


def without(part):
    """Spoils a folder: its weights lack a part."""

    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        save_file({name: value for name, value in weights.items() if not name.startswith(part)}, folder / "model.safetensors")

    return spoil


def wider(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"text_projection.weight": torch.zeros(13, weights["text_projection.weight"].shape[1])},
        folder / "model.safetensors",
    )


def test_clip_is_computed_in_fp32_whatever_it_is_stored_as(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "half")
    transformers.CLIPModel.from_pretrained(clip).half().save_pretrained(tmp_path / "half")
    features = ClipFeatures(tmp_path / "half", CPU)
    assert {p.dtype for p in features._model.parameters()} == {torch.float32} and features.protocol["precision"] == "fp32"
    torch.testing.assert_close(features.of_images(pictures()), ClipFeatures(clip, CPU).of_images(pictures()), rtol=0.01, atol=0.01)


def test_features_that_are_not_finite_are_refused(clip, tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean((2, 3)) / 0

    with pytest.raises(UserError, match=r"--inception .*nothing.pt: gives features that are not finite"):
        InceptionFeatures(saved(Nothing(), tmp_path / "nothing.pt"), CPU).of_images(pictures())
    features = ClipFeatures(clip, CPU)
    torch.nn.init.constant_(features._model.visual_projection.weight, float("inf"))
    with pytest.raises(UserError, match="--clip .*: gives features that are not finite"):
        features.of_images(pictures())


@pytest.mark.parametrize("spoil, said", [
    (without("vision_model."), "not a whole folder of a CLIPModel: has no vision_model"),
    (without("visual_projection"), "not a whole folder of a CLIPModel: has no visual_projection"),
    (without("text_model."), "not a whole folder of a CLIPModel: has no text_model"),
    (wider, "not a whole folder of a CLIPModel: has no text_projection.weight as its config.json describes it"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors"),
    (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json: No such file"),
    (lambda folder: (folder / "processor_config.json").write_text("{}"), "not a whole folder of a CLIPModel"),
    (lambda folder: (folder / "processor_config.json").write_text("[]"), "not a whole folder of a CLIPModel"),
    (lambda folder: (folder / "config.json").unlink(), "not a whole folder of a CLIPModel"),
])  # fmt: skip
def test_a_clip_folder_that_is_not_whole_is_named(clip, tmp_path, spoil, said):
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(UserError, match=said):
        ClipFeatures(tmp_path, CPU)
    with pytest.raises(UserError, match="no such folder"):
        ClipFeatures(tmp_path / "absent", CPU)


# ---- features of scenes ----------------------------------------------------------------------------------------------


def scenes(seed, count, split="validation"):
    source = RenderedScenes(split, count, seed=seed)
    return torch.from_numpy(np.stack([source.read(index).image for index in range(count)])).permute(0, 3, 1, 2)


def test_the_shipped_network_tells_what_scenes_hold():
    shares = accuracy(shipped_network(), 500)
    assert min(shares[kind] for kind in ("colors", "shapes", "background")) > 0.98
    assert shares["kinds"] > 0.7 and shares["places"] > 0.8
    size = sum(value.numel() * 2 for value in shipped_network().state_dict().values())
    assert size < 2**20


def test_the_distance_orders_scenes_rightly():
    """Other real scenes are nearest, a little blur is farther, more blur and noise, colours exchanged and pieces shuffled far."""
    features, count = SceneFeatures(CPU), 400
    real, other = scenes(0, count), scenes(1, count)
    reference = moments(features.of_images(real))

    def distance(images):
        return frechet_distance(*reference, *moments(features.of_images(images)))

    def blurred(radius):
        rows = [
            np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
            for image in other.permute(0, 2, 3, 1).numpy()
        ]
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)

    def shuffled(pieces):
        side, generator = 64 // pieces, torch.Generator().manual_seed(0)
        parts = other.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)  # (n, 3, pieces², side, side)
        order = torch.stack([torch.randperm(pieces**2, generator=generator) for _ in range(count)])
        parts = torch.gather(parts, 2, order[:, None, :, None, None].expand_as(parts)).unflatten(2, (pieces, pieces))
        return parts.permute(0, 1, 2, 4, 3, 5).reshape(count, 3, 64, 64)

    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    floor = distance(other)
    blur = [distance(blurred(radius)) for radius in (0.5, 1, 2)]
    noisy = [distance((other + strength * noise).round().clamp(0, 255).byte()) for strength in (5, 15)]
    pieces = [distance(shuffled(number)) for number in (4, 16)]
    colors = distance(other[:, [1, 2, 0]])
    assert distance(real) < 1e-4 < floor < blur[0] < blur[1] < blur[2]
    assert floor < noisy[0] < noisy[1] and 3 * floor < pieces[0] < pieces[1] and 2 * floor < colors


def test_pictures_of_another_size_are_brought_to_the_networks():
    small = scenes(0, 4)
    large = torch.from_numpy(np.stack([RenderedScenes("validation", 4, image_size=256).read(i).image for i in range(4)]))
    features = SceneFeatures(CPU)
    a, b = features.of_images(small), features.of_images(large.permute(0, 3, 1, 2))
    assert a.shape == (4, 64) and (a - b).norm() < 0.3 * (a - a.roll(1, 0)).norm()
    assert "not Inception" in features.protocol["network"] and len(features.protocol["weights_hash"]) == 64


def test_training_is_reproducible_and_learns():
    one, two = (train(256, 2, seed=3, log=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    source = RenderedScenes("all", 64, seed=1003)
    images, wanted = (
        torch.from_numpy(np.stack([source.read(i).image for i in range(64)])).permute(0, 3, 1, 2),
        truth([source.scene(i) for i in range(64)]),
    )
    longer = train(256, 8, seed=3, log=False)
    assert loss(longer.answers(longer(images)), wanted) < loss(one.answers(one(images)), wanted)
    assert torch.cat([longer(rows) for rows in images.split(16)]).std(0).mean() == pytest.approx(1, abs=0.3)
