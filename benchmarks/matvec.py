"""What a pass of one token could take at best: the autoregressive twin's matrices alone, each times two rows, without attention.

    python benchmarks/matvec.py --out docs/results/bench/matvec.json      # the twin of recipes/emage/ar-346m-256, a CUDA GPU
    python benchmarks/matvec.py --small --out runs/matvec.json            # in small, on any machine

A pass of the twin is a chain: every matrix waits for what the one before has made, and has two rows to do, so that reading it is
all its work. Here they follow each other as torch's own operations, and as one kernel each, which norms its input before, and adds,
or applies the activation, behind; with `early` a kernel begins to read its matrix while the one before still runs (Hopper's
programmatic launch). All are recorded as a graph. Beside them stands how long the bytes take at the copy rate: where even
these kernels come to a part of that, no implementation with a kernel a matrix comes to more. What the kernels compute is
compared with torch's in double precision first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import results
from benchmarks.small import device_for
from benchmarks.timing import Budget, Roofline, Run, summary, weight_bytes
from nar_t2i import recipe
from nar_t2i.errors import UserError

TWIN = "emage/ar-346m-256"
ROWS, CODES = 2, 8192
SETTINGS = [
    {"outputs": outputs, "warps": warps, "early": early}
    for outputs, warps in ((8, 4), (4, 4), (8, 8), (16, 8))
    for early in (False, True)
]
SMALL = {"width": 64, "depth": 2}


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="small matrices, for machines without a GPU")
    parser.add_argument("--repeats", type=results.positive, default=50, help="warm passes; default: 50")
    parser.add_argument("--minutes", type=float, default=60, help="after which nothing more is begun; default: 60")
    parser.add_argument("--out", default="docs/results/bench/matvec.json")
    parsed = parser.parse_args()
    device = device_for(full_size=not parsed.small)
    sizes = recipe.load(TWIN).config["model"]["init_args"]["network"]["init_args"] | (SMALL if parsed.small else {})
    run = Run(Roofline(device), Budget(parsed.minutes), parsed.out)
    run.save()
    torch.manual_seed(0)
    with device:
        chain = Chain(sizes["width"], sizes["depth"]).to(torch.bfloat16).eval().requires_grad_(False)
        x = torch.randn(ROWS, sizes["width"], dtype=torch.bfloat16)
    expected = chain.double()(x.double())
    chain.to(torch.bfloat16)

    def add(kernels: dict[str, Any], call: Callable[[], Tensor]) -> None:
        run.add(str(kernels), lambda: rows(run, chain, kernels, call, expected, parsed.repeats))

    add({"kernels": "torch's"}, lambda: chain(x))
    for setting in SETTINGS if device.type == "cuda" else ():
        add({"kernels": "one a matrix", **setting}, functools.partial(fused, chain, x, **setting))
    return run.finish()


class Chain(nn.Module):
    """The matrices of the twin's blocks, and the head's, in the order and with the norms of a pass."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        # qkv, out; q, out; the two of the MLP. The norm stands in front of every other one.
        of_block = [(width, 3 * width), (width, width), (width, width), (width, width), (width, 4 * width), (4 * width, width)]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in [*of_block * depth, (width, CODES)])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.layers[::2])

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) → (rows, CODES)."""
        for number, layer in enumerate(self.layers):
            if number % 2 == 0:
                hidden = layer(self.norms[number // 2](x))
                hidden = F.gelu(hidden) if number % 6 == 4 else hidden
            else:
                x = x + layer(hidden[:, : layer.in_features])  # of queries, keys and values the first, in attention's place
        return hidden


@torch.no_grad()
def rows(
    run: Run, chain: Chain, kernels: dict[str, Any], call: Callable[[], Tensor], expected: Tensor, repeats: int
) -> Iterator[dict[str, Any]]:
    """One row: how long `call` takes, which is the chain's forward pass, as a graph on a GPU. kernels: what the row says of how it
    is done. expected: (rows, CODES), in double precision; UserError where the outcome is far from it.
    """
    replay, result = recorded(call) if run.roofline.device.type == "cuda" else (call, call())
    replay()
    differ = ((result.double() - expected).norm() / expected.norm()).item()
    if not differ < 0.05:
        raise UserError(f"{kernels}: differs by {differ:.2g} from double precision, so no time is reported")
    cold = run.clock.once(replay)
    times = summary(cold, run.clock.warm({"": replay}, repeats)[""])
    moved = weight_bytes(chain)
    floor = 1000 * moved / run.roofline.copy_rate
    yield {
        **kernels,
        "rows": ROWS,
        "matrices": len(chain.layers),
        "bytes": moved,
        "differ": differ,
        **times,
        "copy_gb_s": run.roofline.copy_rate / 1e9,
        "memory_floor_ms": floor,
        "share_of_bandwidth": floor / times["p50_ms"],
    }


def recorded(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """`call` as a CUDA graph: what replays it, and the tensor that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def fused(chain: Chain, x: Tensor, outputs: int, warps: int, early: bool) -> Tensor:
    """As Chain.forward. outputs: that a program computes, half as many where there are few. warps: of a program. early: see
    matvec_kernel.py.
    """
    from benchmarks.matvec_kernel import matvec

    hidden = x
    for number, layer in enumerate(chain.layers):
        first, norm = number % 2 == 0, chain.norms[number // 2]
        source = x if first else hidden
        few = layer.out_features <= chain.layers[1].out_features
        block = max(4, outputs // 2) if few else outputs
        made = torch.empty(ROWS, layer.out_features, dtype=x.dtype, device=x.device)
        matvec[(layer.out_features // block,)](
            source, source.shape[1], layer.weight, layer.bias, norm.weight, norm.bias, x, made, layer.out_features,
            width=layer.in_features, rows=ROWS, block=block, part=min(1024, layer.in_features),
            norm=first, gelu=number % 6 == 4, add=not first, early=early, num_warps=warps, launch_pdl=early,
        )  # fmt: skip
        if first:
            hidden = made
        else:
            x = made
    return hidden


if __name__ == "__main__":
    results.program(main)
