"""Where the time of a training step goes.

    python benchmarks/step_time.py                # recipes/emage/346m-256 on one CUDA GPU
    python benchmarks/step_time.py --small        # its geometry in small, on any machine

The steps are those of training.py's row "everything", looked at by torch's profiler after a warm-up. A row a kind of work: the
kernels' milliseconds and number a step, and their share of it. On a GPU, "nothing runs" is the rest of the step, in which the
device waits for the host; "host waits" are the times that the host waits for the device, and how long. On a CPU the rest is
Python's. The kernels that took longest follow, by name.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from benchmarks import results
from benchmarks.small import device_for
from benchmarks.timing import free
from benchmarks.training import EVERYTHING, WARM_UP, Bench
from nar_t2i.training.command import quieten

# The first whose pattern is found in a kernel's or an operation's name.
KINDS = {
    "attention": r"flash|fmha|sdpa|scaled_dot_product",
    "optimizer, average, clipping": r"multi_tensor|foreach|fused_adam|vector_norm|lpnorm|lerp",
    "matrix products": r"gemm|cutlass|xmma|nvjet|cublas|^aten::(mm|addmm|bmm|baddbmm)$|mkldnn.*linear",
    "fused by the compiler": r"^triton_|cpp_fused|^graph_|compiled",
    "copies": r"memcpy|memset|copy",
}
OTHERS, IDLE, WAITS = "others", "nothing runs", "host waits"
LARGEST = 12  # kernels by name
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Span(NamedTuple):
    """What ran, from when to when, in microseconds."""

    name: str
    start: float
    end: float


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a hundredth of the size, for machines without a GPU")
    parser.add_argument(
        "--micro-batch", type=results.positive, help="images a step; default: about as many as fit, or 8 with --small"
    )
    parser.add_argument("--steps", type=results.positive, default=3, help="that are looked at; default: 3")
    parser.add_argument("--no-compile", action="store_true", help="leave compilation out: there is no C++ compiler, or to compare")
    parser.add_argument("--out", default=str(results.FOLDER / "step-time.json"))
    parsed = parser.parse_args()
    device = device_for(full_size=not parsed.small)
    quieten()
    results.write(parsed.out, [])  # what is broken off leaves no older file behind
    size = parsed.micro_batch or (8 if parsed.small else likely_to_fit(device))
    means = EVERYTHING | ({"compile": None} if parsed.no_compile else {})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device, parsed.small, parsed.steps)
        try:
            watch = watched(bench, means, size)
        except torch.OutOfMemoryError:
            watch = None
        if watch is None:  # outside of the handler, whose traceback holds on to what filled the memory
            free()
            size = max(1, size * 3 // 4)
            watch = watched(bench, means, size)
    rows = table(watch.kernels, watch.waits, 1e6 * watch.seconds, parsed.steps)
    results.write(parsed.out, rows, recipe="emage/346m-256" + ", in small" * parsed.small, micro_batch=size,
                  compile=means["compile"], step_ms=1000 * watch.seconds / parsed.steps)  # fmt: skip
    for row in rows:
        name = "  ".join(row[key] for key in ("part", "kernel") if key in row)
        print(f"{row['ms']:9.2f} ms {row['share']:7.1%} {row['calls']:9.1f}  {name}")
    return 0


def watched(bench: Bench, means: dict[str, Any], size: int) -> Watch:
    """What was seen of the bench's steps on micro-batches of `size` images."""
    watch = Watch(bench.steps)
    bench.train(size, means, WARM_UP + bench.steps, watch)
    return watch


def likely_to_fit(device: torch.device) -> int:
    """Images, by the 1.34 GB that each took at the largest micro-batch (docs/results/bench/training.json)."""
    return max(8, int(torch.cuda.get_device_properties(device).total_memory / 1.45e9) // 8 * 8)


class Watch(Callback):
    """Profiles `steps` steps after the warm-up. kernels: what the device ran. waits: of the host for it. seconds: of all the
    steps.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.kernels: list[Span] = []
        self.waits: list[Span] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin, once the warm-up is over."""
        if batch_idx == WARM_UP:
            self.cuda = pl_module.device.type == "cuda"
            self.profiler = profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU])
            self.profiler.__enter__()
            self._wait()
            self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End, after the last of the steps."""
        if batch_idx != WARM_UP + self.steps - 1:
            return
        self._wait()
        self.seconds = time.perf_counter() - self.began
        self.profiler.__exit__(None, None, None)
        if not self.cuda:  # operations call one another: of each, its own time, laid end to end
            end = 0.0
            for event in self.profiler.events():
                self.kernels.append(Span(event.name, end, end := end + event.self_cpu_time_total))
            return
        spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in self.profiler.events()]
        self.waits = [span for span in spans if span.name in WAITING]
        of_device = [event.device_type == torch.autograd.DeviceType.CUDA for event in self.profiler.events()]
        self.kernels = [span for span, on in zip(spans, of_device, strict=True) if on]

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def kind_of(name: str) -> str:
    """The kind of work that a kernel or an operation of this name does."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHERS)


def busy(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span.start):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def table(kernels: list[Span], waits: list[Span], whole: float, steps: int) -> list[dict[str, Any]]:
    """A row a kind of work, then one for each of the LARGEST kernels. whole: microseconds of all the steps."""

    def row(part: str, spent: float, calls: float, **more: Any) -> dict[str, Any]:
        return {"part": part, **more, "ms": spent / steps / 1000, "share": spent / whole, "calls": calls / steps}

    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, start, end in kernels:
        spent[name] += end - start
        calls[name] += 1
    rows = []
    for kind in (*KINDS, OTHERS):
        names = [name for name in spent if kind_of(name) == kind]
        rows.append(row(kind, sum(spent[name] for name in names), sum(calls[name] for name in names)))
    rows.append(row(IDLE, max(0.0, whole - busy(kernels)), 0))
    rows.append(row(WAITS, sum(end - start for _, start, end in waits), len(waits)))
    largest = sorted(spent, key=spent.__getitem__, reverse=True)[:LARGEST]
    return rows + [row(kind_of(name), spent[name], calls[name], kernel=" ".join(name.split())[:100]) for name in largest]


if __name__ == "__main__":
    results.program(main)
