"""`nar-t2i ablate`: a list of recipes, trained one after another and judged on the same prompts with the same seeds.

    OUT/
      runs/SEED/NAME/      a run folder for each recipe that trains
      judged/NAME-SEED/    verdicts.json (one a prompt), sheet.png
      comparison.md .csv .html .json   what nar_t2i.evaluation.comparison makes of them

A recipe that only decodes otherwise (its run_dir is another recipe's) is judged on that one's run, which is trained if it
was not yet. Everything that is finished is kept, with the settings that it was made by: the same command goes on after an
interruption, and another one that would mix settings is refused. An entry that fails is named, and the others are done.
Strategies that make several forward passes a step take that many times fewer steps, unless --equal steps is given. Every run
trains on one device.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from nar_t2i import recipe as recipes
from nar_t2i.errors import INTERRUPTED, REQUEUE, UserError
from nar_t2i.evaluation.comparison import write_comparison
from nar_t2i.evaluation.drawing import draw_prompts
from nar_t2i.evaluation.report_curves import read_curves
from nar_t2i.evaluation.scene_accuracy import verdicts
from nar_t2i.evaluation.scene_prompts import committed, take
from nar_t2i.files import write_json
from nar_t2i.folders import check_same, flat
from nar_t2i.generate import decode_by
from nar_t2i.hardware import best_device, describe_machine, fast_precision, usable_cores
from nar_t2i.parts import build, resolve
from nar_t2i.pictures import contact_sheet, save_whole
from nar_t2i.pipeline import TextToImage
from nar_t2i.training.checkpoints import latest, step_of
from nar_t2i.training.command import RecipeCLI, quieten, run

SHOWN = 8  # pictures of a sheet
DECODING = ("inference", "guidance", "sample_prompts", "scene_prompts")  # arguments of a generator that train nothing


@dataclass(frozen=True)
class Entry:
    """One recipe at one seed. run: the folder of the run that it is judged on. config: as resolved for it."""

    name: str
    run: Path
    seed: int
    paths: tuple[str, ...]
    config: dict[str, Any]

    @property
    def training(self) -> dict[str, Any]:
        """What the weights of the run depend on."""
        kept = {key: value for key, value in self.config["model"]["init_args"].items() if key not in DECODING}
        return {**self.config, "model": {**self.config["model"], "init_args": kept}}

    @property
    def draws(self) -> bool:
        """Whether there is anything to judge: a critic is trained for others."""
        return resolve(self.config["model"]["init_args"]["learning"]["class_path"]).draws

    @property
    def passes(self) -> float:
        """Forward passes of a training step."""
        return build(self.config["model"]["init_args"]["learning"]).passes


def main(arguments: argparse.Namespace) -> int:
    if arguments.seeds < 1 or arguments.prompts < 1:
        raise UserError(f"--seeds {arguments.seeds} and --prompts {arguments.prompts} must be at least 1")
    out = Path(os.path.normpath(arguments.out))
    entries = plan(arguments.recipes, arguments.scale, arguments.seeds, arguments.override, out)
    tasks = apart(entries)
    if arguments.count:
        print(len(tasks))
        return 0
    if arguments.task is not None and not 0 <= arguments.task < len(tasks):
        raise UserError(f"--task {arguments.task}: there are {len(tasks)}, from 0 on")
    for entry in entries:  # what is there was made with these settings, or nothing is added to it
        check_settings(entry, out, arguments.equal, arguments.prompts)
    failed: list[Entry] = []
    untrained: set[Path] = set()  # runs that failed
    for entry in entries if arguments.task is None else tasks[arguments.task]:
        try:
            if entry.run in untrained:
                raise UserError(f"the run {entry.run} failed")
            if status := done(entry, out, arguments):
                return status
        except Exception as error:  # a device that is out of memory, a mistake in a new strategy: the others are none the worse
            if not isinstance(error, UserError):
                if os.environ.get("NAR_T2I_TRACEBACK") == "1":
                    raise
                traceback.print_exc()
            said = (str(error).strip().splitlines() or ["no more is said"])[0]
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
            print(f"✗ {entry.name}, seed {entry.seed}: {reason}", file=sys.stderr, flush=True)
            failed.append(entry)
            if not trained(entry):
                untrained.add(entry.run)
    if failed:
        names = ", ".join(f"{entry.name} (seed {entry.seed})" for entry in failed)
        raise UserError(f"not done: {names}; why is said above. The same command goes on with them, and one without their recipes "
                        "compares the others")  # fmt: skip

    judged: dict[str, list[Path]] = {}
    for entry in (entry for entry in entries if entry.draws):
        judged.setdefault(entry.name, []).append(folder_of(entry, out))
    left = sum(not (folder / "settings.json").exists() for folders in judged.values() for folder in folders)
    if left:
        print(f"{left} of the entries are other tasks' and not judged yet; the last task to end writes the comparison")
    elif judged:
        print(write_comparison(out, judged))
    return 0


def folder_of(entry: Entry, out: Path) -> Path:
    """Where an entry's verdicts lie; settings.json, the last file to be written, says that they are whole."""
    return out / "judged" / f"{entry.name}-{entry.seed}"


