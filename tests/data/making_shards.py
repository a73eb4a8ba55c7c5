"""Small real shards for the tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from nar_t2i.prepare.shards import ShardFile


def pixels(number: int, height: int = 12, width: int = 16) -> np.ndarray:
    """(height, width, 3) uint8 noise that depends on the number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_shards(folder: Path, lengths: list[int], captions: int = 1, first: int = 0) -> Path:
    """Shards of PNGs; sample n is `pixels(n)` with captions "caption n.0", "caption n.1" and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for shard, length in enumerate(lengths):
        with ShardFile(folder / f"{shard:05d}.tar") as file:
            for _ in range(length):
                texts = [f"caption {number}.{c}" for c in range(captions)]
                scalars = {"original_width": 16.0, "original_height": 12.0, "score": float(number)}
                file.add(f"s{number:06d}", encoded(pixels(number)), "png", texts, scalars)
                number += 1
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar as somebody else would write it: no index, any members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(key: str, number: int, text: str = "", **fields) -> list[tuple[str, bytes]]:
    """A good sample: an image, its text, and its JSON where fields are given."""
    found = [(f"{key}.png", encoded(pixels(number))), (f"{key}.txt", (text or f"caption {number}").encode())]
    return found + ([(f"{key}.json", json.dumps(fields).encode())] if fields else [])


def hurt_members() -> list[tuple[str, bytes]]:
    """Four good samples, g0 to g3, and one of each kind that cannot be used."""
    image = encoded(pixels(0))
    jpeg = encoded(pixels(0, 64, 64), "JPEG")
    return [
        *members("g0", 0),
        ("broken.jpg", jpeg[: len(jpeg) // 2]),
        ("broken.txt", b"half a jpeg"),
        *members("g1", 1),
        ("wordless.png", image),
        ("empty.png", b""),
        ("empty.txt", b"no bytes"),
        ("latin.png", image),
        ("latin.txt", "Caf\xe9".encode("latin-1")),
        *members("g2", 2),
        ("blank.png", image),
        ("blank.txt", b" \n"),
        ("pictureless.txt", b"only words"),
        ("brace.png", image),
        ("brace.json", b"{"),
        *members("g3", 3),
    ]


HURT = {"broken", "wordless", "empty", "latin", "blank", "pictureless", "brace"}
