"""Decoding settings, tried on prompts of their own: the same number of trials for every model.

    python benchmarks/tune_decoding.py parallel=runs/long-ablation/runs/0/exponential/model:ablations/few_passes_single \
        twin=runs/long-ablation/runs/0/autoregressive/model --trials 12 --out docs/results/few-passes/tuning.json

Each trial draws a guidance scale and its ramp, a temperature, top-k, top-p and, for strategies that have them, a choice
temperature and a final temperature, from the lists below, by the seed of the trial: trial i of one model and trial i of
another share what both have. Judged is the scene accuracy of one candidate on prompts that no score is reported on. All
trials are written down, the best one last.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import positive, program
from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.evaluation.drawing import draw_prompts
from nar_t2i.evaluation.prompt_generator import generate
from nar_t2i.evaluation.scene_accuracy import verdicts
from nar_t2i.files import write_json
from nar_t2i.hardware import describe_machine, fast_precision, usable_cores
from nar_t2i.inference import BestOf
from nar_t2i.parts import build, changed
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance

SCALES, RAMPS = (1.0, 1.5, 2.0, 3.0, 4.0), ("constant", "linear")
TEMPERATURES, TOP_K, CHOICE_TEMPERATURES = (0.5, 0.7, 0.85, 1.0), (0, 0, 16), (2.0, 4.5, 8.0)
TOP_P, FINAL_TEMPERATURES = (1.0, 0.95, 0.9), (None, 0.1, 0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", metavar="NAME=FOLDER[:RECIPE]", help="RECIPE: to decode by, where it is not by the model's own"
    )
    parser.add_argument("--trials", type=positive, default=12)
    parser.add_argument("--prompts", type=positive, default=40, help="a category; default: 40")
    parser.add_argument("--out", default="docs/results/ablations/tuning.json")
    parsed = parser.parse_args()
    prompts = generate("seen", parsed.prompts, seed=1)
    found: dict[str, Any] = {
        "command": "python benchmarks/tune_decoding.py " + " ".join(sys.argv[1:]), "machine": describe_machine(),
        "prompts": len(prompts), "models": {},
    }  # fmt: skip
    for model in parsed.models:
        name, _, folder = model.partition("=")
        folder, _, name_of_recipe = folder.partition(":")
        if not folder:
            raise UserError(f"{model}: give NAME=FOLDER")
        t2i = TextToImage.from_pretrained(folder)
        if name_of_recipe:
            t2i.inference = build(recipe.load(name_of_recipe).config["model"]["init_args"]["inference"])
        first, trials = t2i.inference.first if isinstance(t2i.inference, BestOf) else t2i.inference, []
        for trial in range(parsed.trials):
            settings, guidance = draw_settings(trial)
            possible = {key: value for key, value in settings.items() if key in first._described_args}
            t2i.inference, t2i.guidance = changed(first, **possible), Guidance(**guidance)
            drawn = draw_prompts(
                t2i,
                prompts,
                batch_size=32,
                bf16=fast_precision() != "32-true",
                workers=usable_cores(),
                seed=10**6,
                name=f"{name} {trial}",
            )
            passed = verdicts(drawn.images, prompts, usable_cores())
            trials.append({**possible, "guidance": guidance, "accuracy": sum(passed) / len(passed), "passes": drawn.passes})
            print(name, trials[-1], flush=True)
        found["models"][name] = sorted(trials, key=lambda trial: trial["accuracy"])
        out = Path(parsed.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, found)
    return 0


def draw_settings(trial: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What trial `trial` sets; the first is what quickstart's generator decodes with."""
    if trial == 0:
        return {"temperature": 0.8, "top_k": 0, "choice_temperature": 8.0}, {"scale": 2.0, "ramp": "linear"}
    draw = random.Random(trial)
    guidance = {"scale": draw.choice(SCALES), "ramp": draw.choice(RAMPS)}
    settings = {
        "temperature": draw.choice(TEMPERATURES),
        "top_k": draw.choice(TOP_K),
        "choice_temperature": draw.choice(CHOICE_TEMPERATURES),
        "top_p": draw.choice(TOP_P),
        "final_temperature": draw.choice(FINAL_TEMPERATURES),
    }
    return settings, guidance


if __name__ == "__main__":
    program(main)
