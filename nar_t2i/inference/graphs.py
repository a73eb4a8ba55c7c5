"""Whole decodings recorded as CUDA graphs: at batch 1 the time between kernels is most of a pass.

The second time that a strategy decodes with the same shapes and settings, it is recorded; from then on a batch costs one
launch. What a strategy must keep to is said by `InferenceStrategy.static`, and held by a test on a device without memory.
"""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import Condition, Decoded, InferenceStrategy, TokenNetwork

ONCE, PLAIN = "once", "plain"
Record = Callable[[Callable[[], Decoded], torch.device], tuple[Callable[[], None], Decoded]]


class Recorded(NamedTuple):
    """owners: held, so that no other object takes their place in memory. inputs: what a replay reads. replay: runs it. result:
    what it writes."""

    owners: tuple[object, ...]
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Decoded


class Graphs:
    """Decodes by recordings. They hold where the weights lie in memory: after these were moved, others are needed.

    keep: recordings that are held at once; the one that was used longest ago goes first.
    round_to: texts are padded to a multiple of it, so that prompts of many lengths share recordings.
    record: makes one; another than CUDA's is for tests.
    """

    def __init__(self, keep: int = 4, round_to: int = 32, record: Record | None = None):
        self.keep, self.round_to, self.record = keep, round_to, record or CudaRecorder()
        self._recorded: OrderedDict[object, Recorded | str] = OrderedDict()  # ONCE and PLAIN: not recorded yet, or never

    @property
    def recordings(self) -> int:
        """How many are held."""
        return sum(isinstance(recorded, Recorded) for recorded in self._recorded.values())

    def decode(
        self,
        strategy: InferenceStrategy,
        network: TokenNetwork,
        condition: Condition,
        null: Condition,
        noise: Noise,
        guidance: Guidance,
    ) -> Decoded:
        """What `strategy.decode` gives, with nothing known and nobody told of steps."""
        if not (strategy.static and network.static):
            return strategy.decode(network, condition, null, noise, guidance)
        condition, null = padded(condition, self.round_to), padded(null, self.round_to)
        inputs = [*_tensors(condition), *_tensors(null), noise.ids]
        device = noise.ids.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = tuple((tuple(x.shape), x.dtype, x.device) for x in inputs)
        key = (
            _settings(strategy),
            id(network),
            guidance,
            noise.seed,
            noise.dtype,
            autocast,
            torch.is_inference_mode_enabled(),
            shapes,
        )
        if key not in self._recorded:
            while len(self._recorded) >= self.keep:
                self._recorded.popitem(last=False)
            self._recorded[key] = ONCE
            return strategy.decode(network, condition, null, noise, guidance)
        self._recorded.move_to_end(key)
        if self._recorded[key] == PLAIN:
            return strategy.decode(network, condition, null, noise, guidance)
        if self._recorded[key] == ONCE:
            own = [x.clone() for x in inputs]
            told, untold, ids = _like(condition, own), _like(null, own[len(_tensors(condition)) :]), own[-1]

            def run() -> Decoded:
                # Weights that autocast has kept from another time would be read where they no longer are. Where there is none,
                # nothing is switched: compiled code would be compiled anew for that.
                with torch.autocast(device, autocast, cache_enabled=False) if autocast else nullcontext():
                    return strategy.decode(network, told, untold, Noise(noise.seed, ids, noise.dtype), guidance)

            try:
                self._recorded[key] = Recorded((strategy, network), own, *self.record(run, noise.ids.device))
            except RuntimeError as error:  # something that cannot be recorded, or too little memory
                warnings.warn(
                    f"{type(strategy).__name__} is launched pass by pass, since it could not be recorded: {error}", stacklevel=2
                )
                self._recorded[key] = PLAIN
                return strategy.decode(network, condition, null, noise, guidance)
        recorded = self._recorded[key]
        for buffer, value in zip(recorded.inputs, inputs, strict=True):
            buffer.copy_(value)
        recorded.replay()
        return recorded.result._replace(tokens=recorded.result.tokens.clone())


class CudaRecorder:
    """Runs once beside the main stream, then once more while CUDA writes down what is launched. All recordings work on the
    same stream, in the same memory: their inputs lie outside of it, and what one has written is copied before another is
    replayed."""

    def __init__(self) -> None:
        self._memory: Any = None
        self._stream: Any = None

    def __call__(self, run: Callable[[], Decoded], device: torch.device) -> tuple[Callable[[], None], Decoded]:
        with torch.cuda.device(device):
            self._memory = self._memory or torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream()  # the memory that another one has freed would not be taken
            before, stream = torch.cuda.current_stream(), self._stream
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                run()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            # The matrix library's scratch memory must belong to neither another recording nor, after this, to plain launches.
            torch._C._cuda_clearCublasWorkspaces()
            collects = gc.isenabled()
            gc.collect()
            gc.disable()  # a recording that is freed breaks off the one that is made
            try:
                with torch.cuda.graph(graph, pool=self._memory, stream=stream):
                    result = run()
            finally:
                if collects:
                    gc.enable()
                torch.cuda.set_stream(before)  # where a recording fails, torch stays on its stream
                torch._C._cuda_clearCublasWorkspaces()
        return graph.replay, result


def padded(condition: Condition, multiple: int) -> Condition:
    """The same texts, each stream padded to a length that `multiple` divides."""

    def pad(x: Tensor) -> Tensor:
        longer = -(-x.shape[1] // multiple) * multiple
        return x if longer == x.shape[1] else torch.cat([x, x.new_zeros(len(x), longer - x.shape[1], *x.shape[2:])], dim=1)

    return condition._replace(states=tuple(map(pad, condition.states)), masks=tuple(map(pad, condition.masks)))


def _settings(value: Any) -> Any:
    """What a strategy was made with: two of the same settings share a recording."""
    arguments = getattr(value, "_described_args", None)
    if arguments is None or isinstance(value, nn.Module):
        return value if isinstance(value, Hashable) and not isinstance(value, nn.Module) else id(value)
    return (type(value), *((name, _settings(argument)) for name, argument in arguments.items()))


def _tensors(condition: Condition) -> list[Tensor]:
    found: list[Tensor] = []
    condition.map(lambda x: found.append(x) or x)
    return found


def _like(condition: Condition, tensors: list[Tensor]) -> Condition:
    """A condition of the same form, of these tensors, in the order of `_tensors`."""
    rest = iter(tensors)
    return condition.map(lambda _: next(rest))
