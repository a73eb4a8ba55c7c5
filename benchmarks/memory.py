"""The doctor's estimate of memory beside what training takes on this machine's GPU.

    python benchmarks/memory.py
    python benchmarks/memory.py --estimates     # no GPU needed: the doctor's estimate anew, beside what stands there as measured

Trains a few generators of Emage's shape for three steps each under DDP and ZeRO 1 to 3 on one GPU, each in a process of
its own, the four side by side, and writes docs/results/memory.json: the peak that torch allocated, the estimate, and their ratio.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import results
from nar_t2i.errors import UserError
from nar_t2i.files import read_json, write_json
from nar_t2i.hardware import describe_machine
from nar_t2i.training import doctor, zero
from nar_t2i.training.memory import STAGES, held

MEASURED = results.ROOT / "docs/results/memory.json"
BASE = """
seed_everything: 0
model:
  class_path: nar_t2i.training.GeneratorModule
  init_args:
    tokenizer:
      class_path: nar_t2i.tokenizers.VQGAN
      init_args:
        image_size: 256
        channels: [32, 64]
        patch: 4
        quantizer: {{class_path: nar_t2i.tokenizers.VectorQuantizer, init_args: {{codes: 1024, width: 16}}}}
    text:
      class_path: nar_t2i.text.ScratchTextEncoder
      init_args: {{vocabulary: {vocabulary}, width: {width}, depth: 4, heads: 8}}
    network: {{class_path: nar_t2i.networks.EncoderDecoder, init_args: {{width: {width}, depth: {depth}, heads: 16}}}}
    learning: {{class_path: nar_t2i.learning.Masked}}
data:
  class_path: nar_t2i.data.CaptionedImages
  init_args:
    image_size: 256
    global_batch_size: {batch}
    train: {{class_path: nar_t2i.data.captions.RenderedScenes, init_args: {{count: 1000, image_size: 256}}}}
trainer: {{max_steps: 3, log_every_n_steps: 1, enable_progress_bar: false, enable_model_summary: false, precision: bf16-mixed}}
checkpoint: {{every_steps: 1000}}
"""
CASES = [dict(width=512, depth=8, batch=8), dict(width=1024, depth=20, batch=8), dict(width=1024, depth=20, batch=32)]


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--estimates", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=MEASURED)
    parsed = parser.parse_args()
    known = read_json(parsed.out) if parsed.estimates else {"command": results.command(), "rows": []}
    if not parsed.estimates:
        if not torch.cuda.is_available():
            raise UserError("no GPU: what DDP and DeepSpeed hold on CPUs is compared in tests/cluster/test_memory.py")
        known["machine"] = describe_machine()
    zero.register()
    rows = []
    for case in CASES:
        of_case = {row["strategy"]: row["measured_mib"] for row in known["rows"] if case.items() <= row.items()}
        if parsed.estimates and not of_case:
            continue
        with tempfile.TemporaryDirectory() as folder:
            vocabulary = results.ROOT / "nar_t2i/assets/model/text/vocabulary.model"
            recipe = Path(folder, "recipe.yaml")
            recipe.write_text(BASE.format(vocabulary=vocabulary, **case))
            one, two = (doctor.probe([recipe], [], size) for size in (1, 2))
            measured = of_case or _measured(recipe)
        activations = one.activations + (case["batch"] - 1) * (two.activations - one.activations)
        for strategy, mib in measured.items():
            estimate = held(one.trained, 1, STAGES[strategy], True).peak(activations, False) / 2**20
            rows.append({**case, "strategy": strategy, "parameters": sum(map(sum, one.trained.groups)), "measured_mib": mib,
                         "estimate_mib": estimate, "ratio": estimate / mib})  # fmt: skip
            print(rows[-1], flush=True)
        # After each, so that what is broken off loses little.
        write_json(parsed.out, known | {"rows": rows})
    return 0


def _measured(recipe: Path) -> dict[str, float]:
    """MiB by strategy."""
    runs = {strategy: recipe.with_name(strategy) for strategy in STAGES}
    _side_by_side({
        run.with_suffix(".log"): [sys.executable, "-m", "nar_t2i", "fit", "--config", str(recipe), f"--run_dir={run}",
                                  "--trainer.accelerator=gpu", "--trainer.devices=1", f"--trainer.strategy={strategy}"]
        for strategy, run in runs.items()
    })  # fmt: skip
    return {strategy: 1024 * max(_column(run / "metrics.csv", "memory_gib")) for strategy, run in runs.items()}


def _side_by_side(lines: dict[Path, list[str]]) -> None:
    """Runs all at once, each with its output in a file: what a process allocates is its own. UserError where one fails."""
    # What the doctor measured here on a CPU told DeepSpeed of no GPU.
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    running = {
        log: subprocess.Popen(line, cwd=results.ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for log, line in lines.items()
    }
    failed = [log for log, process in running.items() if process.wait()]
    for log in failed:
        print(log.read_text()[-3000:], file=sys.stderr)
    if failed:
        raise UserError(f"failed: {', '.join(log.stem for log in failed)}")


def _column(path: Path, name: str) -> list[float]:
    with open(path, newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


if __name__ == "__main__":
    results.program(main)
