"""Attention, shared by networks and text encoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.errors import UserError

_writes_out = True  # see `fused`
_KERNEL_HAS_AMX = torch.cpu._is_amx_tile_supported()  # asked here: torch.compile would break off at it


@contextmanager
def fused() -> Iterator[None]:
    """Inside, attention is one kernel on every device, which saves for the backward pass what a GPU's saves."""
    global _writes_out
    before, _writes_out = _writes_out, False
    try:
        yield
    finally:
        _writes_out = before


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d) v for (B, heads, length, d). mask: broadcastable to (B, heads, N, L), True = may be seen, or numbers
    that are added to the scores.

    On a CPU in bf16, torch's fused kernel has a backward pass several times slower than two matrix products, so short
    sequences are written out there where there will be one.
    """
    if _is_bf16_on_cpu(q) and torch.is_grad_enabled() and k.shape[-2] <= 1024:
        return _written_out(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_among(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` of tokens to one another, none of which is padding, so that their number is not that of the longest in a batch.

    Hence it may decide by their number what is computed, and a sample's result still does not depend on its batch: on a CPU in
    bf16 two matrix products are faster without a backward pass, too, for some hundred tokens, if the fused kernel has no matrix
    instructions (AMX) to use.
    """
    if _is_bf16_on_cpu(q) and 128 <= k.shape[-2] <= 512 and not _KERNEL_HAS_AMX:
        return _written_out(q, k, v, None)
    return attend(q, k, v)


def _is_bf16_on_cpu(q: Tensor) -> bool:
    return _writes_out and q.device.type == "cpu" and q.dtype == torch.bfloat16


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1) @ v


def mask_for(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of words, True = a word, as it is; without gradients, what is added to scores, which attention on a GPU would
    make of it anew in every layer and pass."""
    if torch.is_grad_enabled():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def checked(heads: int, width: int) -> int:
    """UserError where that many heads do not divide the width."""
    if heads < 1 or width % heads:
        raise UserError(f"heads: {heads} do not divide a width of {width}")
    return heads


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) → (B, heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, d) → (B, L, heads · d)."""
    return x.transpose(1, 2).flatten(2)


class Words:
    """Where in a batch of padded captions the words are. Layers that see one word at a time take them as rows (R, D),
    without the padding between them, which is half of a batch of captions of many lengths.

    mask: (B, L), True = a word. padding_too: rows are made of padding as well. places: of the rows, (R,), where they are known.
    """

    def __init__(self, mask: Tensor, padding_too: bool = False, places: Tensor | None = None):
        self.mask = mask
        self.places = (torch.ones_like(mask) if padding_too else mask).flatten().nonzero()[:, 0] if places is None else places

    def rows(self, padded: Tensor) -> Tensor:
        """(B, L, …) → (R, …)."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def padded(self, rows: Tensor) -> Tensor:
        """(R, D) → (B, L, D), with zeros where there are no rows."""
        out = rows.new_zeros(self.mask.numel(), rows.shape[-1]).index_copy(0, self.places, rows)
        return out.view(*self.mask.shape, -1)


class SelfAttention(nn.Module):
    """Multi-head self-attention on (B, L, D)."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = checked(heads, width)
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(self.mix(self.qkv(x), mask))

    def mix(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, 3·D) queries, keys and values, side by side → (B, L, D), what each query reads."""
        q, k, v = self.heads_of(qkv)
        return merge_heads(attend_among(q, k, v) if mask is None else attend(q, k, v, mask))

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, 3·D) → three of (B, heads, L, D / heads)."""
        q, k, v = (split_heads(y, self.heads) for y in qkv.chunk(3, dim=-1))
        return q, k, v


class CrossAttention(nn.Module):
    """Queries from tokens, keys and values from text; these are made once by `keys_and_values`."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = checked(heads, width)
        self.q = nn.Linear(width, width, bias)
        self.kv = nn.Linear(width, 2 * width, bias)
        self.out = nn.Linear(width, width, bias)

    def keys_and_values(self, text: Tensor, words: Words | None = None) -> tuple[Tensor, Tensor]:
        """text: (B, L, D), or with `words` the rows of these."""
        kv = self.kv(text) if words is None else words.padded(self.kv(text))
        k, v = (split_heads(y, self.heads) for y in kv.chunk(2, dim=-1))
        return k, v

    def forward(self, x: Tensor, keys_and_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """x: (B, L, D), or (1, L, D) where all rows ask the same."""
        return self.out(self.read(self.q(x), keys_and_values, mask))

    def read(self, queries: Tensor, keys_and_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """(B or 1, L, D) queries → (B, L, D), what each reads."""
        q = split_heads(queries, self.heads).expand(len(keys_and_values[0]), -1, -1, -1)
        return merge_heads(attend(q, *keys_and_values, mask))


class MLP(nn.Sequential):
    """Linear, activation, Linear."""

    def __init__(self, width: int, ratio: float = 4.0, activation: str = "gelu"):
        hidden = int(width * ratio)
        act = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}[activation]()
        super().__init__(nn.Linear(width, hidden), act, nn.Linear(hidden, width))


class StaticCache:
    """A KVCache whose memory is set aside once, for `length` slots: appending copies what is new and nothing else."""

    def __init__(self, length: int):
        self._longest = length
        self._layers: dict[int | tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._filled: dict[int | tuple[str, int], int] = {}

    @property
    def length(self) -> int:
        return self._filled.get(0, 0)

    def append(self, layer: int | tuple[str, int], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._layers:
            self._layers[layer] = tuple(x.new_empty(*x.shape[:2], self._longest, x.shape[-1]) for x in (k, v))
        start = self._filled.get(layer, 0)
        end = self._filled[layer] = start + k.shape[-2]
        keys, values = self._layers[layer]
        keys[:, :, start:end], values[:, :, start:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def append_states(self, layer: int, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return self.append(("states", layer), x, x[..., :0])[0].squeeze(1)

    def crop(self, length: int) -> None:
        self._filled = {layer: min(length, filled) for layer, filled in self._filled.items()}

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        for keys_and_values in self._layers.values():
            for x in keys_and_values:
                x.copy_(x[rows])
