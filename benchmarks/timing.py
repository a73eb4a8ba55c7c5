"""How benchmarks measure: times cold and warm, peaks of memory, and the floor that a machine sets to them."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks import results
from nar_t2i.errors import UserError
from nar_t2i.hardware import exact_fp32, matrix_rate

LONG = 10  # seconds that warm calls of one kind may take
FEWEST = 3  # warm calls that are made even so
OVER = 30  # seconds that what has begun may take when a budget is at its end
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Key = TypeVar("Key", bound=Hashable)  # of what is timed


class Call(NamedTuple):
    """ms: of one call. cpu_ms: of the processor, in all threads, without the time that other processes took it away.
    peak_mib: of the device's memory, all that lay there included; None on a CPU, where nothing counts it."""

    ms: float
    cpu_ms: float
    peak_mib: float | None


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def once(self, run: Callable[[], Any]) -> Call:
        """One call, until the device has done all of it."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start, worked = time.perf_counter(), time.process_time()
        run()
        if self.cuda:
            torch.cuda.synchronize()
        taken, worked = 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - worked)
        return Call(taken, worked, torch.cuda.max_memory_allocated() / 2**20 if self.cuda else None)

    def warm(
        self, runs: Mapping[Key, Callable[[], Any]], repeats: int, before: Callable[[Key], None] = lambda key: None
    ) -> dict[Key, list[Call]]:
        """`repeats` calls of each, in turns, so that what else the machine does falls on all alike; fewer, but FEWEST, where
        LONG seconds have gone by. before: what is done ahead of a call and not timed."""
        calls: dict[Key, list[Call]] = {key: [] for key in runs}
        start = time.monotonic()
        for number in range(repeats):
            if number >= FEWEST and time.monotonic() > start + LONG * len(runs):
                break
            for key, run in runs.items():
                before(key)
                calls[key].append(self.once(run))
        return calls


def summary(cold: Call, warm: list[Call], others_mib: float = 0.0, held_mib: float = 0.0) -> dict[str, Any]:
    """cold_ms, p50_ms (the median), p95_ms (by the nearest rank, so of few calls the slowest), calls; on a GPU peak_mib, on a CPU
    cpu_p50_ms.

    others_mib: what lay in memory all the while and belongs to something else. held_mib: the peak of an earlier call whose
    memory is still held, which no later call counts: that of a recorded graph.
    """
    taken = sorted(call.ms for call in warm)
    rank = math.ceil(0.95 * len(taken))
    times = {"cold_ms": cold.ms, "p50_ms": median(taken), "p95_ms": taken[rank - 1], "calls": len(taken)}
    peaks = [call.peak_mib for call in (cold, *warm) if call.peak_mib is not None]
    if peaks:
        return times | {"peak_mib": max(*peaks, held_mib) - others_mib}
    return times | {"cpu_p50_ms": median(call.cpu_ms for call in warm)}


class Roofline:
    """Two ceilings of a device, measured when they are first asked for: of matrix products and of copies.

    fp32 is fp32: the shorter TF32 of tensor cores is switched off for all that is measured in this process.
    """

    def __init__(self, device: torch.device):
        self.device = device
        exact_fp32()
        self.copy_rate = copy_rate(device)

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second."""
        return matrix_rate(self.device, dtype)

    def rates(self, dtype: torch.dtype) -> dict[str, float]:
        """matrix_tflops, a second; copy_gb_s, read and written."""
        return {"matrix_tflops": self.matrix_rate(dtype) / 1e12, "copy_gb_s": self.copy_rate / 1e9}

    def floor(self, operations: float, moved: float, dtype: torch.dtype) -> dict[str, float]:
        """The least time, in ms, that floating-point operations and bytes moved take, each and both at once."""
        compute, memory = 1000 * operations / self.matrix_rate(dtype), 1000 * moved / self.copy_rate
        return {"compute_floor_ms": compute, "memory_floor_ms": memory, "floor_ms": max(compute, memory)}


def share(floor: Mapping[str, float], times: Mapping[str, Any]) -> dict[str, float]:
    """The floor (see `Roofline.floor`), and which share of the median time (see `summary`) it is."""
    return {**floor, "share_of_roofline": floor["floor_ms"] / times["p50_ms"]}


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that fits into no cache: the best of five."""
    source = torch.zeros(2**31 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, clock = torch.empty_like(source), Clock(device)
    fastest = min(clock.once(lambda: target.copy_(source)).ms for _ in range(6))
    return 2000 * source.numel() / fastest


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Of their parameters, without buffers."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


class Budget:
    """Minutes after which nothing more is begun; what is left out is told."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, name: str, seconds: float = 0.0) -> bool:
        """seconds: how long it is thought to take, of which OVER may lie behind the end."""
        now = time.monotonic()
        if now < self.end and now + seconds < self.end + OVER:
            return True
        self.left_out.append(name)
        return False


class Run:
    """The rows so far, written after each, so that a limit on the time loses little. A measurement that fails, or whose sides
    differ, is told in place of its rows, and the others have their turn."""

    def __init__(self, roofline: Roofline, budget: Budget, out: str):
        self.roofline, self.budget, self.out, self.clock = roofline, budget, out, Clock(roofline.device)
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def add(self, name: str, measure: Callable[[], Iterable[dict[str, Any]]]) -> bool:
        """Take the rows of one measurement as they come, if there is time to begin it; whether it came to its end. name: what
        it is called where it is left out or fails."""
        ended = self.budget.allows(name)
        try:
            for row in measure() if ended else ():
                self.rows.append(row)
                self.save()
        except (UserError, RuntimeError) as error:  # torch's own, too little memory among them
            self.failed.append(f"{name}: {' '.join(str(error).split())[:300]}")
            ended = False
        free()
        self.save()
        return ended

    def save(self) -> None:
        """Write what there is so far; a run begins with it, so that none that is broken off leaves an older file behind."""
        results.write(self.out, self.rows, left_out=self.budget.left_out, failed=self.failed)

    def finish(self) -> int:
        """Prints all. Returns the exit status: 1 where something failed."""
        for row in self.rows:
            print(line(row))
        for name in self.budget.left_out:
            print(f"left out, the time was up: {name}")
        for failure in self.failed:
            print(f"failed: {failure}", file=sys.stderr)
        return int(bool(self.failed))


@contextlib.contextmanager
def compiled(parts: Sequence[torch.nn.Module], mode: str | None = None) -> Iterator[None]:
    """Layers of a network by torch.compile, one of each kind for all of that kind. mode: torch.compile's."""
    for part in parts:
        part.compile(mode=mode)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None
        torch._dynamo.reset()  # or the next batch size would be compiled for any


def free() -> None:
    """Memory, and what was compiled, by us or by a peer; a GPU's peak of memory is counted anew."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed."""
    return ", ".join(f"{key} {results.number(value) if isinstance(value, float) else value}" for key, value in row.items())
