"""What this machine does best."""

from __future__ import annotations

import os
import platform
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@cache
def fast_precision() -> str:
    """Lightning's name of the faster precision of this machine: "bf16-mixed" or "32-true".

    A GPU takes bf16 if it computes in it; those before Ampere only imitate it. A CPU takes it where its bf16 matrix product,
    measured here once, beats fp32 clearly: those with bf16 instructions are several times faster, those without are slower.
    """
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if _seconds(torch.bfloat16) < 0.8 * _seconds(torch.float32) else "32-true"


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product: the best of five, measured here once."""
    size = 8192 if device.type == "cuda" else 512
    return 4 * 2 * size**3 / _seconds(dtype, size, device=device)


def operation_counter() -> FlopCounterMode:
    """Counts the floating-point operations of forward passes, and with them those of a CPU's fused attention, which torch's own
    counter leaves out."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *others: object, **more: object) -> int:
        return sdpa_flop_count(q, k, v)

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: attention})


def _seconds(dtype: torch.dtype, size: int = 512, trials: int = 5, device: torch.device | str = "cpu") -> float:
    """The fastest of `trials` times for four products."""
    a = torch.randn(size, size, device=device, generator=torch.Generator(device)).to(dtype)
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    fastest = float("inf")
    for _ in range(trials):
        wait()
        start = time.perf_counter()
        for _ in range(4):
            a @ a
        wait()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def exact_fp32() -> None:
    """From now on fp32 is fp32 on a GPU, too, whose convolutions would round to TF32: what is measured says the same everywhere."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def best_device() -> torch.device:
    """Where a model draws fastest: the first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_cores() -> int:
    """Cores that this process may run on, which a scheduler or a container may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, str | int]:
    """The machine that a number came from: processor, cores, accelerator."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": model, "cores": usable_cores(), "accelerator": accelerator, "fast_precision": fast_precision()}
