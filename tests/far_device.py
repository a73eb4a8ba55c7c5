"""A device that is not there: tensors that say they lie on `far:0`, and whose numbers a CPU computes. What only a device would
refuse is refused, too: an operation on tensors of both. So training and drawing on a GPU can be tested, but for its kernels.

`register` is for a process of its own: from then on torch takes the device for this machine's accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.checkpoint import set_checkpoint_early_stop

NEAR = torch.device("cpu")
# Whether this torch knows devices that are written in Python.
POSSIBLE = all(hasattr(backend_registration, name) for name in ("_setup_privateuseone_for_python_backend", "_DummyBackendModule"))
aten = torch.ops.aten
# Between devices, on purpose.
_COPIES = {aten._to_copy.default, aten.copy_.default}
# Indices may lie on the host; they are copied then, and waited for (which tests/training/test_stalls.py counts).
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


class Far(Tensor):
    """near: what it holds, on the CPU."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        far = Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device="far:0"
        )
        far.near = near
        return far

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Far({self.near!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.near.__reduce_ex__(protocol)  # into a checkpoint, which is read on the host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (list, tuple)):
        for item in given:
            yield from _tensors(item)


def _map(change: Callable[[Tensor], Any], given: Any) -> Any:
    if isinstance(given, Tensor):
        return change(given)
    return type(given)(_map(change, item) for item in given) if isinstance(given, (list, tuple)) else given


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == "far"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of which an argument, or the result, is far."""
    if func is aten._local_scalar_dense.default:
        return func(args[0].near)
    if func is aten._has_compatible_shallow_copy_type.default:
        return False  # so that a module's parameters are exchanged where it is moved
    if func is aten._fused_sdp_choice.default:
        return 0  # written out, of which a CPU can do the same
    if torch.Tag.nondeterministic_seeded in func.tags and func is not aten.scaled_dot_product_attention.default:
        raise RuntimeError(f"{func} draws by itself: noise is counted (nar_t2i.noise)")
    named = [*kwargs.values()]
    far = any(isinstance(x, Far) for x in _tensors([args, named]))
    if far and func not in _COPIES:
        asked = [args[0], args[2:]] if func in _INDEXED else [args, named]
        is_kernel = func.__name__.startswith("_fused_")  # which takes the address of a number, too, for one of the device
        if any(not isinstance(x, Far) and (x.ndim or is_kernel) for x in _tensors(asked)):
            shapes = [[tuple(x.shape) for x in _tensors([args, named]) if isinstance(x, Far) == is_far] for is_far in (True, False)]
            raise RuntimeError(f"{func}: tensors on far and on {NEAR}, of shapes {shapes[0]} and {shapes[1]}")
        if isinstance(args[0], Tensor) and not isinstance(args[0], Far) and func._schema.is_mutable:
            raise RuntimeError(f"{func}: a tensor on {NEAR} is changed by one on far")
    to = kwargs.get("device")
    goes_far = _is_far(to) if to is not None else (isinstance(args[0], Far) if func is aten.copy_.default else far)
    here = {**kwargs, **({"device": NEAR} if to is not None else {}), **({"pin_memory": False} if "pin_memory" in kwargs else {})}
    given = _map(_near, list(args))
    found = func(*given, **{name: _map(_near, value) for name, value in here.items()})
    if func is aten._to_copy.default and found is given[0]:
        found = found.clone()
    if not goes_far:
        return found
    wrapped = _map(Far, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if far else wrapped


def _near(x: Tensor) -> Tensor:
    return x.near if isinstance(x, Far) else x


class _Dispatched(TorchDispatchMode):
    """Has what is made on the far device, or copied to it, be far."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_far(kwargs.get("device")) or any(isinstance(x, Far) for x in _tensors([args, [*kwargs.values()]])):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    """torch.tensor copies to a device without telling a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_far(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": NEAR}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def present() -> Iterator[None]:
    """Within it there is the device."""
    # A device written in Python loses the exception by which computing a layer once more is cut short.
    with torch.autograd.set_multithreading_enabled(False), set_checkpoint_early_stop(False), _Made(), _Dispatched():
        yield


def register() -> None:
    """Needs a torch that has `POSSIBLE`."""

    class Module(backend_registration._DummyBackendModule):
        """What is `torch.far`."""

        def get_rng_state(self, device: Any = None) -> Tensor:
            return torch.zeros(0, dtype=torch.uint8)

        def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

        def device(self, device: Any) -> Any:
            return nullcontext()

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    backend_registration._setup_privateuseone_for_python_backend("far", Module())


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None: ...


def strategy() -> SingleDeviceStrategy:
    """Of Lightning, on the far device."""
    return SingleDeviceStrategy(device=torch.device("far", 0), accelerator=_Accelerator())
