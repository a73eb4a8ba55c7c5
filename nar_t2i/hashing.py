"""Names for what weights and texts hold, to tell whether two are the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn


def weights_hash(module: nn.Module) -> str:
    """sha256 of a module's weights and buffers: names, types, shapes and values. The same on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def text_hash(text: str | bytes) -> str:
    """sha256 of a text in UTF-8; of what is no UTF-8, of its bytes as they came."""
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")).hexdigest()


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
