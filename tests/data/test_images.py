"""Any image that people have becomes upright RGB; any that is broken becomes an error."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nar_t2i.data.images import ImageError, decode_image, fit
from tests.data.making_shards import encoded, pixels


def test_plain_images_come_through_unchanged():
    image = pixels(1)
    assert np.array_equal(decode_image(encoded(image, "PNG")), image)
    assert np.array_equal(decode_image(encoded(image, "WEBP", lossless=True)), image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(orientation, form):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:8, :8] = 255  # a mark in the upper left corner
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    found = decode_image(encoded(stored, form, exif=exif.tobytes(), **({"quality": 95} if form == "JPEG" else {})))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() < 30


def test_transparency_lies_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (255, 0, 0, 255)
    rgba[2:] = (0, 0, 255, 0)
    found = decode_image(encoded(Image.fromarray(rgba)))
    assert np.array_equal(found[0, 0], (255, 0, 0)) and np.array_equal(found[3, 3], (255, 255, 255))
    half = Image.fromarray(np.full((2, 2, 2), (0, 128), np.uint8), "LA")
    assert abs(int(decode_image(encoded(half))[0, 0, 0]) - 127) <= 1


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    assert decode_image(encoded(image)).tolist() == [[[255, 0, 0], [0, 255, 0]]]
    assert decode_image(encoded(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    found = decode_image(encoded(Image.fromarray(grey)))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_known_range_are_errors():
    for array, words in (
        (np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), "floats"),
        (np.full((3, 4), 70_000, np.int32), "to 70000, more than 16 bits"),
        (np.full((3, 4), -1, np.int32), "from -1"),
    ):
        with pytest.raises(ImageError, match=words):
            decode_image(encoded(Image.fromarray(array), "TIFF"), formats=("TIFF",))
    assert decode_image(encoded(Image.fromarray(np.full((3, 4), 257, np.int32)), "TIFF"), formats=("TIFF",))[0, 0, 0] == 1


def test_grey_bilevel_and_cmyk():
    assert decode_image(encoded(Image.new("L", (3, 2), 77))).tolist() == [[[77] * 3] * 3] * 2
    assert decode_image(encoded(Image.new("1", (3, 2), 1)))[0, 0].tolist() == [255] * 3
    cyan = decode_image(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95))
    assert np.abs(cyan[8, 8].astype(int) - (0, 255, 255)).max() < 12


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_unread(size):
    with pytest.raises(ImageError, match="bomb"):
        decode_image(png_that_claims(*size))


def test_the_pixel_limit_is_exact():
    assert decode_image(encoded(pixels(0, 10, 10)), max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match="limit of 99"):
        decode_image(encoded(pixels(0, 10, 10)), max_pixels=99)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_images_are_errors(form):
    whole = encoded(pixels(3, 64, 64), form)
    assert decode_image(whole).shape == (64, 64, 3)
    with pytest.raises(ImageError):
        decode_image(whole[: len(whole) * 2 // 3])


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"not an image at all", encoded(pixels(0), "BMP")])
def test_other_bytes_are_errors(data):
    with pytest.raises(ImageError):
        decode_image(data)


def test_a_crop_alone_copies_pixels():
    image = pixels(5, 8, 14)
    assert np.array_equal(fit(image, 8).pixels, image[:, 3:11])
    assert np.array_equal(fit(image, 8, (0.0, 0.0)).pixels, image[:, :8])
    assert np.array_equal(fit(image, 8, (1.0, 1.0)).pixels, image[:, 6:])
    assert np.array_equal(fit(image, 8, flip=True).pixels, image[:, 3:11][:, ::-1])
    assert np.array_equal(fit(image, 8, (0.0, 0.0), flip=True).pixels, image[:, ::-1][:, 6:])
    assert fit(image, 8, (0.0, 0.0), flip=True).left == 6 and fit(image, 8, (1.0, 1.0), flip=True).left == 0
    assert fit(image, 8, (1.0, 1.0)).left == 6 and fit(image.transpose(1, 0, 2), 8, (1.0, 1.0)).top == 6


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = fit(stripes, 8).pixels.astype(int)
    assert np.abs(small[:, 1:-1] - 127).max() < 12  # nearest neighbour would give 0 or 255


def test_small_images_grow():
    assert fit(pixels(0, 3, 5), 16).pixels.shape == (16, 16, 3)
