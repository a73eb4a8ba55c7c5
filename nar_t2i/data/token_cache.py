"""Reading a token cache: what a tokenizer made of every image of a source, so that training opens no image.

The folder mirrors the source's blocks. `cache.json` says what the tokens are, which codec made them, and of which data.

    <block>.tokens.npy       a row a view of a sample, in the order of the block: the smallest unsigned integers
                             (categorical), packed bits (binary) or floats (continuous)
    <block>.errors.npy       (rows, N) float16 squared quantisation errors, where they were asked for
    <block>.conditions.npy   (rows, 4) float32, see CONDITIONS

A view is a crop, upright or mirrored; all views of a sample lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nar_t2i.data.arrays import read_manifest
from nar_t2i.data.source import LostSample, Sample, Source, SourceAround, Texts, Tokens
from nar_t2i.errors import UserError
from nar_t2i.types import Condition, TokenSpec

FORMAT = 2
CONDITIONS = ("original_width", "original_height", "crop_top", "crop_left")
MANIFEST = "cache.json"
IN_MEMORY = 32 * 2**20  # bytes of a kind of arrays that are read at once


def pack(tokens: np.ndarray, spec: TokenSpec, float_dtype: str = "float16") -> np.ndarray:
    """(B, N, *value_shape) tokens → what is stored: (B, N) codes, (B, bytes) packed bits, or (B, N, C) floats. UserError where
    floats are too large for `float_dtype`.
    """
    if spec.kind == "categorical":
        return tokens.astype(np.min_scalar_type(spec.size - 1))
    if spec.kind == "binary":
        return np.packbits(tokens.reshape(len(tokens), -1).astype(np.uint8), axis=1)
    with np.errstate(over="ignore"):
        stored = tokens.astype(float_dtype)
    if not np.isfinite(stored).all():
        raise UserError(f"tokens of up to {np.abs(tokens).max():.3g} do not fit {float_dtype}; encode with --float-dtype float32")
    return stored


def unpack(stored: np.ndarray, spec: TokenSpec) -> torch.Tensor:
    """The inverse of `pack`: a tensor of the spec's type."""
    if spec.kind == "binary":
        stored = np.unpackbits(stored, axis=1, count=spec.length * spec.size)
    wanted = spec.blank(0).numpy().dtype  # NumPy converts unsigned integers many times faster than torch
    return torch.from_numpy(stored.astype(wanted)).view(len(stored), spec.length, *spec.value_shape)


class TokenCache:
    """A cache folder, opened for reading. Raises UserError when it is missing, unfinished or of another format."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, MANIFEST, FORMAT, "encode_tokens")
        spec = self.manifest["spec"]
        self.spec = TokenSpec(tuple(spec["shape"]), spec["kind"], spec["size"])
        self.codec_hash: str = self.manifest["codec"]
        self.crops, self.flips, self.errors = (self.manifest[key] for key in ("crops", "flips", "errors"))
        self.views: int = self.crops * (1 + self.flips)  # rows a sample
        self.blocks: list[dict[str, Any]] = self.manifest["blocks"]
        self._starts = np.cumsum([0, *(b["length"] for b in self.blocks)])
        self._maps: dict[tuple[int, str], np.ndarray] = {}
        self._wholes: dict[str, np.ndarray | None] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def check(self, source: Source | None = None, spec: TokenSpec | None = None, codec_hash: str | None = None) -> None:
        """Raise a UserError that says what differs from the data, the tokens or the codec that the caller expects."""
        if spec is not None and spec != self.spec:
            raise UserError(f"the cache {self.folder} holds {self.spec}, not {spec}; encode with this codec")
        if codec_hash is not None and codec_hash != self.codec_hash:
            raise UserError(
                f"the cache {self.folder} was made by a codec with hash {self.codec_hash[:12]}…, "
                f"but this one has {codec_hash[:12]}…: other weights give other tokens; encode anew"
            )
        if source is not None:
            self._check_blocks(source)

    def _check_blocks(self, source: Source) -> None:
        if len(source.blocks) != len(self.blocks):
            raise UserError(
                f"the cache {self.folder} covers {len(self.blocks)} shards, {source.name} has {len(source.blocks)}; "
                "encode_tokens adds what is missing"
            )
        for number, block in enumerate(self.blocks):
            if source.identity(number) != block["identity"]:
                raise UserError(
                    f"the cache {self.folder} was made from another shard {block['name']} than that of {source.name} "
                    f"({block['length']} samples in the cache, {source.blocks[number]} now); encode anew"
                )

    @property
    def lost(self) -> dict[int, LostSample]:
        """Index → the sample that could not be encoded; its row holds no tokens."""
        return {
            int(self._starts[number]) + int(row): LostSample(key, block["name"], reason)
            for number, block in enumerate(self.blocks)
            for row, (key, reason) in block["lost"].items()
        }

    def tokens(self, indices: np.ndarray, view: np.ndarray | int = 0) -> torch.Tensor:
        """(B,) indices, and which view of each → (B, N, *value_shape) tokens of the spec's type."""
        return unpack(self.rows("tokens", indices, view), self.spec)

    def view(self, place: np.ndarray, flip: np.ndarray) -> np.ndarray:
        """(B,) in [0, 1) and (B,) bool → (B,) which view that is; 0.5 is the crop in the middle."""
        return (place * self.crops).astype(np.int64) * (1 + self.flips) + (flip & self.flips)

    def rows(self, kind: str, indices: np.ndarray, view: np.ndarray | int = 0) -> np.ndarray:
        """(B, …), as stored. kind: "tokens", "errors" or "conditions"."""
        whole = self._whole(kind)
        if whole is not None:
            return whole[indices * self.views + view]
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        gathered = None
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            of_view = view[chosen] if isinstance(view, np.ndarray) else view
            rows = self._map(int(number), kind)[(indices[chosen] - self._starts[number]) * self.views + of_view]
            if gathered is None:
                gathered = np.empty((len(indices), *rows.shape[1:]), dtype=rows.dtype)
            gathered[chosen] = rows
        return gathered

    def _whole(self, kind: str) -> np.ndarray | None:
        """All rows of a small cache, in memory: one look-up instead of one a shard. None where they are too many."""
        if kind not in self._wholes:
            paths = [self.folder / f"{block['name']}.{kind}.npy" for block in self.blocks]
            size = sum(path.stat().st_size for path in paths if path.is_file())
            small = size <= IN_MEMORY and len(self.blocks) > 0
            # Read, not mapped: each map holds a file handle.
            parts = [self._open(number, kind, None) for number in range(len(self.blocks))] if small else []
            self._wholes[kind] = np.concatenate(parts) if small else None
        return self._wholes[kind]

    def _map(self, number: int, kind: str) -> np.ndarray:
        if (number, kind) not in self._maps:
            if len(self._maps) >= 256:  # each map holds a file handle
                del self._maps[next(iter(self._maps))]
            self._maps[number, kind] = self._open(number, kind, "r")
        return self._maps[number, kind]

    def _open(self, number: int, kind: str, mmap_mode: Literal["r"] | None) -> np.ndarray:
        block = self.blocks[number]
        path = self.folder / f"{block['name']}.{kind}.npy"
        try:
            array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); encode_tokens makes it anew") from error
        if len(array) != block["length"] * self.views:
            raise UserError(f"{path} has {len(array)} rows instead of {block['length'] * self.views}; delete it and encode anew")
        return array

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}, "_wholes": {}}  # maps do not travel to other processes


