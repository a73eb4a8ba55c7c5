"""Editing through `nar-t2i generate`: what is kept, what is drawn anew, and what its mistakes print."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nar_t2i.cli import main
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.editing import known_outside, known_share, read_edit, read_image
from nar_t2i.errors import UserError
from nar_t2i.generate import shipped_model
from nar_t2i.noise import Noise
from nar_t2i.pipeline import TextToImage


@pytest.fixture(scope="module")
def codec():
    return TextToImage.from_pretrained(shipped_model()).tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(RenderedScenes("validation", 8).read(3).image).save("scene.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:30, 8:16] = 255  # rows 20 to 29 touch patches of rows 2 and 3, columns 8 to 15 are patch 1 exactly
    Image.fromarray(mask).save("mask.png")
    return tmp_path


def generate(*arguments):
    shutil.rmtree("out", ignore_errors=True)
    return main(["generate", "--prompt", "a red circle", "--steps", "4", "--out", "out", *arguments])


def drawn():
    return np.asarray(Image.open(next(Path("out").glob("*-a-red-circle.png"))))


def test_a_mask_reaches_every_token_that_it_touches(codec):
    edit = read_edit("scene.png", "mask.png", 64)
    known = known_outside(codec, edit, 2)
    redrawn = (~known.mask[0]).view(8, 8).nonzero().tolist()
    assert redrawn == [[2, 1], [3, 1]] and torch.equal(known.mask[0], known.mask[1])
    assert edit.redraw.sum() == 80


def test_pixels_outside_of_the_mask_are_kept(codec):
    scene, redraw = np.asarray(Image.open("scene.png")), np.asarray(Image.open("mask.png")) > 0
    assert generate("--image", "scene.png", "--mask", "mask.png") == 0
    assert np.array_equal(drawn()[~redraw], scene[~redraw])
    everything = Image.new("L", (64, 64), 255)
    everything.save("all.png")
    assert generate("--image", "scene.png", "--mask", "all.png") == 0
    anew = drawn()
    assert not np.array_equal(anew, scene)
    assert main(["generate", "--prompt", "a red circle", "--steps", "4", "--out", "free"]) == 0
    assert np.array_equal(anew, np.asarray(Image.open(next(Path("free").glob("0000-*.png")))))  # as without an image


def test_what_is_transparent_is_painted(codec):
    """Outpainting: a picture in the middle of an empty canvas."""
    canvas = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    canvas.paste(Image.open("scene.png").convert("RGBA"), (32, 32))
    canvas.save("canvas.png")
    edit = read_edit("canvas.png", None, 64)
    inner = edit.redraw[17:47, 17:47]
    assert not inner.any() and edit.redraw[:15].all() and edit.redraw[:, 49:].all()
    assert generate("--image", "canvas.png") == 0
    kept = ~edit.redraw.numpy()
    assert np.array_equal(drawn()[kept], edit.image.permute(1, 2, 0).numpy()[kept])


def test_strokes_on_a_transparent_layer_are_a_mask(codec):
    layer = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (8, 20, 16, 30))
    layer.save("layer.png")
    assert torch.equal(read_edit("scene.png", "layer.png", 64).redraw, read_edit("scene.png", "mask.png", 64).redraw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_type_read_images_too(dtype):
    t2i = TextToImage.from_pretrained(shipped_model()).to(dtype=dtype)
    known = known_outside(t2i.tokenizer, read_edit("scene.png", "mask.png", 64), 1)
    assert t2i.sample("a red circle", known=known).tokens[known.mask].equal(known.tokens[known.mask])


@pytest.mark.parametrize("side", [64, 96, 160])
def test_what_stands_under_the_mask_does_not_reach_what_is_kept(side):
    """A plain square in another plain one stays plain to its edge, whatever scaling mixes."""
    pixels, mask = np.full((side, side + 10, 3), 255, np.uint8), np.full((side, side + 10), 255, np.uint8)
    inside = np.s_[side // 6 : -(side // 6), side // 3 : -(side // 3)]
    pixels[inside], mask[inside] = (90, 40, 80), 0
    Image.fromarray(pixels).save("plain.png"), Image.fromarray(mask).save("plain-mask.png")
    edit = read_edit("plain.png", "plain-mask.png", 64)
    kept = edit.image.permute(1, 2, 0)[~edit.redraw]
    assert len(kept) > 500 and torch.equal(kept.unique(dim=0), torch.tensor([[90, 40, 80]], dtype=torch.uint8))
    assert (edit.image.permute(1, 2, 0)[edit.redraw] == 255).all(1).float().mean() > 0.7


def test_far_from_the_mask_an_image_is_scaled_as_any_other():
    large = np.asarray(Image.open("scene.png").resize((150, 100), Image.Resampling.BICUBIC))
    mask = np.zeros((100, 150), np.uint8)
    mask[:20, 40:60] = 255
    Image.fromarray(large).save("large.png"), Image.fromarray(mask).save("large-mask.png")
    edit, plain = read_edit("large.png", "large-mask.png", 64), read_image("large.png", 64)
    assert torch.equal(edit.image[:, 20:], plain[:, 20:]) and torch.equal(edit.image[:, :, 30:], plain[:, :, 30:])
    assert not torch.equal(edit.image, plain)
    mask[:] = 0
    mask[:, :20] = 255  # beside the middle square
    Image.fromarray(mask).save("large-mask.png")
    with pytest.raises(UserError, match="nothing to be drawn anew within the middle square"):
        read_edit("large.png", "large-mask.png", 64)


def test_a_variation_keeps_a_share_of_the_tokens(codec):
    image = torch.tensor(np.asarray(Image.open("scene.png"))).permute(2, 0, 1)
    for share in (0.25, 0.75):
        known = known_share(codec, image, share, Noise(0, torch.arange(200)))
        assert (~known.mask).float().mean() == pytest.approx(share, abs=0.02)
        assert (known.mask[0] != known.mask[1]).any()
    assert generate("--image", "scene.png", "--variation", "0.3") == 0
    near = drawn()
    assert generate("--image", "scene.png", "--variation", "1.0") == 0
    assert generate("--image", "scene.png", "--variation", "1.0", "--seed", str(2**63 - 1)) == 0
    far = drawn()
    scene = np.asarray(Image.open("scene.png")).astype(float)
    assert np.abs(near - scene).mean() < np.abs(far - scene).mean()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--mask", "mask.png"], "need --image"),
        (["--variation", "0.5"], "need --image"),
        (["--image", "scene.png"], "nothing in it is transparent"),
        (["--image", "none.png", "--mask", "mask.png"], "none.png: No such file"),
        (["--image", "scene.png", "--mask", "broken.png"], "broken.png: does not decode"),
        (["--image", "scene.png", "--mask", "small.png"], "32 × 32 pixels, but scene.png has 64 × 64"),
        (["--image", "scene.png", "--mask", "black.png"], "nothing to be drawn anew"),
        (["--image", "scene.png", "--mask", "mask.png", "--variation", "0.5"], "not both"),
        (["--image", "scene.png", "--variation", "1.5"], "above 0, to 1"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, arguments, reason):
    Path("broken.png").write_bytes(b"no picture")
    Image.new("L", (32, 32), 255).save("small.png")
    Image.new("L", (64, 64)).save("black.png")
    assert generate(*arguments) == 2
    told = capsys.readouterr()
    assert reason in told.err and told.err.count("\n") == 1


def test_tokens_on_no_grid_have_no_places(codec):
    from tests.toys import ToyCodec

    with pytest.raises(UserError, match="no grid"):
        known_outside(ToyCodec("continuous"), read_edit("scene.png", "mask.png", 16), 1)
