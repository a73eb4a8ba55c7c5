"""Which layers of a text encoder are trained, and one state for a whole caption."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nar_t2i.errors import UserError


def choose_trained(trainable: str, model: nn.Module, layers: Sequence[nn.Module], after: Iterable[nn.Module]) -> None:
    """Set `requires_grad` of all weights of `model`. trainable: "none", "all", or "last_k": k layers and what is `after` them.

    Raises UserError for anything else, and where there are fewer than k layers.
    """
    last = re.fullmatch(r"last_([1-9]\d*)", trainable)
    if trainable not in ("none", "all") and not last:
        raise UserError(f"text encoder: trainable must be none, all or last_k, such as last_2, not {trainable!r}")
    if last and int(last[1]) > len(layers):
        raise UserError(f"text encoder: trainable is {trainable}, but there are {len(layers)} layers")
    model.requires_grad_(trainable == "all")
    if last:
        for module in (*list(layers)[-int(last[1]) :], *after):
            module.requires_grad_(True)


def readable(caption: str) -> str:
    """Without the lone surrogates by which command lines bring bytes that are no UTF-8, and which no tokenizer takes."""
    return caption.encode("utf-8", "replace").decode()


def copied(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the host made, on `device`, without waiting for what a GPU does: copies of other memory than pinned are waited for."""
    if device.type == "cuda":
        tensors = tuple(x.pin_memory() for x in tensors)
    return tuple(x.to(device, non_blocking=True) for x in tensors)


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, width) states → (B, width), their mean over real tokens: a pooled state where a model has none (our choice)."""
    return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
