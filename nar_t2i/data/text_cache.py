"""Reading a text cache: what a frozen text encoder made of every caption of a source, so that training runs no encoder.

    text.json               what made it, of which data, how it is stored, and how far off that is; written last
    <block>.captions.safetensors    for each sample of the source's block, the numbers of its captions
    00000.text.safetensors          the states of captions 0 to `shard` − 1, one behind the other; and so on

Captions are numbered in the order in which they first occur, so that one that many images share is stored once.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nar_t2i.data.arrays import Arrays, open_map, read_manifest
from nar_t2i.data.source import Source, SourceAround
from nar_t2i.errors import UserError
from nar_t2i.types import Condition

FORMAT = 1
MANIFEST = "text.json"
OPEN_FILES = 128
Stored = Literal["float32", "float16", "bfloat16", "int8"]


class Packed(NamedTuple):
    """Rows of states as they are stored. scale: (T, 1) of int8, by row; else None."""

    values: np.ndarray
    scale: np.ndarray | None


def pack_states(states: Tensor, stored: Stored) -> Packed:
    """(T, D) float32 → what is stored: halves, bfloat16's bits as uint16, or int8 with one scale a row. UserError where states
    are too large for halves, or are no numbers.
    """
    if not states.isfinite().all():
        raise UserError("the text encoder gives states that are not finite")
    if stored == "int8":
        scale = states.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return Packed((states / scale).round().to(torch.int8).numpy(), scale.numpy())
    if stored == "bfloat16":
        return Packed(states.to(torch.bfloat16).view(torch.uint16).numpy(), None)
    values = states.to(getattr(torch, stored))
    if not values.isfinite().all():
        raise UserError(f"states of up to {states.abs().max():.3g} do not fit {stored}; encode with --dtype bfloat16")
    return Packed(values.numpy(), None)


def unpack_states(packed: Packed, stored: Stored) -> Tensor:
    """The inverse: (T, D), float32 for int8, else of the stored type."""
    values = torch.from_numpy(packed.values)
    if stored == "int8":
        return values.float() * torch.from_numpy(packed.scale)
    return values.view(torch.bfloat16) if stored == "bfloat16" else values


class TextCache:
    """A text cache, opened for reading. Raises UserError where it is missing, unfinished or of another format."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, MANIFEST, FORMAT, "encode_text")
        self.blocks: list[dict[str, Any]] = self.manifest["blocks"]
        self._starts = np.cumsum([0, *(block["length"] for block in self.blocks)])
        self._files: OrderedDict[str, Arrays] = OrderedDict()

    def check(self, source: Source | None = None, encoder: dict[str, str] | None = None) -> None:
        """Raise a UserError that says what differs from the data or the text encoder that the caller expects.

        encoder: its fingerprint, see `TextEncoder`.
        """
        if encoder is not None:
            made_by = self.manifest["encoder"]
            differing = [key for key in {**made_by, **encoder} if made_by.get(key) != encoder.get(key)]
            if differing:
                told = "; ".join(f"{key}: {_short(made_by.get(key))} there, {_short(encoder.get(key))} here" for key in differing)
                raise UserError(f"the text cache {self.folder} was made by another text encoder ({told}); encode anew")
        if source is not None:
            if len(source.blocks) != len(self.blocks):
                raise UserError(f"the text cache {self.folder} covers {len(self.blocks)} shards, {source.name} has "
                                f"{len(source.blocks)}; encode anew")  # fmt: skip
            for number, block in enumerate(self.blocks):
                if source.identity(number) != block["identity"]:
                    raise UserError(f"the text cache {self.folder} was made from another shard {block['name']} than that of "
                                    f"{source.name}; encode anew")  # fmt: skip

    def states(self, indices: np.ndarray, pick: np.ndarray) -> Condition:
        """The states of one caption of each sample, padded to the longest. indices: (B,). pick: (B,) in [0, 1)."""
        numbers = self._numbers(indices, pick)
        unique, inverse = np.unique(numbers, return_inverse=True)
        size = self.manifest["shard"]
        shards = unique // size
        streams, pooled = range(len(self.manifest["widths"])), []
        rows: list[list[Tensor]] = [[] for _ in streams]
        for shard in np.unique(shards):
            name = f"{int(shard):05d}.text.safetensors"
            file, local = self._file(name), unique[shards == shard] - int(shard) * size
            for stream in streams:
                rows[stream] += self._rows(file, stream, local)
            if self.manifest["pooled_width"]:
                pooled.append(file["pooled"][local])
        places = torch.from_numpy(inverse)
        states, masks = zip(*(_padded(found, places) for found in rows), strict=True)
        vectors = torch.from_numpy(np.concatenate(pooled))[places] if pooled else None
        return Condition(states, masks, vectors)

    def _rows(self, file: Arrays, stream: int, local: np.ndarray) -> list[Tensor]:
        """(L, D) states of each of some captions of one file."""
        ends, states = file[f"ends{stream}"], file[f"states{stream}"]
        stored = self.manifest["stored"]
        found = []
        for row in local.tolist():
            part = slice(int(ends[row]), int(ends[row + 1]))
            scale = file[f"scale{stream}"][part].copy() if stored == "int8" else None
            found.append(unpack_states(Packed(states[part].copy(), scale), stored))
        return found

    def _numbers(self, indices: np.ndarray, pick: np.ndarray) -> np.ndarray:
        """(B,) the numbers of the chosen captions."""
        blocks = np.searchsorted(self._starts, indices, side="right") - 1
        numbers = np.empty(len(indices), dtype=np.int64)
        for block in np.unique(blocks):
            chosen = np.flatnonzero(blocks == block)
            file = self._file(f"{self.blocks[block]['name']}.captions.safetensors")
            rows = indices[chosen] - self._starts[block]
            first, last = file["rows"][rows], file["rows"][rows + 1]
            if (first == last).any():
                raise UserError(f"{self.folder}: a sample of {self.blocks[block]['name']} had no caption when it was encoded")
            numbers[chosen] = file["captions"][first + (pick[chosen] * (last - first)).astype(np.int64)]
        return numbers

    def _file(self, name: str) -> Arrays:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        while len(self._files) >= OPEN_FILES:
            self._files.popitem(last=False)
        try:
            self._files[name] = Arrays(open_map(self.folder / name))
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise UserError(f"{self.folder / name} cannot be read ({error}); encode_text makes it anew") from error
        return self._files[name]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}  # maps do not travel to other processes


