"""Six passes for 64 tokens against one pass a token: scene accuracy of a tenth of the passes, on the same prompts and seeds.

    python benchmarks/few_passes.py    # after the trainings that recipes/scale/long.yaml names

Every entry is a model and the recipe that it decodes by. The first, the autoregressive twin, is what the others are compared
with, pair by pair, but for those that were trained for longer, which a twin of as much training is there for; beside that
stands the distance to a generator without any mistake, which no twin can be better than, however long it is trained. --sets
further brings as many seen prompts again, which narrows both. What is drawn already is kept in the folder of --out. Verdicts,
one a prompt, are part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import results
from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.evaluation.comparison import paired_interval
from nar_t2i.evaluation.drawing import draw_prompts
from nar_t2i.evaluation.prompt_generator import PER_CATEGORY, generate
from nar_t2i.evaluation.scene_accuracy import verdicts, wilson
from nar_t2i.evaluation.scene_prompts import CATEGORIES, ScenePrompt, committed, take
from nar_t2i.files import read_json, write_json
from nar_t2i.generate import shipped_model
from nar_t2i.hardware import describe_machine, fast_precision, usable_cores
from nar_t2i.hashing import weights_hash
from nar_t2i.inference import BestOf
from nar_t2i.parts import build
from nar_t2i.pictures import contact_sheet
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance

LONG = "runs/long-ablation/runs/0"
LONGER = "runs/longer-ablation/runs/0"
ENTRIES = {
    "twin, 64 passes": (f"{LONG}/autoregressive/model", "ablations/twin_long"),
    "prefixes, 6 passes": (f"{LONG}/prefixes/model", "learning/prefixes"),
    "twin trained twice as long, 64 passes": (f"{LONGER}/autoregressive/model", "ablations/twin_long"),
    "prefixes trained twice as long, 6 passes": (f"{LONGER}/prefixes/model", "learning/prefixes"),
    "long, 6 passes, one": (f"{LONG}/exponential/model", "ablations/few_passes_single"),
    "long, 6 passes, of 32": (f"{LONG}/exponential/model", "ablations/few_passes_of_32"),
    "long, 16 passes, one": (f"{LONG}/exponential/model", "ablations/growing_16"),
    "shipped, 6 passes, one": (None, "ablations/few_passes_single"),
    "shipped, 6 passes, of 32": (None, "ablations/few_passes_of_32"),
    "shipped, 16 passes, one": (None, "ablations/growing_16"),
}  # fmt: skip
OF_AS_MUCH_TRAINING = {"prefixes trained twice as long, 6 passes": "twin trained twice as long, 64 passes"}
SHOWN = 48
OF_MACHINES = "the machine is that of the last call; seconds_an_image are of the one that drew an entry first, see README.md"


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--prompts", type=results.positive, default=167,
                        help="a category, seen and held out; default: 167, 1,002 of each")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=list(ENTRIES), choices=list(ENTRIES), metavar="ENTRY",
                        help=f"of {'; '.join(ENTRIES)}; default: all")  # fmt: skip
    parser.add_argument("--sets", nargs="+", default=["seen", "held_out"], choices=("seen", "held_out", "further"))
    parser.add_argument("--out", default="docs/results/few-passes", metavar="FOLDER")
    parsed = parser.parse_args()
    if not 1 <= parsed.prompts <= PER_CATEGORY:
        raise UserError(f"--prompts must be 1 to {PER_CATEGORY}, the committed ones of a category, not {parsed.prompts}")
    out = Path(parsed.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in parsed.only:
        judge(name, parsed.prompts, parsed.sets, kept(out, name))
    files = {name: read_json(kept(out, name)) for name in ENTRIES if kept(out, name).exists()}
    judged = {name: entry for name, entry in files.items() if len(entry.get("seen", ())) == parsed.prompts * len(CATEGORIES)}
    table = rows(judged)
    results.write(out / "few-passes.json", table, prompts_a_category=parsed.prompts, note=OF_MACHINES)
    for row in table:
        print(row)
    return 0


def kept(out: Path, name: str) -> Path:
    """The file of an entry's verdicts."""
    return out / f"{name.replace(', ', '-').replace(' ', '-')}.json"