class CachedSource(SourceAround):
    """A source whose images come as tokens. Samples that could not be encoded have no index here.

    Raises UserError when the cache was made from other data.
    """

    def __init__(self, source: Source, cache: TokenCache):
        super().__init__(source)
        cache.check(source)
        self.cache, self.token_spec, self.has_errors = cache, cache.spec, cache.errors
        self._lost = cache.lost
        bad = np.array(sorted(self._lost), dtype=np.int64)
        # The k-th usable index is k plus the number of lost ones before it.
        self._shift = bad - np.arange(len(bad))
        edges = np.cumsum([0, *source.blocks])
        self._blocks = (np.diff(edges) - np.diff(np.searchsorted(bad, edges))).tolist()
        self._length = sum(self._blocks)

    def __len__(self) -> int:
        return self._length

    @property
    def blocks(self) -> Sequence[int]:
        return self._blocks

    @property
    def lost(self) -> list[LostSample]:
        return [*self._source.lost, *self._lost.values()]

    @property
    def lost_count(self) -> int:
        return self._source.lost_count + len(self._lost)

    def check_tokens(self, spec: TokenSpec, codec_hash: str) -> None:
        self.cache.check(None, spec, codec_hash)

    def check_errors(self) -> None:
        if not self.cache.errors:
            raise UserError(f"the cache {self.cache.folder} holds no quantisation errors; make another one with "
                            "data_prep/encode_tokens.py SHARDS TOKENIZER FOLDER --errors, and name it in its place")  # fmt: skip

    def read_text(self, index: int) -> Sample:
        return self._source.read_text(int(self._original(np.array([index]))[0]))

    read = read_text  # of an image there are the tokens alone: see `read_tokens`

    def read_texts(self, indices: np.ndarray, pick: np.ndarray) -> Texts:
        return self._source.read_texts(self._original(np.asarray(indices, dtype=np.int64)), pick)

    def read_tokens(self, indices: np.ndarray, pick: np.ndarray, place: np.ndarray, flip: np.ndarray) -> Tokens:
        original = self._original(np.asarray(indices, dtype=np.int64))
        texts, view = self._source.read_texts(original, pick), self.cache.view(place, flip)
        texts.scalars.update(zip(CONDITIONS, self.cache.rows("conditions", original, view).T.copy(), strict=True))
        errors = torch.from_numpy(self.cache.rows("errors", original, view)).float() if self.cache.errors else None
        return Tokens(texts, self.cache.tokens(original, view), errors)

    def check_views(self, crops: bool, flips: bool) -> None:
        if crops and self.cache.crops == 1:
            raise UserError(f"crop: random needs several crops, and the cache {self.cache.folder} has one an image; encode "
                            "with --crops 3, or set crop: centre")  # fmt: skip
        if flips and not self.cache.flips:
            raise UserError(f"flip: true needs mirrored images, and the cache {self.cache.folder} has none; encode with "
                            "--flip-safe, or set flip: false")  # fmt: skip

    def read_states(self, indices: np.ndarray, pick: np.ndarray) -> Condition:
        return self._source.read_states(self._original(np.asarray(indices, dtype=np.int64)), pick)

    def _original(self, indices: np.ndarray) -> np.ndarray:
        return indices + np.searchsorted(self._shift, indices, side="right")
