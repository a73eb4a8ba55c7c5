"""How long an image takes: text encoder, decoder passes and image decoder, of Emage and of its autoregressive twin.

    python benchmarks/decoding.py --out docs/results/decoding/gpu.json             # 346M, 1,024 tokens, a CUDA GPU
    python benchmarks/decoding.py --small --out runs/decoding.json                 # the same in small, on any machine

Networks have the geometry of recipes/emage and random weights, in bf16; prompts have 32 words; guidance is on. Every part is
timed by itself, cold (the first timed call; of a graph, the one that records it) and warm (median and 95th percentile), with and without CUDA
graphs, beside its floor: what its operations take at the matrix rate, or its bytes at the copy rate, whichever is more, both
measured in the same run. A graph must draw what plain launches draw, or its time is not reported.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.folders import write_json
from nar_t2i.hardware import best_device, describe_machine, matrix_rate
from nar_t2i.inference.graphs import Graphs
from nar_t2i.noise import Noise
from nar_t2i.parts import build
from nar_t2i.schedules import Guidance
from nar_t2i.text.null import NullCaption
from nar_t2i.types import Condition, Decoded, InferenceStrategy, TokenNetwork, TokenSpec

WORDS = 32
SMALL = {"width": 64, "depth": 2, "heads": 2}
SMALL_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SMALL_CODEC = {"image_size": 64, "channels": [16, 16, 16], "blocks": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a hundredth of the size, for machines without a GPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="images at once; default: 1 16")
    parser.add_argument("--repeats", type=int, default=20, help="warm calls of each part; default: 20")
    parser.add_argument("--twin-repeats", type=int, default=5, help="of the autoregressive twin; default: 5")
    parser.add_argument("--compile", action="store_true", help="the networks, too, with torch.compile")
    parser.add_argument("--out", default="docs/results/decoding/gpu.json")
    parsed = parser.parse_args()
    out = Path(parsed.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    device = best_device()
    if device.type != "cuda" and not parsed.small:
        raise UserError("the full size needs a CUDA GPU; --small runs anywhere")
    bench = Bench(device, parsed.small, parsed.compile)
    metrics: dict[str, Any] = {
        "command": "python benchmarks/decoding.py " + " ".join(sys.argv[1:]), "machine": describe_machine(), "torch": torch.__version__,
        "matrix_rate": bench.rate, "copy_rate": bench.bandwidth, "parts": [],
    }  # fmt: skip
    for batch in parsed.batch:
        for name, repeats in (("emage/346m-256", parsed.repeats), ("emage/ar-346m-256", parsed.twin_repeats)):
            metrics["parts"] += bench.decoding(name, batch, repeats)
            write_json(out, metrics)  # after each, so that a limit on the time loses little
        metrics["parts"] += [bench.text(batch, parsed.repeats), bench.image(batch, parsed.repeats)]
        write_json(out, metrics)
    for part in metrics["parts"]:
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in part.items()))
    return 0


class Bench:
    """The parts, made when they are asked for, and how they are timed."""

    def __init__(self, device: torch.device, small: bool, compile: bool):
        self.device, self.small, self.compile = device, small, compile
        self.rate, self.bandwidth = matrix_rate(device, torch.bfloat16), copy_rate(device)
        codec = recipe.load("emage/tokenizer").config["model"]["init_args"]["codec"]
        codec["init_args"].update(SMALL_CODEC if small else {})
        self.codec = self.place(build(codec))
        self.spec: TokenSpec = self.codec.spec
        config = transformers.BertConfig(**(SMALL_BERT if small else {}))
        self.bert = self.place(transformers.BertModel(config, add_pooling_layer=False))
        self.null = self.place(NullCaption((config.hidden_size,)))

    def place(self, module: Any) -> Any:
        return module.to(self.device, torch.bfloat16).eval().requires_grad_(False)

    def network(self, described: dict[str, Any]) -> TokenNetwork:
        arguments = {**described["init_args"], **(SMALL if self.small else {})}
        spec_and_text = {"spec": self.spec, "text_widths": (self.bert.config.hidden_size,)}
        torch.manual_seed(0)
        network = build({"class_path": described["class_path"], "init_args": arguments | spec_and_text})
        torch.nn.init.normal_(network.head.logits.weight, std=0.02)  # which starts at zero: all codes alike
        return self.place(network)

    def condition(self, batch: int) -> Condition:
        words = torch.arange(batch * WORDS, device=self.device).view(batch, WORDS) % self.bert.config.vocab_size
        mask = torch.ones(batch, WORDS, dtype=torch.bool, device=self.device)
        return Condition((self.bert(words, mask.long()).last_hidden_state,), (mask,))

    @torch.no_grad()
    def decoding(self, name: str, batch: int, repeats: int) -> list[dict[str, Any]]:
        """The decoder alone, plainly launched, and on a GPU as a graph as well."""
        model = recipe.load(name).config["model"]["init_args"]
        network, guidance = self.network(model["network"]), Guidance(**model["guidance"])
        inference: InferenceStrategy = build({"init_args": {}, **model["inference"]})
        condition = self.condition(batch)
        null, noise = self.null(condition), Noise(0, torch.arange(batch, device=self.device))

        def plain() -> Decoded:
            return inference.decode(network, condition, null, noise, guidance)

        counter = FlopCounterMode(display=False)
        with counter:
            expected = plain()
        if self.compile:
            network.compile()
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        kept = expected.passes * weights + (cache_bytes(model["network"]["init_args"] | (SMALL if self.small else {}), self.spec, 2 * batch)
                                            if network.causal else 0)  # fmt: skip
        known = {"part": name, "compiled": self.compile, "batch": batch, "parameters": sum(p.numel() for p in network.parameters()), "passes": expected.passes}
        floor = self.floor(counter.get_total_flops(), kept)
        found = [known | {"launched": "plainly"} | self.time(plain, repeats, floor)]
        if self.device.type == "cuda":
            graphs = Graphs()
            graphs.decode(inference, network, condition, null, noise, guidance)  # once as it comes; the next time is recorded
            self.wait()
            start = time.perf_counter()
            drawn = graphs.decode(inference, network, condition, null, noise, guidance)
            self.wait()
            cold = time.perf_counter() - start
            agreement = (drawn.tokens == plain().tokens).float().mean().item()
            if agreement < 0.99:
                raise UserError(f"{name}, batch {batch}: the graph draws {1 - agreement:.1%} of the tokens otherwise")
            recorded = self.time(lambda: graphs.decode(inference, network, condition, null, noise, guidance), repeats, floor)
            found.append(known | {"launched": "as a graph", "agreement": agreement} | recorded | {"cold_ms": 1000 * cold})
        return found

    @torch.no_grad()
    def text(self, batch: int, repeats: int) -> dict[str, Any]:
        return {"part": "text encoder", "batch": batch} | self.time(lambda: self.condition(batch), repeats, None)

    @torch.no_grad()
    def image(self, batch: int, repeats: int) -> dict[str, Any]:
        tokens = self.spec.blank(batch, self.device)
        return {"part": "image decoder", "batch": batch} | self.time(lambda: self.codec.decode(tokens), repeats, None)

    def floor(self, operations: float, moved: float) -> dict[str, float]:
        compute, memory = 1000 * operations / self.rate, 1000 * moved / self.bandwidth
        return {"compute_floor_ms": compute, "memory_floor_ms": memory, "floor_ms": max(compute, memory)}

    def time(self, run: Callable[[], Any], repeats: int, floor: dict[str, float] | None) -> dict[str, Any]:
        """cold_ms, p50_ms, p95_ms, the peak of memory, and the share of the roofline."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = []
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            taken.append(1000 * (time.perf_counter() - start))
        cold, *warm = taken
        warm.sort()
        found = {"cold_ms": cold, "p50_ms": warm[len(warm) // 2], "p95_ms": warm[min(len(warm) - 1, round(0.95 * len(warm)))]}
        if self.device.type == "cuda":
            found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        return found | (floor | {"share_of_roofline": floor["floor_ms"] / found["p50_ms"]} if floor else {})

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that fits into no cache: the best of five."""
    source = torch.zeros(2**31 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, fastest = torch.empty_like(source), float("inf")
    wait = torch.cuda.synchronize if source.is_cuda else lambda: None
    for _ in range(6):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * source.numel() / fastest


def cache_bytes(network: dict[str, Any], spec: TokenSpec, rows: int) -> int:
    """What a key-value cache in bf16 is read for, over all passes."""
    return rows * network["depth"] * 2 * network["width"] * 2 * spec.length * (spec.length + 1) // 2


if __name__ == "__main__":
    sys.exit(main())
