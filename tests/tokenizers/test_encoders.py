"""What the encoders that see each token's own pixels alone make of them."""

import pytest
import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.tokenizers.convolutional import LocalEncoder, OutlineEncoder, PatternEncoder
from nar_t2i.tokenizers.vqgan import VQGAN


def disc(size: int, inside: tuple[float, float, float], outside: tuple[float, float, float]) -> Tensor:
    """(1, 3, size, size), an anti-aliased disc in the upper left corner."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    covered = (0.7 * size - torch.hypot(x, y) + 0.5).clamp(0, 1)
    colors = [torch.tensor(c).view(3, 1, 1) for c in (inside, outside)]
    return (covered * colors[0] + (1 - covered) * colors[1]).unsqueeze(0)


RED, BLUE, WHITE, BLACK = (0.8, -0.8, -0.8), (-0.7, -0.5, 0.8), (0.9, 0.9, 0.9), (-0.9, -0.9, -0.9)


def described(encoder: LocalEncoder, image: Tensor) -> Tensor:
    return encoder.describe(encoder.fold(image)).flatten()


def test_a_pattern_is_the_same_in_all_colours() -> None:
    pattern, pixels = (kind(8, 16, 1, 4) for kind in (PatternEncoder, LocalEncoder))
    pictures = [disc(8, RED, WHITE), disc(8, BLUE, WHITE), disc(8, RED, BLACK), disc(8, WHITE, BLUE)]
    first = described(pattern, pictures[0])
    for picture in pictures[1:]:
        assert (described(pattern, picture) - first).abs().max() < 0.2
        assert (described(pixels, picture) - described(pixels, pictures[0])).abs().max() > 1  # the control: colours


def test_an_outline_keeps_no_trace_of_its_colours() -> None:
    pictures = [disc(8, RED, WHITE), disc(8, BLUE, WHITE), disc(8, RED, BLACK), disc(8, WHITE, BLUE)]
    outline, pattern = ([described(kind(8, 16, 1, 4), p) for p in pictures] for kind in (OutlineEncoder, PatternEncoder))
    assert all((found - outline[0]).abs().max() < 0.005 for found in outline[1:])
    assert max((found - pattern[0]).abs().max() for found in pattern[1:]) > 0.05  # the control: four times as much


@pytest.mark.parametrize("pixels", [0, 1, OutlineEncoder.SPECK - 1, OutlineEncoder.SPECK])
def test_a_speck_leaves_a_patch_plain(pixels: int) -> None:
    encoder = OutlineEncoder(8, 16, 1, 4)
    image = disc(8, RED, RED)
    image[0, :, 0, :pixels] = torch.tensor(WHITE).unsqueeze(1)
    plain = torch.cat([torch.zeros(64), 4 * torch.tensor(RED)])
    assert torch.allclose(described(encoder, image), plain, atol=1e-5) == (pixels < OutlineEncoder.SPECK)


@pytest.mark.parametrize("kind", [PatternEncoder, OutlineEncoder])
def test_another_outline_is_another_pattern(kind: type[LocalEncoder]) -> None:
    encoder = kind(8, 16, 1, 4)
    upright = disc(8, RED, WHITE)
    assert (described(encoder, upright) - described(encoder, upright.flip(-1))).abs().max() > 0.8


@pytest.mark.parametrize(("kind", "scale"), [(PatternEncoder, 2), (OutlineEncoder, 4)])
def test_plain_patches_are_told_apart_by_their_colour(kind: type[LocalEncoder], scale: int) -> None:
    encoder = kind(8, 16, 1, 4)
    red, blue = (described(encoder, disc(8, c, c)) for c in (RED, BLUE))
    assert red[:64].abs().max() < 1e-3 and blue[:64].abs().max() < 1e-3
    assert torch.allclose(red[64:], scale * torch.tensor(RED), atol=1e-2)
    assert torch.allclose(blue[64:], scale * torch.tensor(BLUE), atol=1e-2)


@pytest.mark.parametrize("kind", [PatternEncoder, OutlineEncoder])
def test_gradients_are_finite_on_plain_and_on_patterned_patches(kind: type[LocalEncoder]) -> None:
    encoder = kind(8, 16, 1, 4)
    images = torch.cat([torch.full((1, 3, 8, 8), 0.5), disc(8, RED, WHITE)]).requires_grad_()
    encoder(images).square().sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("kind", [PatternEncoder, OutlineEncoder])
def test_a_latent_depends_on_its_own_patch_alone(kind: type[LocalEncoder]) -> None:
    encoder = kind(8, 16, 1, 4)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = images.clone()
    changed[:, :, :8, :8] = 0.5
    before, after = encoder(images), encoder(changed)
    assert torch.equal(before[..., 1:], after[..., 1:]) and torch.equal(before[..., 1, :], after[..., 1, :])
    assert not torch.equal(before[..., 0, 0], after[..., 0, 0])


def test_an_outline_needs_enough_pixels() -> None:
    with pytest.raises(UserError, match="encoder outline needs 6 pixels a token or more, not 4"):
        VQGAN(image_size=8, channels=(16,), patch=2, encoder="outline")
