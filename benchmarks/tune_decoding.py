"""Decoding settings, tried on prompts of their own: the same number of trials for every model.

    python benchmarks/tune_decoding.py parallel=runs/long-ablation/runs/0/exponential/model:ablations/few_passes_single \
        twin=runs/long-ablation/runs/0/autoregressive/model --trials 12 --out docs/results/few-passes/tuning.json

Each trial draws a guidance scale and its ramp, a temperature, top-k, top-p and, for strategies that have them, a choice
temperature and a final temperature, from the lists below, by the seed of the trial: trial i of one model and trial i of
another share what both have. Judged is the scene accuracy of one candidate on prompts that no score is reported on. All
trials are written down, the best one last.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.evaluation.drawing import draw_prompts
from nar_t2i.evaluation.prompt_generator import generate
from nar_t2i.evaluation.scene_accuracy import verdicts
from nar_t2i.evaluation.scene_prompts import ScenePrompt
from nar_t2i.files import write_json
from nar_t2i.hardware import describe_machine, fast_precision, usable_cores
from nar_t2i.inference import BestOf
from nar_t2i.parts import build, changed
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance
from nar_t2i.types import InferenceStrategy

SCALES, RAMPS = (1.0, 1.5, 2.0, 3.0, 4.0), ("constant", "linear")
TEMPERATURES, TOP_K, CHOICE_TEMPERATURES = (0.5, 0.7, 0.85, 1.0), (0, 0, 16), (2.0, 4.5, 8.0)
TOP_P, FINAL_TEMPERATURES = (1.0, 0.95, 0.9), (None, 0.1, 0.3)


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument(
        "models", nargs="+", metavar="NAME=FOLDER[:RECIPE]", help="RECIPE: to decode by, where it is not by the model's own"
    )
    parser.add_argument("--trials", type=results.positive, default=12)
    parser.add_argument("--prompts", type=results.positive, default=40, help="a category; default: 40")
    parser.add_argument("--out", default="docs/results/ablations/tuning.json")
    parsed = parser.parse_args()
    prompts = generate("seen", parsed.prompts, seed=1)
    tuning: dict[str, Any] = {
        "command": results.command(), "machine": describe_machine(), "prompts": len(prompts), "models": {},
    }  # fmt: skip
    for model in parsed.models:
        name, _, folder = model.partition("=")
        folder, _, name_of_recipe = folder.partition(":")
        if not folder:
            raise UserError(f"{model}: give NAME=FOLDER")
        t2i = TextToImage.from_pretrained(folder)
        if name_of_recipe:
            t2i.inference = build(recipe.load(name_of_recipe).config["model"]["init_args"]["inference"])
        one = t2i.inference.first if isinstance(t2i.inference, BestOf) else t2i.inference
        trials = []
        for number in range(parsed.trials):
            trials.append(try_settings(t2i, one, number, prompts, name))
            print(name, trials[-1], flush=True)
        tuning["models"][name] = sorted(trials, key=lambda trial: trial["accuracy"])
        out = Path(parsed.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, tuning)
    return 0


def try_settings(
    t2i: TextToImage, one: InferenceStrategy, number: int, prompts: Sequence[ScenePrompt], name: str
) -> dict[str, Any]:
    """A trial's settings, accuracy and passes. one: how a single candidate is drawn, without the trial's settings; those that it
    does not have are left out."""
    settings, guidance = draw_settings(number)
    possible = {key: value for key, value in settings.items() if key in one._described_args}
    t2i.inference, t2i.guidance = changed(one, **possible), Guidance(**guidance)
    bf16, cores = fast_precision() != "32-true", usable_cores()
    drawn = draw_prompts(t2i, prompts, batch_size=32, bf16=bf16, workers=cores, seed=10**6, name=f"{name} {number}")
    right = verdicts(drawn.images, prompts, cores)
    return {**possible, "guidance": guidance, "accuracy": sum(right) / len(right), "passes": drawn.passes}


def draw_settings(trial: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of trial `trial`: settings of the inference strategy, and of the guidance. The first is what quickstart's generator decodes
    with."""
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
    results.program(main)
