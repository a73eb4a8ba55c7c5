"""What caches and indices are read from: arrays in a safetensors file, in place through a memory map, and a manifest."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from nar_t2i.errors import UserError

_DTYPES = {"I64": np.int64, "I32": np.int32, "U16": np.uint16, "U8": np.uint8, "I8": np.int8, "F32": np.float32, "F16": np.float16}


class Arrays:
    """The arrays of a file's bytes, as views of `buffer`, which may be a memory map.

    metadata: the file's own texts. start: where each array begins, in bytes. Raises ValueError, KeyError or struct.error
    for bytes that are no such file.
    """

    def __init__(self, buffer: bytes | mmap.mmap):
        (header_size,) = struct.unpack("<Q", buffer[:8])
        header = json.loads(buffer[8 : 8 + header_size])
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.start = {name: 8 + header_size + entry["data_offsets"][0] for name, entry in header.items()}
        self._arrays = {}
        for name, entry in header.items():
            count, dtype = int(np.prod(entry["shape"], dtype=np.int64)), _DTYPES[entry["dtype"]]
            array = np.frombuffer(buffer, dtype, count, self.start[name]) if count else np.empty(0, dtype)
            self._arrays[name] = array.reshape(entry["shape"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]


def read_manifest(folder: Path, name: str, version: int, command: str) -> dict[str, Any]:
    """The manifest of a cache, which its command writes last. Raises UserError where it is missing, or of another format."""
    path = folder / name
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is no finished cache: {name} is missing; run {command}") from error
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != version:
        raise UserError(f"{path} has format {found}, this version reads {version}; encode anew")
    return manifest


def open_map(path: Path) -> mmap.mmap:
    """Raises OSError, and ValueError for an empty file."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
