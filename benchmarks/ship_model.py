"""A trained pipeline → the small model in the package, with its scores and a sheet of pictures.

    python benchmarks/ship_model.py runs/shipped/deeper/model
    python benchmarks/ship_model.py --sheet                      # the sheet again, of the model in the package

Stores the weights in half precision under nar_t2i/assets/model, set to decode as recipes/shipped/deeper.yaml says, four
candidates of each picture of which the likeliest is kept (benchmarks/rerank.py). Scores that very folder on all committed
prompts, with one candidate, and writes metrics.json there and, with a sheet of 64 prompts as it draws them by default, under
docs/results/shipped.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import results
from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.evaluation.drawing import evaluate_prompts, generator_metrics
from nar_t2i.evaluation.scene_prompts import committed, take
from nar_t2i.evaluation.tokenizer import evaluate_tokenizer
from nar_t2i.files import write_json
from nar_t2i.hardware import describe_machine
from nar_t2i.inference import BestOf
from nar_t2i.parts import build
from nar_t2i.pictures import contact_sheet
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance

ASSETS, RESULTS = results.ROOT / "nar_t2i/assets/model", results.ROOT / "docs/results/shipped"
LIMIT = 10 * 2**20  # bytes
CANDIDATES = 4


def main() -> int:
    parser = results.parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", metavar="FOLDER", help="the trained pipeline")
    what.add_argument("--sheet", action="store_true", help="draw the sheet of the model in the package again, and nothing else")
    parsed = parser.parse_args()
    if parsed.sheet:
        save_sheet(TextToImage.from_pretrained(ASSETS))
        return 0
    size = ship(parsed.model)
    t2i = TextToImage.from_pretrained(ASSETS)
    save_sheet(t2i)
    scores = {}
    for which in ("seen", "held_out"):
        scores[which], _ = evaluate_prompts(t2i, committed(which), steps=16, batch_size=120, name=which, candidates=1)
    metrics = {
        "command": results.command(),
        "machine": describe_machine(),
        "weights_bytes": size,
        "tokenizer": evaluate_tokenizer(t2i.tokenizer, 1000),
        "generator": generator_metrics(scores),
    }
    for place in (ASSETS, RESULTS):
        write_json(place / "metrics.json", metrics)
    for name, accuracies in metrics["generator"]["scene_accuracy"].items():
        print(name, {key: round(value, 3) for key, value in accuracies.items() if isinstance(value, float)})
    return 0


def ship(folder: str) -> int:
    """Store the trained pipeline of the folder as the model in the package. Returns the bytes of its weights; UserError where
    there are more than LIMIT of them.
    """
    if Path(folder).resolve() == ASSETS.resolve():
        raise UserError(
            f"{folder} is where it would be written; nar-t2i evaluate {folder} --candidates 1 --out scores.json scores it"
        )
    trained = TextToImage.from_pretrained(folder)
    decoding = recipe.load("shipped/deeper").config["model"]["init_args"]
    trained.inference, trained.guidance = BestOf(build(decoding["inference"]), CANDIDATES), Guidance(**decoding["guidance"])
    trained.save_pretrained(ASSETS, dtype=torch.float16)
    size = sum(path.stat().st_size for path in ASSETS.rglob("*.safetensors"))
    print(f"{size / 2**20:.2f} MiB of weights")
    if size > LIMIT:
        raise UserError(f"{ASSETS}: more than {LIMIT // 2**20} MiB of weights")
    return size


def save_sheet(t2i: TextToImage) -> None:
    """The first eleven prompts of each category, 64 in all, as they come: nothing is picked by hand."""
    prompts = committed("seen")
    chosen = [index for index, prompt in enumerate(prompts) if prompt in take(prompts, 11)][:64]
    texts = [prompts[index].prompt for index in chosen]
    contact_sheet(t2i(texts, seed=chosen), texts).save(RESULTS / "sheet.png")


if __name__ == "__main__":
    results.program(main)
