"""Runs of recipes/text side by side: validation loss and scene accuracy.

    python benchmarks/text_encoders.py runs/text/scratch runs/text/minilm runs/text/minilm_random --out docs/results/text

Every run's model draws all committed prompts at its own default settings. Writes metrics.json.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from benchmarks import results
from nar_t2i.errors import UserError
from nar_t2i.evaluation.drawing import evaluate_prompts, generator_metrics
from nar_t2i.evaluation.scene_prompts import committed, take
from nar_t2i.files import read_json, write_json
from nar_t2i.hardware import describe_machine, fast_precision
from nar_t2i.pipeline import TextToImage


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", default="docs/results/text")
    parser.add_argument("--prompts", type=results.positive, default=200, help="of each category and set; default: 200, all of them")
    parsed = parser.parse_args()
    metrics: dict[str, Any] = {"command": results.command(), "machine": describe_machine(), "runs": {}}
    for run in map(Path, parsed.runs):
        t2i, scores = TextToImage.from_pretrained(run / "model"), {}
        for which in ("seen", "held_out"):
            prompts = take(committed(which), parsed.prompts)
            scores[which], _ = evaluate_prompts(t2i, prompts, batch_size=120, bf16=fast_precision() != "32-true", name=which)
        metrics["runs"][run.name] = {
            **curve(run), "versions": read_json(run / "versions.json"), "generator": generator_metrics(scores),
            "text_parameters": sum(p.numel() for p in getattr(t2i.text, "network", t2i.text).parameters()),
        }  # fmt: skip
        overall = {which: of_set["accuracy"]["overall"] for which, of_set in scores.items()}
        print(run.name, metrics["runs"][run.name]["validation_loss"], overall)
    out = Path(parsed.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", metrics)
    return 0


def curve(run: Path) -> dict[str, Any]:
    """The validation losses by step, the last of them, and images a second, which the run logged."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]) + 1: float(row["validation_loss"]) for row in rows if row.get("validation_loss")}
    if not losses:
        raise UserError(f"{run}: no validation was logged")
    rates = sorted(float(row["images_per_second"]) for row in rows if row.get("images_per_second"))
    return {"validation_losses": losses, "validation_loss": losses[max(losses)], "images_per_second": rates[len(rates) // 2]}


if __name__ == "__main__":
    results.program(main)