def check_settings(entry: Entry, out: Path, equal: str, prompts: int) -> None:
    """UserError where a run that has begun, or verdicts, of this entry were made with other settings."""
    begun = any((entry.run / name).is_dir() for name in ("checkpoints", "model"))
    if begun and (how := entry.run / "ablation.json").exists():  # it is not where nar-t2i fit has trained the run
        check_same(how, {"training": entry.training, "equal": equal})
    if (settings := folder_of(entry, out) / "settings.json").exists():
        check_same(settings, {"config": entry.config, "prompts": prompts})


def done(entry: Entry, out: Path, arguments: argparse.Namespace) -> int:
    """Train and judge an entry, as far as that has not been done; the exit status."""
    status = train(entry, arguments.equal, arguments.override)
    if status or not entry.draws:
        return status
    settings = folder_of(entry, out) / "settings.json"
    if settings.exists():
        print(f"✓ {entry.name}, seed {entry.seed}: judged before", flush=True)
    else:
        with leaving_on_signals():
            judge(entry, settings.parent, arguments.prompts)
        write_json(settings, {"config": entry.config, "prompts": arguments.prompts})
    return 0


def apart(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The entries in groups that can be done side by side: all that is judged on one run, and what builds on that run."""
    groups: list[tuple[set[str], list[int]]] = []  # runs that a group's entries are of, or name; the entries' numbers
    for number, entry in enumerate(entries):
        named = {os.path.normpath(value) for value in flat(entry.config).values() if isinstance(value, str) and "/" in value}
        runs = {str(other.run) for other in entries if any(f"{name}/".startswith(f"{other.run}/") for name in named)} | {
            str(entry.run)
        }
        members = [number]
        for group in [group for group in groups if group[0] & runs]:
            groups.remove(group)
            runs, members = runs | group[0], group[1] + members
        groups.append((runs, sorted(members)))
    return [[entries[number] for number in members] for members in sorted(members for _, members in groups)]


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """SIGUSR1 and SIGUSR2, by which Slurm says that time is over, end this process with the status that asks to be started
    again; what was being judged is then judged anew."""
    before = {number: signal.signal(number, lambda *_: sys.exit(REQUEUE)) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plan(names: Sequence[str], scale: str | None, seeds: int, overrides: Sequence[str], out: Path) -> list[Entry]:
    """The entries in the order in which they are run. UserError where two recipes would share a name.

    Runs of one seed lie side by side, as they do under a recipe's own run_dir: a recipe that builds on another's run finds
    it at `${run_dir}/../NAME`.
    """

    quieten()
    entries: list[Entry] = []
    for name in names:
        paths = (name, f"scale/{scale}") if scale else (name,)
        config = recipes.load(paths, overrides).config
        if "learning" not in config.get("model", {}).get("init_args", {}):
            raise UserError(f"{name}: trains no generator; ablate compares learning and inference strategies")
        steps = (config.get("trainer") or {}).get("max_steps")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(
                f"{name}: trainer.max_steps is {steps}; ablate equalises steps, and a run that ends otherwise has no number"
            )
        for part in ("text", "network", "inference"):  # which are loaded from a folder when they are judged
            described = config["model"]["init_args"].get(part)
            if isinstance(described, dict) and "." in str(described.get("class_path")):
                resolve(described["class_path"])
        known = Path(name).stem
        if any(entry.name == known for entry in entries):
            raise UserError(f"two recipes are named {known}; their results would be one")
        for seed in range(seeds):
            run = out / f"runs/{seed}" / Path(config.get("run_dir") or known).name
            recipe = recipes.load(paths, [*overrides, f"run_dir={run}"])
            if seed == 0:
                RecipeCLI(recipe)  # a mistake in the last recipe is told before the first is trained
            config = recipe.config
            entries.append(Entry(known, run, seed, paths, config))
    by_run: dict[Path, Entry] = {}
    for entry in entries:
        other = by_run.setdefault(entry.run, entry)
        if entry.training != other.training:
            raise UserError(f"{entry.paths[0]} trains otherwise than {other.paths[0]}, but has its run_dir; give it its own")
    return entries


def trained(entry: Entry) -> bool:
    """Whether the run of an entry is at its end."""
    return (entry.run / "model/config.json").exists()


def train(entry: Entry, equal: str, overrides: Sequence[str]) -> int:
    """Train the run of an entry, or go on with it; the exit status."""
    steps = entry.config["trainer"]["max_steps"]
    if trained(entry):
        return 0
    own = {
        "run_dir": str(entry.run),
        "seed_everything": entry.seed,
        "model.init_args.seed": entry.seed,
        "data.init_args.seed": entry.seed,
        "trainer.max_steps": max(1, round(steps / entry.passes)) if equal == "flops" else steps,
    }
    first = {"trainer.precision": fast_precision(), "trainer.devices": 1}  # which an override may change
    entry.run.mkdir(parents=True, exist_ok=True)
    write_json(entry.run / "ablation.json", {"training": entry.training, "equal": equal})
    print(f"▶ {entry.run.name}, seed {entry.seed}: {own['trainer.max_steps']} steps of {entry.passes:.3g} passes", flush=True)
    lines = [*(f"{key}={value}" for key, value in first.items()), *overrides, *(f"{key}={value}" for key, value in own.items())]
    status = run("fit", entry.paths, lines)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return status


def judge(entry: Entry, folder: Path, prompts_a_category: int) -> None:
    """Draw and judge all prompts with the entry's way to decode."""
    t2i, model = TextToImage.from_pretrained(entry.run / "model").to(best_device()), entry.config["model"]["init_args"]
    decode_by(t2i, entry.config)
    found: dict[str, Any] = {}
    for which in ("seen", "held_out"):
        prompts = take(committed(which), prompts_a_category)
        cores = usable_cores()
        # The seed of a picture says which prompt it is of, and nothing about the training: entries are paired.
        drawn = draw_prompts(
            t2i, prompts, batch_size=32, bf16=fast_precision() != "32-true", workers=cores, name=f"{entry.name}, {which}"
        )
        found[which] = {
            "passed": verdicts(drawn.images, prompts, cores), "category": [prompt.category for prompt in prompts],
        }  # fmt: skip
        found.setdefault("passes", drawn.passes), found.setdefault("rows", drawn.rows)
        found.setdefault("seconds_an_image", drawn.seconds / len(prompts))
        if which == "seen":
            chosen = range(0, len(prompts), -(-len(prompts) // SHOWN))
            images, captions = [Image.fromarray(drawn.images[i]) for i in chosen], [prompts[i].prompt for i in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    save_whole(contact_sheet(images, captions, columns=SHOWN), folder / "sheet.png")
    write_json(folder / "verdicts.json", {
        **found, "machine": describe_machine(), "trained": entry.run.name, "training_passes": entry.passes,
        "steps": _steps(entry.run), "recipe": entry.paths[0],
        "strategy": {key: model[key] for key in ("learning", "network", "inference", "guidance") if key in model},
    })  # fmt: skip


def _steps(run: Path) -> int:
    """Optimizer steps that a run has taken: those of its newest checkpoint or, where it has none left, the last that it logged."""
    if newest := latest(run):
        return step_of(newest)
    curves = read_curves(run / "metrics.csv")
    return int(max(steps[-1] for steps, _ in curves.values())) + 1
