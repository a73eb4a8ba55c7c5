"""Editing: an image of which a part is drawn anew. All of it is `known` tokens (inpainting, outpainting, variation)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nar_t2i.data.images import ImageError, decode_image, fit, upright
from nar_t2i.errors import UserError
from nar_t2i.noise import Noise
from nar_t2i.pixels import to_float
from nar_t2i.types import Known, TokenCodec

OPAQUE = 128  # of 255; pixels of a mask from here on are drawn anew, and of an image with transparency, those below


class Edit(NamedTuple):
    """An image and what of it is drawn anew. image: (3, S, S) uint8. redraw: (S, S) bool."""

    image: Tensor
    redraw: Tensor


def read_edit(image: str | Path, mask: str | Path | None, size: int) -> Edit:
    """The middle square of an image, scaled to `size` pixels, and its mask.

    mask: an image of the same size, light where something new is to come, and dark or transparent elsewhere; None takes what is
    transparent. A pixel of the
    square that holds any such part is drawn anew. Raises UserError where a file does not decode, sizes differ, or there is
    nothing to draw anew.
    """
    pixels = _read(image)
    if mask is None:
        redraw, lightest = _transparent(image), 0
        if redraw is None:
            raise UserError(f"--image {image}: nothing in it is transparent; say with --mask what is to be drawn anew")
    else:
        light = _read(mask).mean(-1)
        redraw, lightest = light >= OPAQUE, round(light.max())
        if (transparent := _transparent(mask)) is not None:  # strokes on a layer of their own
            redraw &= ~transparent
    if redraw.shape != pixels.shape[:2]:
        raise UserError(f"--mask {mask}: {_size(redraw)} pixels, but {image} has {_size(pixels)}")
    fitted = _scaled(redraw, size, Image.Resampling.BOX) > 0  # whatever holds any of it; Lanczos would ring
    if not fitted.any():
        where = (
            " within the middle square"
            if redraw.any()
            else f": what is below {OPAQUE} of 255 is kept, and its lightest is {lightest}"
        )
        raise UserError(f"--image {image}: the mask leaves nothing to be drawn anew{where}")
    return Edit(torch.tensor(_fit_kept(pixels, ~redraw, size)).permute(2, 0, 1), torch.from_numpy(fitted))


def _fit_kept(pixels: np.ndarray, kept: np.ndarray, size: int) -> np.ndarray:
    """As `fit`, but pixels that are kept are made of kept ones alone: Lanczos would mix what goes into what stays."""
    fitted, weight = fit(pixels, size).pixels, _scaled(kept, size, Image.Resampling.LANCZOS)
    of_kept = [_scaled(kept * channel, size, Image.Resampling.LANCZOS) for channel in np.moveaxis(pixels, -1, 0)]
    normalised = (np.stack(of_kept, -1) / np.maximum(weight, 0.1)[..., None]).round().clip(0, 255).astype(np.uint8)
    mixed = (np.abs(weight - 1) > 1e-4) & (weight > 0.1)
    return np.where(mixed[..., None], normalised, fitted)


def _scaled(channel: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """(size, size) float32, the middle square of (H, W), cut out as `fit` does."""
    height, width = channel.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(channel[top : top + side, left : left + side].astype(np.float32))
    return np.asarray(square.resize((size, size), resample))


def read_image(image: str | Path, size: int) -> Tensor:
    """(3, size, size) uint8, the middle square of an image file. Raises UserError where it does not decode."""
    return torch.tensor(fit(_read(image), size).pixels).permute(2, 0, 1)


def known_outside(codec: TokenCodec, edit: Edit, rows: int) -> Known:
    """The tokens of the image that no part of the mask touches, for `rows` pictures. UserError for tokens on no grid."""
    if len(codec.spec.shape) != 2:
        raise UserError("--mask: this model's tokens are no grid, so that a place in the image belongs to no token; "
                        "--variation keeps a share of them all the same")  # fmt: skip
    height, width = codec.spec.shape
    patches = edit.redraw.unfold(0, edit.redraw.shape[0] // height, edit.redraw.shape[0] // height)
    patches = patches.unfold(1, edit.redraw.shape[1] // width, edit.redraw.shape[1] // width)
    kept = ~patches.flatten(2).any(-1).flatten()
    tokens = _tokens(codec, edit.image)
    return Known(kept.to(tokens.device).expand(rows, -1), tokens.expand(rows, *tokens.shape[1:]))


def known_share(codec: TokenCodec, image: Tensor, share: float, noise: Noise) -> Known:
    """All but a share of the image's tokens, other ones for each of the noise's samples. share: of tokens drawn anew, one at
    least."""
    if not 0 < share <= 1:
        raise UserError(f"--variation must be above 0, to 1, not {share}")
    tokens = _tokens(codec, image)
    order = noise.uniform("variation", shape=(codec.spec.length,)).argsort(dim=1).argsort(dim=1)
    kept = order >= max(1, round(share * codec.spec.length))
    return Known(kept, tokens.expand(len(kept), *tokens.shape[1:]))


def composited(images: Tensor, edit: Edit) -> Tensor:
    """(n, 3, S, S) uint8 pictures with the pixels of the image wherever nothing was to be drawn anew."""
    return torch.where(edit.redraw.to(images.device), images, edit.image.to(images.device))


def _tokens(codec: TokenCodec, image: Tensor) -> Tensor:
    """(1, N, …)."""
    weights = next(value for value in codec.state_dict().values() if value.is_floating_point())
    with torch.no_grad():
        return codec.encode(to_float(image[None].to(weights.device)).to(weights.dtype)).tokens


def _read(path: str | Path) -> np.ndarray:
    try:
        return decode_image(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ImageError as error:
        raise UserError(f"{path}: {error}") from error


def _transparent(path: str | Path) -> np.ndarray | None:
    """(H, W), True where an image that decodes is transparent; None where it is nowhere."""
    with Image.open(path) as image:
        if not image.has_transparency_data:
            return None
        found = np.asarray(upright(image).convert("RGBA"))[..., 3] < OPAQUE
    return found if found.any() else None


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} × {array.shape[0]}"
