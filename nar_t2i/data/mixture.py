"""Several sources as one, drawn by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from nar_t2i.data.order import MixedOrder, Order
from nar_t2i.data.source import LostSample, Sample, Source, Texts, Tokens
from nar_t2i.data.text_cache import merge_conditions
from nar_t2i.errors import UserError
from nar_t2i.hashing import text_hash
from nar_t2i.types import Condition, TokenSpec


class Mixture(Source):
    """Sources drawn by weight, whatever their lengths; each goes through its own epochs.

    weights: positive, in any unit. The indices of the parts lie one behind the other.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        if not sources or len(sources) != len(weights) or not all(0 < weight < math.inf for weight in weights):
            raise UserError(f"a mixture needs one positive weight a source, not {list(weights)} for {len(sources)}")
        specs = {s.token_spec for s in sources}
        if len(specs) > 1:
            raise UserError(f"the sources of a mixture differ in what their images are: {', '.join(map(str, specs))}")
        if len({s.has_states for s in sources}) > 1:
            raise UserError("either all sources of a mixture have a text cache, or none")
        self.has_states = sources[0].has_states
        self.has_errors = all(s.has_errors for s in sources)
        self.name = " + ".join(s.name for s in sources)
        self.token_spec = specs.pop()
        self._sources, self._weights = list(sources), list(weights)
        lengths = np.array([len(s) for s in sources])
        self._starts = np.cumsum(lengths) - lengths
        self._block_starts = np.cumsum([0, *(len(s.blocks) for s in sources)])
        told = [s.truncated for s in sources]
        self.truncated = None if None in told else float(np.average(told, weights=weights))

    def __len__(self) -> int:
        return sum(len(s) for s in self._sources)

    def read(self, index: int) -> Sample:
        part = self._part(index)
        return self._sources[part].read(index - int(self._starts[part]))

    def read_text(self, index: int) -> Sample:
        part = self._part(index)
        return self._sources[part].read_text(index - int(self._starts[part]))

    def read_texts(self, indices: np.ndarray, pick: np.ndarray) -> Texts:
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        found = {p: self._sources[p].read_texts(*self._of(p, parts, indices, pick)) for p in np.unique(parts)}
        return _merge(parts, found)

    def read_tokens(self, indices: np.ndarray, pick: np.ndarray, place: np.ndarray, flip: np.ndarray) -> Tokens:
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        found = {p: self._sources[p].read_tokens(*self._of(p, parts, indices, pick, place, flip)) for p in np.unique(parts)}
        texts = _merge(parts, {p: of_part.texts for p, of_part in found.items()})
        tokens = _put_back(parts, {p: of_part.tokens for p, of_part in found.items()})
        if not self.has_errors:
            return Tokens(texts, tokens, None)
        return Tokens(texts, tokens, _put_back(parts, {p: of_part.errors for p, of_part in found.items()}))

    def check_views(self, crops: bool, flips: bool) -> None:
        for source in self._sources:
            source.check_views(crops, flips)

    def read_states(self, indices: np.ndarray, pick: np.ndarray) -> Condition:
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        found = [(parts == p, self._sources[p].read_states(*self._of(p, parts, indices, pick))) for p in np.unique(parts)]
        return merge_conditions(found, len(indices))

    def check_text(self, fingerprint: dict[str, str]) -> None:
        for source in self._sources:
            source.check_text(fingerprint)

    def check_tokens(self, spec: TokenSpec, codec_hash: str) -> None:
        for source in self._sources:
            source.check_tokens(spec, codec_hash)

    def check_errors(self) -> None:
        for source in self._sources:
            source.check_errors()

    @property
    def blocks(self) -> Sequence[int]:
        return [length for source in self._sources for length in source.blocks]

    def block_name(self, block: int) -> str:
        part = int(np.searchsorted(self._block_starts, block, side="right")) - 1
        return f"{part}-{self._sources[part].block_name(block - int(self._block_starts[part]))}"

    def identity(self, block: int) -> str:
        part = int(np.searchsorted(self._block_starts, block, side="right")) - 1
        return self._sources[part].identity(block - int(self._block_starts[part]))

    def fingerprint(self) -> str:
        total = sum(self._weights)
        parts = [
            f"{weight / total:.6g} {source.fingerprint()}" for source, weight in zip(self._sources, self._weights, strict=True)
        ]
        return text_hash("\n".join(parts))

    @property
    def lost(self) -> list[LostSample]:
        return [lost for source in self._sources for lost in source.lost]

    @property
    def lost_count(self) -> int:
        return sum(source.lost_count for source in self._sources)

    @property
    def scalar_names(self) -> set[str] | None:
        names = [source.scalar_names for source in self._sources]
        return None if None in names else set().union(*names)

    def order(self, seed: int, window: int) -> Order:
        parts = [source.order(seed, window) for source in self._sources]
        return MixedOrder(parts, [len(s) for s in self._sources], self._weights, seed)

    def _part(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _of(self, part: int, parts: np.ndarray, indices: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
        chosen = parts == part
        return indices[chosen] - self._starts[part], *(column[chosen] for column in columns)


def _put_back(parts: np.ndarray, found: dict[int, torch.Tensor]) -> torch.Tensor:
    """The rows of the parts, where each belongs."""
    first = next(iter(found.values()))
    merged = first.new_empty(len(parts), *first.shape[1:])
    for part, values in found.items():
        merged[torch.from_numpy(parts == part)] = values
    return merged


def _merge(parts: np.ndarray, found: dict[int, Texts]) -> Texts:
    """The texts of the parts, put back where each belongs."""
    keys = np.empty(len(parts), dtype=object)
    captions = np.empty(len(parts), dtype=object)
    scalars: dict[str, np.ndarray] = {}
    for part, texts in found.items():
        chosen = parts == part
        keys[chosen], captions[chosen] = texts.keys, texts.captions
        for name, values in texts.scalars.items():
            scalars.setdefault(name, np.full(len(parts), np.nan, dtype=np.float32))[chosen] = values
    return Texts(keys.tolist(), captions.tolist(), scalars)
