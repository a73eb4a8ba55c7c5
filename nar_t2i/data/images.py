"""Encoded images → RGB pixels, and pixels → the square that a model sees."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 26  # 67 megapixels; a few kilobytes can claim billions, which is how decompression bombs work
FORMATS = ("JPEG", "PNG", "WEBP")


class ImageError(ValueError):
    """Bytes that are not a usable image; the message says why."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> np.ndarray:
    """Encoded bytes → (H, W, 3) uint8 RGB, upright, on white where the image is transparent.

    formats: those of Pillow that may be tried. Raises ImageError for anything that does not decode completely.
    """
    if not data:
        raise ImageError("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} × {height} pixels exceed the limit of {max_pixels} (a decompression bomb?)")
            image.load()
            return np.asarray(to_rgb(upright(image)))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"does not decode: not a {', '.join(formats)} file") from error
    except Exception as error:  # Pillow's decoders raise a dozen types, and struct.error, SyntaxError and zlib.error
        raise ImageError(f"does not decode: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """Rotate as the EXIF orientation says; metadata that cannot be parsed says nothing."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # which would be copied
    except Exception:  # broken EXIF blocks are common, raise many types, and do not harm the pixels
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes → RGB. ImageError for pixels whose range nothing tells: floats, and integers beyond 16 bits."""
    if image.mode == "F":
        raise ImageError("its pixels are floats, whose range nothing tells")
    if image.mode.startswith("I"):
        # 16-bit greyscale; Pillow's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"its pixels are integers from {grey.min()} to {grey.max()}, more than 16 bits")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


class Fitted(NamedTuple):
    """pixels: (size, size, 3) uint8. top, left: where the crop lies, in pixels of the resized image, mirrored where that is."""

    pixels: np.ndarray
    top: float
    left: float


def fit(pixels: np.ndarray, size: int, place: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> Fitted:
    """Resize the shorter side to `size` (antialiased Lanczos) and crop the longer one.

    pixels: (H, W, 3) uint8. place: vertical and horizontal place of the crop in [0, 1]; 0.5 is the centre.
    flip: mirror left and right.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = place[0] * (height - side), place[1] * (width - side)
    if place == (0.5, 0.5):
        top, left = float(int(top)), float(int(left))  # whole pixels: a crop alone then copies them exactly
    if (height, width) != (size, size):
        image = Image.fromarray(pixels)
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        pixels = np.asarray(image)
    if flip:
        pixels, left = pixels[:, ::-1], width - side - left
    return Fitted(pixels, top * size / side, left * size / side)
