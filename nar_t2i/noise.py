"""Counter-based noise: every random choice is a pure function of (seed, stream, sample id, step, position).

Image i gets the same numbers in any batch, on any rank and device, after any resume. The mixing function is the
finaliser of SplitMix64 (Steele, Lea & Flood, 2014), applied once a key; it needs nothing but 64-bit integer
arithmetic, so it runs inside a CUDA graph.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit numbers, all that torch has
_MUL_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MUL_2 = 0x94D049BB133111EB - (1 << 64)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MUL_1
    x = (x ^ _shift(x, 27)) * _MUL_2
    return x ^ _shift(x, 31)


def _signed(x: int) -> int:
    """A Python integer, wrapped to int64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _fold(key: Tensor, value: Tensor | int) -> Tensor:
    """A new key from a key and a counter."""
    step = _signed((value + 1) * _GOLDEN) if isinstance(value, int) else (value + 1) * _GOLDEN
    return _mix(key + step)


def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little", signed=True)


def _to_uniform(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Hashes → the open interval (0, 1), on a lattice that `dtype` represents exactly."""
    bits = 52 if dtype == torch.float64 else 23
    return (_shift(x, 64 - bits).to(dtype) + 0.5) * 2.0**-bits


class Noise:
    """The random numbers of a batch.

    seed: any integer. ids: (B,) int64 sample ids. `dtype`: float32 (23 bits a draw) or float64 (52 bits).
    """

    def __init__(self, seed: int, ids: Tensor, dtype: torch.dtype = torch.float32):
        self.seed = seed
        self.ids = ids
        self.dtype = dtype
        seed_key = torch.full((), _signed(seed), dtype=torch.int64, device=ids.device)  # filled there, not copied
        self._keys = _fold(_mix(seed_key), ids)
        self._copies = "copy"  # another stream for copies of copies

    def uniform(self, stream: str, step: int | Tensor = 0, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) in (0, 1). Another `stream` or `step` gives independent numbers."""
        return _to_uniform(self._hash(stream, step, shape), self.dtype)

    def integers(self, stream: str, high: int, step: int | Tensor = 0, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) int64, uniform on 0 … high − 1."""
        return (self.uniform(stream, step, shape).double() * high).long().clamp_(max=high - 1)

    def repeated(self, count: int) -> Noise:
        """The same noise `count` times for every image, side by side: (B · count) rows."""
        same = Noise(self.seed, self.ids.repeat_interleave(count), self.dtype)
        same._keys, same._copies = self._keys.repeat_interleave(count), self._copies
        return same

    def copies(self, count: int) -> Noise:
        """(B · count) rows: `count` draws of every image, side by side. The first repeats this noise, the others are independent
        of it.
        """
        copied, number = self.repeated(count), torch.arange(count, device=self.ids.device).repeat(len(self.ids))
        other = _fold(_fold(copied._keys, _stream_key(self._copies)), number)
        copied._copies += " of a copy"
        copied._keys = torch.where(number == 0, copied._keys, other)
        return copied

    def of_images(self, rows: Tensor) -> Noise:
        """That of some of the images. rows: (R,) integers."""
        chosen = Noise(self.seed, self.ids[rows], self.dtype)
        chosen._keys, chosen._copies = self._keys[rows], self._copies
        return chosen

    def at(self, step: int | Tensor, positions: Tensor) -> SlotNoise:
        """The numbers of the slots in `positions`: integers (B, M), or booleans (B, N), flattened to (R,)."""
        return SlotNoise(self, step, positions)

    def _hash(self, stream: str, step: int | Tensor, shape: tuple[int, ...]) -> Tensor:
        keys = _fold(_fold(self._keys, _stream_key(stream)), step)
        if not shape:
            return keys
        positions = torch.arange(math.prod(shape), device=keys.device).view(shape)
        return _fold(keys.view(-1, *[1] * len(shape)), positions)


class SlotNoise:
    """Noise at chosen slots: what a slot draws does not depend on which other slots were read.

    rows, positions: (R,) the image and the place of each slot, where slots were chosen by booleans; else None, and (B, M). How many
    there are is read from the device, for which a GPU's host waits: so it is read once, here, before the network's work is
    queued, and whoever needs them again asks this. places: in the flattened (B, N), (R,), where slots were chosen by booleans.
    """

    def __init__(self, noise: Noise, step: int | Tensor, positions: Tensor):
        self._noise, self._step = noise, step
        if positions.dtype == torch.bool:
            self.rows, self.positions = positions.nonzero(as_tuple=True)
            self.places = self.rows * positions.shape[1] + self.positions
        else:
            self.rows, self.positions, self.places = None, positions, None

    def of(self, values: Tensor) -> Tensor:
        """(B, N, …) → (*slots, …), what stands in these slots."""
        if self.rows is not None:
            return values[self.rows, self.positions]
        return values[torch.arange(len(values), device=values.device)[:, None], self.positions]

    def uniform(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(*slots, *shape) in (0, 1)."""
        keys = self._noise._hash(stream, self._step, ())
        keys = keys[:, None] if self.rows is None else keys[self.rows]
        keys = _fold(keys, self.positions)
        if shape:
            inner = torch.arange(math.prod(shape), device=keys.device).view(shape)
            keys = _fold(keys.view(*keys.shape, *[1] * len(shape)), inner)
        return _to_uniform(keys, self._noise.dtype)

    def normal(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """(*slots, *shape) standard normal, by the inverse distribution function."""
        return math.sqrt(2) * torch.erfinv(2 * self.uniform(stream, shape) - 1)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel draws from uniform ones."""
    return -torch.log(-torch.log(uniform))
