"""What a rank sends: the collectives of a block of code, and the bytes that its sockets took meanwhile."""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Of Linux's struct tcp_info: where `tcpi_bytes_sent`, 64 bits, stands (include/uapi/linux/tcp.h).
BYTES_SENT = 200


class Collectives(TorchDispatchMode):
    """Counts, in a `with`, the bytes that collectives are called on, by the collective's name: of the whole tensor, which for
    a gather or scatter is the one that is gathered or scattered. Those of C++, such as DDP's, come by here as well."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d" and (tensors := list(_tensors(args))):
            name = function.overloadpacket.__name__.strip("_").replace("_base", "").replace("coalesced", "").strip("_")
            # Gathers and scatters are given the whole and the part; both may be lists.
            size = sum(t.nbytes for t in tensors)
            if name.startswith(("allgather", "reduce_scatter")):
                size -= min(_size(args[0]), _size(args[1]))
            self.payload[name] += size
            self.calls[name] += 1
        return function(*args, **kwargs or {})


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _size(value: Any) -> int:
    return sum(t.nbytes for t in _tensors([value]))


def bytes_sent() -> int:
    """By all open TCP sockets of this process so far, what was sent again included. Linux; loopback counts."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as end:
                if end.family in (socket.AF_INET, socket.AF_INET6) and end.type == socket.SOCK_STREAM:
                    total += struct.unpack_from("Q", end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232), BYTES_SENT)[0]
        except OSError:  # closed meanwhile
            continue
    return total