class TextCachedSource(SourceAround):
    """A source whose captions come with their states. Raises UserError when the cache was made from other data."""

    def __init__(self, source: Source, cache: TextCache):
        super().__init__(source)
        cache.check(source)
        self.text_cache, self.has_states = cache, True
        self.truncated = cache.manifest["truncated"] / max(1, cache.manifest["captions"])

    def read_states(self, indices: np.ndarray, pick: np.ndarray) -> Condition:
        return self.text_cache.states(indices, pick)

    def check_text(self, fingerprint: dict[str, str]) -> None:
        self.text_cache.check(None, fingerprint)


def _padded(rows: list[Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, D) states, zero where there are none, and their (B, L) mask. places: which of the rows each sample takes."""
    lengths = torch.tensor([len(row) for row in rows])
    states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(states.shape[1]) < lengths[:, None]
    return states[places], mask[places]


def merge_conditions(parts: Sequence[tuple[np.ndarray, Condition]], count: int) -> Condition:
    """Conditions of some rows each (a boolean mask over `count`) → one, padded alike."""
    first = parts[0][1]
    states, masks = [], []
    for stream in range(len(first.states)):
        length = max(condition.states[stream].shape[1] for _, condition in parts)
        found = [condition.states[stream].dtype for _, condition in parts]
        dtype = found[0] if len(set(found)) == 1 else torch.float32  # whichever parts a batch holds
        state = torch.zeros(count, length, first.states[stream].shape[2], dtype=dtype)
        mask = torch.zeros(count, length, dtype=torch.bool)
        for chosen, condition in parts:
            rows, own = torch.from_numpy(chosen), condition.states[stream].shape[1]
            state[rows, :own], mask[rows, :own] = condition.states[stream].to(state.dtype), condition.masks[stream]
        states.append(state)
        masks.append(mask)
    pooled = None
    if first.pooled is not None:
        pooled = first.pooled.new_empty(count, first.pooled.shape[1])
        for chosen, condition in parts:
            pooled[torch.from_numpy(chosen)] = condition.pooled
    return Condition(tuple(states), tuple(masks), pooled)


def _short(value: str | None) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 24 else text
