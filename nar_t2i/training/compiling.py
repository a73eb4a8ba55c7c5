"""torch.compile: fused kernels, and for the training step on a GPU recorded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from nar_t2i.errors import UserError
from nar_t2i.types import Condition, TextEncoder, TokenNetwork

Compiled = Literal["kernels", "kernels and graphs"]


def can_compile(kind: Compiled, trainer: Trainer) -> bool:
    """Whether a run's training steps can be compiled; where it goes on without, it says so. UserError where it could not go on."""
    if getattr(trainer.strategy, "stage", 0) == 3:
        rank_zero_warn("compile: is left out under ZeRO-3, whose layers fetch and release their weights as they run")
        return False
    if kind == "kernels and graphs" and trainer.strategy.root_device.type == "cuda" and trainer.accumulate_grad_batches > 1:
        raise UserError(
            "model.init_args.compile: recorded graphs cannot accumulate gradients over micro-batches; take kernels, or a larger "
            "data.init_args.micro_batch_size"
        )
    return True


def compiled(network: TokenNetwork, kind: Compiled) -> TokenNetwork:
    """The network, on the same weights, with its forward and backward passes compiled; `prepare` stays as it is.

    "kernels": the layers of its `stack`, one of each kind for all of that kind, which takes seconds; from then on they run
    compiled wherever there will be a backward pass. The whole network, which takes a minute, where it has no stack, where layers
    are computed once more in the backward pass, which must not find them compiled anew for captions of any length, and for
    graphs. The pass then breaks in two where chosen slots are read, since their number is read from the device. Before that all
    shapes stand still, and this part, nearly all of the work, is what graphs record; the head, whose shapes move, is compiled
    alone.
    """
    graphs = kind == "kernels and graphs" and torch.cuda.is_available()
    if network.stack and not (graphs or getattr(network, "activation_checkpointing", False)):
        for layer in network.stack:
            layer._compiled_call_impl = _for_training(layer)
        return network
    # Otherwise a graph would be recorded for every number of slots.
    options = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True} if graphs else None
    whole = torch.compile(network, options=options)
    whole.register_forward_pre_hook(_mark_read, with_kwargs=True)
    return whole  # type: ignore[return-value]


def _mark_read(network: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """How many slots are read changes with every step; one compilation is to serve any number."""
    if (read := options.get("read")) is not None and read.ndim == 1:
        torch._dynamo.maybe_mark_dynamic(read, 0)


def _for_training(layer: nn.Module) -> Callable[..., Any]:
    """Its call, compiled where gradients are recorded."""
    plain, fused = layer._call_impl, torch.compile(layer._call_impl)
    return lambda *args, **kwargs: (fused if torch.is_grad_enabled() and not is_watched() else plain)(*args, **kwargs)


def is_watched() -> bool:
    """Whether something looks at each operation, such as the monitor that counts those of the first step. Compiled code has
    nothing to show it, and what torch.compile meets at such a time it leaves uncompiled for good."""
    return is_in_torch_dispatch_mode()


def longest(text: TextEncoder) -> list[int] | None:
    """The length of the longest states of each stream; None where the encoder does not say."""
    encoders: list[Any] = list(getattr(text, "encoders", [text]))
    lengths = [getattr(encoder, "max_length", None) for encoder in encoders]
    return None if None in lengths or len(lengths) != len(text.widths) else lengths


def of_one_length(condition: Condition, lengths: list[int]) -> Condition:
    """The streams padded to `lengths`, which no network sees: masks are False there. Recorded shapes must not change."""

    def padded(x: Tensor, length: int, value: float) -> Tensor:
        missing = max(0, length - x.shape[1])
        return F.pad(x, (0, 0, 0, missing) if x.ndim == 3 else (0, missing), value=value)

    states = tuple(padded(x, length, 0.0) for x, length in zip(condition.states, lengths, strict=True))
    masks = tuple(padded(x, length, False) for x, length in zip(condition.masks, lengths, strict=True))
    return condition._replace(states=states, masks=masks)
