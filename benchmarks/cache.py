"""Cached tokens and text states beside making them anew, and beside webdataset reading the same arrays.

    python benchmarks/cache.py                          # after nar-t2i quickstart
    python benchmarks/cache.py --shards runs/emoji/64/train --tokenizer runs/emoji/tokenizer/model --cache runs/emoji/tokens/train \
        --text-cache runs/emoji/minilm_states/train --text emoji/minilm --run runs/emoji/minilm --fp32 --out docs/results/cache/emoji.json

One process, batches of the quickstart's size, in turns; the medians are written as JSON, with what a sample takes on disk
and the share of its time for which a run waited for data. What is compared must agree: a side that reads other tokens than
the cache, or other states, ends the benchmark.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor

from nar_t2i.data import CaptionedImages
from nar_t2i.errors import UserError
from nar_t2i.folders import load_part, write_json
from nar_t2i.hardware import describe_machine, fast_precision
from nar_t2i.pixels import to_float
from nar_t2i.prepare.text import find_text
from nar_t2i.types import Condition

Batches = Iterator[tuple[Tensor, Any]]  # tokens, and captions or states


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="runs/quickstart/data/train", help="default: runs/quickstart/data/train")
    parser.add_argument("--tokenizer", default="runs/quickstart/tokenizer/model", help="default: the quickstart's")
    parser.add_argument("--cache", default="runs/quickstart/tokens/train", help="tokens; default: the quickstart's")
    parser.add_argument("--run", default="runs/quickstart/generator", help="that trained on them; default: the quickstart's")
    parser.add_argument("--text-cache", help="states of the captions; default: tokens alone")
    parser.add_argument("--text", help="what made them: a recipe, a run or a model folder")
    parser.add_argument("--fp32", action="store_true", help="the tokens were made so (encode_tokens), not as a quickstart makes them")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="docs/results/cache/quickstart.json")
    parsed = parser.parse_args()
    bench = Bench(parsed)
    metrics: dict[str, Any] = {
        "command": "python benchmarks/cache.py " + " ".join(sys.argv[1:]), "machine": describe_machine(),
        "batch_size": parsed.batch_size, "bytes_a_sample": bench.sizes(), "data_wait": data_wait(Path(parsed.run)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        metrics["tokens"] = bench.compare(Path(folder, "tokens.tar"), parsed.samples, parsed.rounds, bench.codec_batches)
        if parsed.text_cache:
            encoder = find_text(parsed.text)
            anew = lambda: bench.text_batches(encoder)  # noqa: E731
            metrics["text"] = bench.compare(Path(folder, "text.tar"), parsed.samples, parsed.rounds, anew, states=True)
    Path(parsed.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(parsed.out), metrics)
    for name in ("tokens", "text"):
        print(name, metrics.get(name))
    return 0


class Bench:
    """The sides of the comparison, each an iterator over batches."""

    def __init__(self, parsed: argparse.Namespace):
        self.shards, self.cache, self.text_cache, self.batch_size = parsed.shards, parsed.cache, parsed.text_cache, parsed.batch_size
        self.bf16 = not parsed.fp32 and fast_precision() == "bf16-mixed"
        self.codec = load_part(Path(parsed.tokenizer)).eval()

    def data(self, cached: bool, states: bool) -> CaptionedImages:
        return CaptionedImages(
            image_size=self.codec.image_size, global_batch_size=self.batch_size, train=self.shards, cache=self.cache if cached else None,
            text_cache=self.text_cache if states else None,
        )  # fmt: skip

    def cached_batches(self, states: bool = False) -> Batches:
        for batch in self.data(True, states).train_dataloader():
            yield batch.tokens, batch.condition if states else batch.captions

    @torch.no_grad()
    def codec_batches(self) -> Batches:
        """Images decoded and encoded, in the precision in which the cache was filled."""
        for batch in self.data(False, False).train_dataloader():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                tokens = self.codec.encode(to_float(batch.images)).tokens
            yield tokens, batch.captions

    @torch.no_grad()
    def text_batches(self, encoder: Any) -> Batches:
        """Cached tokens, captions encoded as they come, in float32, as `encode_text` does."""
        for tokens, captions in self.cached_batches():
            yield tokens, encoder(captions)

    def tar_batches(self, tar: Path, states: bool) -> Batches:
        """webdataset over the same arrays, in the order of the file, without workers."""
        fields = ("tokens.npy", "states.npy") if states else ("tokens.npy", "caption.txt")
        reader = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False).decode().to_tuple(*fields)
        for tokens, other in reader.batched(self.batch_size, collation_fn=lambda rows: tuple(zip(*rows, strict=True))):
            yield torch.from_numpy(np.stack(tokens).astype(np.int64)), _padded(other) if states else list(other)

    def write_tar(self, tar: Path, samples: int, states: bool) -> None:
        """What the cache yields, a sample a member group, the arrays as small as they are in the cache."""
        smallest = np.min_scalar_type(self.codec.spec.size - 1)
        with webdataset.TarWriter(str(tar)) as writer:
            number = itertools.count()
            for tokens, other in itertools.islice(self.cached_batches(states), samples // self.batch_size):
                for row in range(len(tokens)):
                    stored = tokens[row].numpy().astype(smallest)
                    member: dict[str, Any] = {"__key__": f"{next(number):07d}", "tokens.npy": stored}
                    if states:
                        member["states.npy"] = other.states[0][row, other.masks[0][row]].numpy()
                    else:
                        member["caption.txt"] = other[row]
                    writer.write(member)

    def compare(self, tar: Path, samples: int, rounds: int, anew: Callable[[], Batches], states: bool = False) -> dict[str, Any]:
        """Samples a second of each side, and the cache's over the others'."""
        self.write_tar(tar, samples, states)
        sides: dict[str, Callable[[], Batches]] = {
            "cached": lambda: self.cached_batches(states), "made_anew": anew, "webdataset": lambda: self.tar_batches(tar, states),
        }  # fmt: skip
        self.agree(sides, states)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, batches in sides.items():
                count = samples // self.batch_size // (8 if name == "made_anew" else 1)
                rates[name].append(rate(batches(), count) * self.batch_size)
        found = {f"{name}_samples_per_second": median(values) for name, values in rates.items()}
        for name in ("made_anew", "webdataset"):
            ratios = [own / other for own, other in zip(rates["cached"], rates[name], strict=True)]
            found[f"cached_over_{name}"] = {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        return found

    def agree(self, sides: dict[str, Callable[[], Batches]], states: bool) -> None:
        """UserError where the sides do not read the same. A code in a thousand may differ where sums were grouped otherwise."""
        (tokens, other), *rest = (next(batches()) for batches in sides.values())
        for name, (found, found_other) in zip(list(sides)[1:], rest, strict=True):
            share = (found != tokens).double().mean().item()
            if share > 1e-3:
                raise UserError(f"{name} reads other tokens than the cache: {share:.1%} of the first batch")
            if not states and list(found_other) != list(other):
                raise UserError(f"{name} reads other captions than the cache")
            if states:
                off = (found_other.states[0].float() - other.states[0].float())[other.masks[0]].abs().max().item()
                if off > 2e-2:
                    raise UserError(f"{name} reads other states than the cache: {off} apart")

    def sizes(self) -> dict[str, float]:
        """Bytes a sample: raw pixels, shards, tokens, states."""
        source = self.data(True, False).source("train")
        found = {"pixels": 3.0 * self.codec.image_size**2, "shards": _bytes(Path(self.shards), ".tar") / len(source)}
        found["tokens"] = _bytes(Path(self.cache), ".tokens.npy") / len(source)
        if self.text_cache:
            found["text_states"] = _bytes(Path(self.text_cache), ".safetensors") / len(source)
        return found


def rate(batches: Batches, count: int) -> float:
    """Batches a second over `count` of them, after two."""
    next(batches), next(batches)
    start, read = time.perf_counter(), 0
    for _ in itertools.islice(batches, count - 2):
        read += 1
    return read / (time.perf_counter() - start)


def data_wait(run: Path) -> float:
    """The median share of its time that a run spent waiting for data."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return median(float(row["data_wait"]) for row in csv.DictReader(file) if row.get("data_wait"))


def _padded(states: tuple[np.ndarray, ...]) -> Condition:
    """As the cache hands them over: (B, L, D) and (B, L)."""
    rows = [torch.from_numpy(state) for state in states]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return Condition((padded,), (torch.arange(padded.shape[1]) < lengths[:, None],))


def _bytes(folder: Path, ending: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(f"*{ending}"))


if __name__ == "__main__":
    sys.exit(main())
