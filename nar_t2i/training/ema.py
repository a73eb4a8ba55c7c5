"""An exponential moving average of the weights, kept beside training and swapped in whenever a model is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from nar_t2i.errors import UserError


def ema_decay(decay: float, updates: int, warmup: bool) -> float:
    """The decay of update number `updates` (from 0).

    With warm-up min(decay, (1 + t) / (10 + t)), so that the first weights, which know nothing, are soon forgotten
    (the rule of TensorFlow's ExponentialMovingAverage).
    """
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


def averages_of(checkpoint: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """What the EMA callbacks of a checkpoint have saved: averages by the names of the weights."""
    for name, state in checkpoint.get("callbacks", {}).items():
        if name.startswith("EMA") and isinstance(state, Mapping) and "average" in state:
            yield state["average"]


class EMA(Callback):
    """Average trainable parameters and float buffers after each optimizer step: `average += (1 − d)·(value − average)`.

    Validation, test and predict run on the average; the training weights come back bit for bit afterwards. The average
    is saved with the checkpoint as plain tensors named as in the module's state dict, and resumed from it.

    decay: d, 0 to 1; 0 copies the weights.
    warmup: see `ema_decay`.
    submodules: names of the module's attributes that are averaged; None = the module's own `ema_submodules` if it
        names some, else all of it.

    One update follows each training batch in which the optimizer stepped: `trainer.global_step` moved, by however many
    (with several optimizers under manual optimisation it moves by one for each). A module that knows better when a
    step is complete calls `step` itself; the automatic update then stays away from that batch.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True, submodules: list[str] | None = None) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay must be at least 0 and below 1, not {decay}")
        self.decay = decay
        self.warmup = warmup
        self.submodules = submodules
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] | None = None
        self._evaluation: Any = None
        self._stepped = False
        self._global_step = 0

    def step(self, module: LightningModule) -> None:
        """Count one optimizer step and move the average towards the module's present weights."""
        self._stepped = True
        if not self.average:
            self._begin(module)
        averages = list(self.average.values())
        values = [self._values[name].detach().to(average) for name, average in self.average.items()]
        with torch.no_grad():
            torch._foreach_lerp_(averages, values, 1 - ema_decay(self.decay, self.updates, self.warmup))
        self.updates += 1

    @contextmanager
    def applied(self, module: LightningModule) -> Iterator[None]:
        """Inside, `module` holds the average; afterwards exactly its own weights again. May be nested.

        Under ZeRO all ranks must enter, and leave, unless by an exception: one rank may be alone with that.
        """
        if self._kept is not None:
            yield
            return
        if not self.average:
            self._begin(module)
        self._kept = {name: value.detach().clone() for name, value in self._values.items()}
        self._put(self.average)
        _refresh(module)
        try:
            yield
        except BaseException:
            self._put_back()
            raise
        self._put_back()
        _refresh(module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stepped, self._global_step = False, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._stepped and trainer.global_step != self._global_step:
            self.step(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A checkpoint may be saved next, and it must hold the training weights.
        self._leave(exception)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self._restored = state_dict["average"]
        self._adopt_restored()

    def _enter(self, module: LightningModule) -> None:
        self._evaluation = self.applied(module)
        self._evaluation.__enter__()

    def _leave(self, exception: BaseException | None = None) -> None:
        if self._evaluation is not None:
            evaluation, self._evaluation = self._evaluation, None
            evaluation.__exit__(*((type(exception), exception, exception.__traceback__) if exception else (None, None, None)))

    def _begin(self, module: LightningModule) -> None:
        """Start the average at the module's weights, or at what a checkpoint restored."""
        self._values = _tracked(module, self._names(module))
        if (strategy := _dividing(module)) is not None:
            # Of a parameter's fp32 weights this rank averages the piece that it updates, and no rank tells another.
            pieces = strategy.weights()
            whole = {name: value for name, value in self._values.items() if not isinstance(value, nn.Parameter)}
            self._values = whole | {name: pieces[name] for name in self._values if name in pieces}
        self.average = {name: value.detach().clone().to(_precise(value.dtype)) for name, value in self._values.items()}
        self._adopt_restored()

    def _adopt_restored(self) -> None:
        """Take over what a checkpoint held, as soon as there is a device to hold it on."""
        if self.average:
            for name, average in self.average.items():
                if name in self._restored:
                    average.copy_(self._restored[name])
            self._restored = {}

    def _put(self, source: Mapping[str, Tensor]) -> None:
        """Copy into the module's weights, or under ZeRO into the pieces of them that this rank updates."""
        with torch.no_grad():
            for name, value in self._values.items():
                value.copy_(source[name])

    def _put_back(self) -> None:
        self._put(self._kept)
        self._kept = None

    def _names(self, module: LightningModule) -> Sequence[str]:
        return getattr(module, "ema_submodules", ()) if self.submodules is None else self.submodules


def _tracked(module: nn.Module, submodules: Sequence[str]) -> dict[str, Tensor]:
    """Trainable parameters and saved float buffers by their state-dict name, of all or of some attributes."""
    for name in submodules:
        if not isinstance(getattr(module, name, None), nn.Module):
            raise UserError(f"EMA: submodules: {type(module).__name__} has no submodule {name!r}")
    prefixes = tuple(f"{name}." for name in submodules)
    saved = module.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in saved.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and (value.requires_grad or not isinstance(value, nn.Parameter))
        and (not prefixes or name.startswith(prefixes))
    }


def _dividing(module: LightningModule) -> Any:
    """The strategy, if it divides the weights that it trains over the ranks; else None."""
    strategy = module._trainer.strategy if module._trainer is not None else None
    return strategy if hasattr(strategy, "divide") and module._trainer.state.fn == TrainerFn.FITTING else None


def _refresh(module: LightningModule) -> None:
    """Under ZeRO, make the weights what the pieces of all ranks say. All must call it."""
    if (strategy := _dividing(module)) is not None:
        strategy.refresh()


def _precise(dtype: torch.dtype) -> torch.dtype:
    """Averages of half-precision weights are kept in float32: half precision cannot resolve the updates."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