def judge(name: str, prompts_a_category: int, sets: Sequence[str], path: Path) -> None:
    """Draw the prompts of the sets that are not there yet, and write what each picture was found to be, and a sheet. UserError
    where those that are there are of other prompts, weights or settings."""
    folder, how = ENTRIES[name]
    t2i = TextToImage.from_pretrained(folder or shipped_model())
    model = recipe.load(how).config["model"]["init_args"]
    t2i.inference, t2i.guidance = build(model["inference"]), Guidance(**model["guidance"])
    made_by = {"recipe": how, "prompts": prompts_a_category * len(CATEGORIES), "weights": weights_hash(t2i.network),
               "inference": model["inference"], "guidance": model["guidance"]}  # fmt: skip
    if path.exists():
        entry: dict[str, Any] = read_json(path)
    else:
        entry = {"made_by": made_by, "parameters": sum(p.numel() for p in t2i.network.parameters())}
    if entry["made_by"] != made_by:
        raise UserError(
            f"{path}: was made by {entry['made_by']}, and this is {made_by}; name another folder with --out, or delete it"
        )
    bf16, cores = fast_precision() != "32-true", usable_cores()
    for which in sets:
        if which in entry:
            continue
        prompts = further(prompts_a_category) if which == "further" else take(committed(which), prompts_a_category)
        drawn = draw_prompts(t2i, prompts, batch_size=64, bf16=bf16, workers=cores, name=f"{name}, {which}")
        entry[which] = [int(right) for right in verdicts(drawn.images, prompts, cores)]
        # Of the first set that is drawn: the time is that of its machine.
        entry.setdefault("passes", drawn.passes)
        entry.setdefault("rows", drawn.rows)
        entry.setdefault("seconds_an_image", drawn.seconds / len(prompts))
        entry.setdefault("machine", describe_machine())
        if which == "seen" and isinstance(t2i.inference, BestOf):
            save_sheet(drawn.images, prompts, path.with_suffix(".png"))
        write_json(path, entry)


def save_sheet(images: np.ndarray, prompts: Sequence[ScenePrompt], path: Path) -> None:
    """At most SHOWN of the (n, H, W, 3) uint8 images, evenly spread, above their prompts."""
    chosen = range(0, len(prompts), -(-len(prompts) // SHOWN))
    pictures = [Image.fromarray(images[index]) for index in chosen]
    contact_sheet(pictures, [prompts[index].prompt for index in chosen], columns=8).save(path)


def further(prompts_a_category: int) -> list[ScenePrompt]:
    """Seen combinations in sentences that are neither among the committed prompts nor among those that decoding was tuned on."""
    taken = {prompt.prompt for prompt in (*committed("seen"), *generate("seen", seed=1))}
    drawn = generate("seen", 2 * prompts_a_category + PER_CATEGORY, seed=2)
    return take([prompt for prompt in drawn if prompt.prompt not in taken], prompts_a_category)


def rows(judged: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One an entry. deficit: the accuracy of the first one, or of the twin of as much training, less the entry's, a mean of
    paired differences with its 95% interval, on seen prompts, further ones among them where both have them, `pairs` in all;
    to_perfect: Wilson's upper bound of the share of seen prompts that go wrong, further ones among them.
    """
    table = []
    for name, entry in judged.items():
        first = next(iter(judged))
        twin = OF_AS_MUCH_TRAINING.get(name, first)
        reference = twin if twin in judged else first
        sets = [which for which in ("seen", "further") if which in entry and which in judged[reference]]
        own, other = of_sets(entry, sets), of_sets(judged[reference], sets)
        deficit = paired_interval((other - own)[None])
        seen, every = of_sets(entry, ["seen"]), of_sets(entry, ["seen", "further"])
        table.append(
            {
                "entry": name,
                "compared_with": reference,
                "recipe": entry["made_by"]["recipe"],
                "parameters": entry["parameters"],
                "passes": entry["passes"],
                "rows": entry["rows"],
                "seen": float(seen.mean()),
                "seen_interval": wilson(float(seen.sum()), len(seen)),
                "held_out": float(np.mean(entry["held_out"])) if "held_out" in entry else None,
                "deficit": deficit.mean,
                "deficit_low": deficit.low,
                "deficit_high": deficit.high,
                "pairs": len(own),
                "further": float(np.mean(entry["further"])) if "further" in entry else None,
                "to_perfect": 1 - wilson(float(every.sum()), len(every))[0],
                "of": len(every),
                "seconds_an_image": entry["seconds_an_image"],
                "drawn_on": entry["machine"]["processor"] if "machine" in entry else None,
            }
        )
    return table


def of_sets(entry: dict[str, Any], sets: Sequence[str]) -> np.ndarray:
    """(prompts of these sets,) verdicts of an entry, 0 or 1, where it has them."""
    return np.concatenate([np.array(entry[which], dtype=float) for which in sets if which in entry])


if __name__ == "__main__":
    results.program(main)
