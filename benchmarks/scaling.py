"""Several ranks on this machine's CPU, as a check of the shape, and a model of many GPUs (docs/scaling.md).

    python benchmarks/scaling.py                  # 1, 2 and 4 ranks over gloo, DDP and ZeRO 1 to 3; a minute or two
    python benchmarks/scaling.py --model          # the tables of docs/scaling.md

Measured is, of each rank count and strategy on the same global batch: the bytes that a rank's collectives are called on and
those that its sockets send a step, beside the model's; the bytes of weights, optimizer and average that it holds, beside the
doctor's; and the time of a step (the fastest of a few, since others may use the machine), over that of one rank under DDP. Losses
must be those of one rank, or nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks import results
from benchmarks.held import really_held
from benchmarks.timing import line
from benchmarks.traffic import Collectives, bytes_sent
from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.training import zero
from nar_t2i.training.command import quieten
from nar_t2i.training.memory import STAGES, Trained, held

# Bytes sent by each rank of a ring over the payload, times (n − 1)/n (Patarasuk and Yuan 2009). NCCL's; gloo has no
# reduce-scatter of its own and reduces all.
RING = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1}
GLOO = RING | {"reduce_scatter": 2}
WARM_UP, TIMED = 3, 5  # steps; ZeRO-3 watches the first to know what is read when
IMAGES = 8  # a step, on all ranks

PARAMETERS = 345_876_480  # of the recipe: decoder, BERT-base and null caption

# The model's machine: an H100 or H200 has a data-sheet rate of 989 TFLOP/s in bf16, of which large products reach about three
# quarters. Links in bytes a second.
MATRIX_RATE, UTILISATION = 7.5e14, 0.5
NODE_LINK, GPU_LINK, GPUS_A_NODE = 50e9, 450e9, 8


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--model", action="store_true", help="print the model's tables")
    parser.add_argument("--ranks", type=results.positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--out", default=str(results.FOLDER / "scaling.json"))
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # the folder of the results, on each rank
    parsed = parser.parse_args()
    if parsed.model:
        print(tables(), end="")
        return 0
    if parsed.rank_of:
        work(Path(parsed.rank_of), parsed.strategies, parsed.precision)
        return 0
    results.write(parsed.out, [])  # what is broken off leaves no older file behind
    rows = measure(sorted(parsed.ranks), parsed.strategies, parsed.precision)
    results.write(parsed.out, rows, images_a_step=IMAGES, precision=parsed.precision, cores=os.cpu_count())
    for row in rows:
        print(line(row))
    return 0


# Measured


def measure(ranks: list[int], strategies: list[str], precision: str) -> list[dict[str, Any]]:
    """A row a rank count and strategy. UserError where losses differ."""
    rows: list[dict[str, Any]] = []
    expected: list[float] = []
    for count in ranks:
        each_rank = launch(count, strategies, precision)
        for strategy in strategies:
            each = [records[strategy] for records in each_rank]
            losses = [mean(values) for values in zip(*(one["losses"] for one in each), strict=True)]
            expected = expected or losses
            check(f"{strategy} on {count} ranks", losses, expected, f"{strategies[0]} on {ranks[0]}")
            rows.append(_row(count, strategy, each, precision))
    one_rank = rows[0]["step_ms"] if ranks[0] == 1 else None
    return [row | ({"step_over_first": row["step_ms"] / one_rank} if one_rank else {}) for row in rows]


def _row(count: int, strategy: str, each: list[dict[str, Any]], precision: str) -> dict[str, Any]:
    groups, half = each[0]["groups"], "16" in precision
    total = sum(map(sum, groups))
    trained = Trained(groups, [each[0]["frozen"]] if each[0]["frozen"] else [], 0, 8 * total, 4 * total)
    estimate = held(trained, count, STAGES[strategy], half)
    model = payload(total, count, strategy, half)
    return {
        "ranks": count,
        "strategy": strategy,
        "parameters": total,
        "step_ms": 1000 * min(max(times) for times in zip(*(one["seconds"] for one in each), strict=True)),
        **{f"{name}_bytes": max(one["payload"].get(name, 0) for one in each) for name in RING},
        "sent_bytes": mean(one["sent"] for one in each),
        "model_sent_bytes": wire(model, count, GLOO),
        **{f"{name}_bytes": max(one[name] for one in each) for name in ("weights", "optimizer", "average")},
        "doctor_weights_bytes": estimate.weights,
        "doctor_optimizer_bytes": estimate.optimizer,
        "doctor_average_bytes": estimate.average,
    }


def check(name: str, losses: list[float], expected: list[float], other: str) -> None:
    """UserError where losses differ by more than a twentieth of what they fall by, or do not fall."""
    fall = expected[0] - expected[-1]
    if not fall > 1e-3 * expected[0]:
        raise UserError(f"the loss does not fall ({expected}): nothing can be compared")
    if not all(abs(a - b) <= fall / 20 for a, b in zip(losses, expected, strict=True)):
        raise UserError(f"{name} takes other losses than {other}: {losses}, not {expected}")


def launch(count: int, strategies: list[str], precision: str) -> list[dict[str, Any]]:
    """Of each rank, the record of a run (see `Watch`) by strategy."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__,
                   "--rank-of", folder, "--precision", precision, "--strategies", *strategies]  # fmt: skip
        path = os.pathsep.join(filter(None, [str(results.ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode:
            traceback = done.stderr[max(0, done.stderr.find("Traceback")) :]  # the first is a rank's, the last the launcher's
            raise UserError(f"{count} ranks ended with status {done.returncode}: {traceback[:2000]}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]


class Watch(Callback):
    """Losses of all steps, the traffic of one, the time of those after it, and what is held at the end, as a `record`: losses,
    seconds; payload, bytes by collective; sent, bytes; and what `really_held` gives."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"losses": [], "seconds": []}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step on all ranks at once; listen to the last one of the warm-up."""
        self.collectives = Collectives() if batch_idx == WARM_UP - 1 else None
        _together()
        self.sent, self.begun = bytes_sent(), time.perf_counter()
        if self.collectives:
            self.collectives.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the step."""
        seconds = time.perf_counter() - self.begun
        if self.collectives:
            self.collectives.__exit__(None, None, None)
            self.record |= {"payload": dict(self.collectives.payload), "sent": bytes_sent() - self.sent}
        if batch_idx >= WARM_UP:
            self.record["seconds"].append(seconds)
        self.record["losses"].append(outputs["loss"].item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what the rank holds."""
        self.record |= really_held(trainer, pl_module)


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


def work(folder: Path, strategies: list[str], precision: str) -> None:
    """On each rank: train under each strategy, and write its records into the folder, as RANK.json."""
    from benchmarks import training

    quieten()
    zero.register()
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    codec, records = training.random_codec(small=True), {}
    bert = training.random_bert(folder / f"bert-{rank}", small=True)
    for strategy in strategies:
        watch = Watch()
        module = training.random_generator(codec, bert, small=True)
        trainer = training.trainer(folder, [watch], max_steps=WARM_UP + TIMED, devices=ranks, accelerator="cpu", strategy=strategy,
                                   precision=precision)  # fmt: skip
        trainer.fit(module, datamodule=training.RandomCodes(codec, IMAGES, torch.device("cpu"), rank, ranks))
        records[strategy] = watch.record
    (folder / f"{rank}.json").write_text(json.dumps(records))
    dist.destroy_process_group() if dist.is_initialized() else None


# The model


def payload(parameters: int, ranks: int, strategy: str, half: bool) -> dict[str, float]:
    """The bytes that the collectives of a step are called on, in the run as it goes on.

    DDP reduces gradients in fp32. DeepSpeed's stages 1 and 2 reduce all gradients everywhere, though a rank keeps a part, and
    then gather the weights. Stage 3 gathers the weights once a step as long as they all fit into the 10⁹ elements that it
    keeps whole, and scatters gradients. All of them are of the width of the weights that are computed with.
    """
    if ranks == 1:
        return {}
    width = 2 if half else 4
    if strategy == "ddp":
        return {"allreduce": 4.0 * parameters}
    if STAGES[strategy] == 3:
        return {"allgather": float(width * parameters), "reduce_scatter": float(width * parameters)}
    return {"allreduce": float(width * parameters), "allgather": float(width * parameters)}


def wire(payloads: dict[str, float], ranks: int, factors: dict[str, int]) -> float:
    """The bytes that each rank of a ring sends."""
    return sum(size * factors[name] for name, size in payloads.items()) * (ranks - 1) / ranks


def forward_operations(network: dict[str, Any], passes: float, tokens: int, codes: int, words: int, bert: dict[str, int]) -> float:
    """Floating-point operations of a forward pass, an image: two for each multiplication of two matrices.

    network: EncoderDecoder's width and depth. words: length of a caption, in the encoder's tokens. bert: hidden_size,
    num_hidden_layers, intermediate_size. The head reads 2/π of the slots, the mean of the cosine schedule, in every pass.
    """
    width, depth, hidden = network["width"], network["depth"], bert["hidden_size"]
    self_attention = 8 * tokens * width**2 + 4 * tokens**2 * width
    cross_attention = 4 * tokens * width**2 + 4 * tokens * words * width
    block = self_attention + cross_attention + 16 * tokens * width**2  # and the MLP
    head = 2 * (2 / math.pi) * tokens * width * codes
    prepared = depth * 4 * words * width**2 + 2 * words * hidden * width  # keys and values; the projection of the states
    text = bert["num_hidden_layers"] * (
        8 * words * hidden**2 + 4 * words**2 * hidden + 4 * words * hidden * bert["intermediate_size"]
    )
    return passes * (depth * block + head) + prepared + text


def predict(gpus: int, strategy: str, parameters: int, operations: float, images: int) -> dict[str, Any]:
    """A step of `images` on `gpus`: seconds of work, seconds of each exchange, and the efficiency without and with overlap.

    Gradients travel during the backward pass, two thirds of the work; under stage 3 the weights travel during all of it. Under
    stages 1 and 2 the weights are gathered after the update, when nothing else is to be done.
    """
    nodes = -(-gpus // GPUS_A_NODE)
    # In a ring over nodes, what a rank sends crosses each node's link once.
    link = NODE_LINK if nodes > 1 else GPU_LINK
    payloads = payload(parameters, gpus, strategy, half=True)
    work = 3 * operations * images / gpus / (MATRIX_RATE * UTILISATION)
    seconds = {name: wire({name: size}, gpus, RING) / link for name, size in payloads.items()}
    if STAGES[strategy] == 3:
        step = max(work, sum(seconds.values()))
    else:
        step = work / 3 + max(work * 2 / 3, seconds.get("allreduce", 0.0)) + seconds.get("allgather", 0.0)
    return {
        "gpus": gpus, "strategy": strategy, "images a GPU": images // gpus, "work_ms": 1000 * work,
        "sent_gb": wire(payloads, gpus, RING) / 1e9, "exchange_ms": 1000 * sum(seconds.values()),
        "without overlap": work / (work + sum(seconds.values())), "with overlap": work / step,
    }  # fmt: skip


def tables() -> str:
    """The model's table, in Markdown."""
    config = recipe.load("emage/346m-256").config
    network, images = config["model"]["init_args"]["network"]["init_args"], config["data"]["init_args"]["global_batch_size"]
    bert = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
    operations = forward_operations(network, 2, 1024, 8192, 34, bert)
    lines = [
        f"{3 * operations / 1e12:.2f} TFLOP an image, {PARAMETERS / 1e6:.0f}M parameters, {images} images a step:",
        "",
        "| GPUs | strategy | images a GPU | work, ms | a GPU sends, GB | that takes, ms | efficiency without overlap | with "
        "overlap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in (8, 16, 32, 64):
        for strategy in STAGES:
            row = predict(gpus, strategy, PARAMETERS, operations, images)
            lines.append(
                f"| {gpus} | {strategy} | {row['images a GPU']} | {row['work_ms']:.0f} | {row['sent_gb']:.2f} | "
                f"{row['exchange_ms']:.0f} | {row['without overlap']:.2f} | {row['with overlap']:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    results.program(main)
