"""`nar-t2i quickstart`: the whole chain on the embedded data set, in stages that an interruption does not lose.

    runs/quickstart/
      data/        rendered scenes as shards, and the vocabulary
      tokenizer/   a run folder; model/ is the trained codec
      tokens/      the token caches of the shards
      text/        a run folder; the text encoder that the generator starts from
      generator/   a run folder; model/ is the pipeline
      evaluation/  scores and pictures
      report.html  metrics.json  stages.json

Each stage is recorded in stages.json when it is finished, with the seconds it took over all its starts; training goes
on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nar_t2i.data.captions import RenderedScenes, ShuffledCaptions
from nar_t2i.data.shards import ShardSource
from nar_t2i.errors import INTERRUPTED, UserError
from nar_t2i.evaluation.drawing import evaluate_prompts, generator_metrics
from nar_t2i.evaluation.report import write_report
from nar_t2i.evaluation.scene_accuracy import verdicts
from nar_t2i.evaluation.scene_prompts import CATEGORIES, Kinds, ScenePrompt, committed, take
from nar_t2i.evaluation.tokenizer import evaluate_tokenizer
from nar_t2i.files import read_json, write_json
from nar_t2i.folders import load_part
from nar_t2i.generate import shipped_model
from nar_t2i.hardware import best_device, describe_machine, fast_precision, usable_cores
from nar_t2i.pictures import contact_sheet, save_whole
from nar_t2i.pipeline import TextToImage
from nar_t2i.prepare.rendering import write_source
from nar_t2i.prepare.sentencepiece import captions_of, train_sentencepiece
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.training.command import run
from nar_t2i.training.run_folder import versions


@dataclass(frozen=True)
class Length:
    """How long a stage trains: for these minutes, by whose end its learning rates are annealed, or for so many steps, if they
    are done before. steps: None = the recipe's.
    """

    minutes: float
    steps: int | None = None

    @property
    def settings(self) -> list[str]:
        """Overrides of its recipe."""
        steps = [] if self.steps is None else [f"trainer.max_steps={self.steps}"]
        return [f"model.init_args.budget_minutes={self.minutes}", *steps]


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    tokenizer, text, generator: of training. prompts_a_category: of seen combinations, half as many of held-out ones.
    most_objects: a scene. categories: of scene prompts that are scored.
    """

    train_scenes: int
    validation_scenes: int
    tokenizer: Length
    text: Length
    generator: Length
    tokenizer_images: int
    prompts_a_category: int
    most_objects: int = 3
    categories: tuple[str, ...] = CATEGORIES


SCALES = {
    "full": Scale(40_000, 1000, Length(1), Length(3), Length(8), 1000, 200),
    # Single objects alone: what can be learned in minutes well enough to tell a working chain from a broken one. Steps, since
    # a fast machine need not go on, and a slow one must not give up earlier.
    "shortened": Scale(20_000, 200, Length(2.5, 1000), Length(2.5, 800), Length(8, 2000), 200, 200, 1, ("single_object", "colors")),
    # Proves that the chain holds together, nothing more.
    "tiny": Scale(256, 64, Length(0.05), Length(0.05), Length(0.05), 16, 2),
}
PICTURES = 48  # a set of prompts, in the report


class Stages:
    """stages.json: what is finished, what it took, and with which settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / "stages.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.state = read_json(self.path) if self.path.exists() else {"settings": settings, "seconds": {}, "done": []}
        if not isinstance(self.state, dict) or self.state.get("settings") != settings:
            raise UserError(f"{folder} holds a quickstart with other settings; name another folder with --out, or delete it")

    def run(self, name: str, title: str, work: Callable[[], Any]) -> None:
        """Do a stage unless it is finished. Time is kept when it is interrupted, too."""
        if name in self.state["done"]:
            print(f"✓ {title}: finished before", flush=True)
            return
        print(f"▶ {title}", flush=True)
        start = time.perf_counter()
        try:
            work()
            self.state["done"].append(name)
        finally:
            spent = time.perf_counter() - start
            self.state["seconds"][name] = self.state["seconds"].get(name, 0.0) + spent
            write_json(self.path, self.state)
        print(f"✓ {title}: {self.state['seconds'][name]:.0f} s", flush=True)


def main(arguments: argparse.Namespace) -> int:
    # The tests of the documentation run everything at once and choose "tiny".
    name = os.environ.get("NAR_T2I_QUICKSTART_SCALE") or ("shortened" if arguments.shortened else "full")
    if name not in SCALES:
        raise UserError(f"NAR_T2I_QUICKSTART_SCALE: {name!r} is none of {', '.join(SCALES)}")
    run = Quickstart(Path(arguments.out), SCALES[name], shuffled_captions=arguments.shuffled_captions)
    stages = Stages(run.folder, {"scale": name, "shuffled_captions": arguments.shuffled_captions})
    # Wall time is a promise to the user, so all cores go to the arithmetic.
    torch.set_num_threads(usable_cores())
    for stage, title, work in (
        ("data", "scenes and vocabulary", run.make_data),
        ("tokenizer", "image tokenizer", run.train_tokenizer),
        ("tokens", "token cache", run.encode),
        ("text", "text encoder", run.train_text),
        ("generator", "generator", run.train_generator),
        ("evaluation", "evaluation", run.evaluate),
    ):
        stages.run(stage, title, work)
    metrics = run.finish(stages.state["seconds"])
    return check_against_chance(metrics, arguments.shuffled_captions) if name == "shortened" else 0


def check_against_chance(metrics: dict[str, Any], shuffled_captions: bool) -> int:
    """Exit status: 0 where a run beats twice chance, or, trained on shuffled captions, does not; else 1.

    Chance is what a perfect generator scores on the prompts of other pictures.
    """
    accuracy = metrics["generator"]["scene_accuracy"]
    score, bar = accuracy["seen"]["overall"], 2 * accuracy["shuffled"]["chance"]["derangement"]["overall"]
    passed = (score > bar) != shuffled_captions
    control = ", trained on shuffled captions, must not exceed" if shuffled_captions else " must exceed"
    verdict = "passed" if passed else "FAILED"
    print(f"check: scene accuracy {score:.3f}{control} twice chance, {bar:.3f}: {verdict}")
    return 0 if passed else 1


class Quickstart:
    """The stages themselves."""

    def __init__(self, folder: Path, scale: Scale, shuffled_captions: bool):
        self.folder, self.scale, self.shuffled_captions = folder, scale, shuffled_captions
        self.workers = usable_cores()
        self.device = best_device()

    def make_data(self) -> None:
        data = self.folder / "data"
        for split, count in (("train", self.scale.train_scenes), ("validation", self.scale.validation_scenes)):
            scenes = RenderedScenes(split, count, most_objects=self.scale.most_objects)
            write_source(ShuffledCaptions(scenes) if self.shuffled_captions else scenes, data / split, workers=self.workers)
        train_sentencepiece(captions_of(ShardSource(str(data / "train")), 50_000), data / "vocabulary.model", 600)

    def train_tokenizer(self) -> None:
        self._fit(
            "tokenizer",
            *self.scale.tokenizer.settings,
            f"data.init_args.train={self.folder}/data/train",
            f"data.init_args.validation={self.folder}/data/validation",
        )

    def encode(self) -> None:
        codec = load_part(self.folder / "tokenizer/model")
        for split in ("train", "validation"):
            source = ShardSource(str(self.folder / "data" / split))
            with self._autocast():
                encode_tokens(codec, source, self.folder / "tokens" / split, 256, device=self.device)

    def train_text(self) -> None:
        self._fit("text", *self.scale.text.settings, *self._tokens_and_captions())

    def train_generator(self) -> None:
        self._fit(
            "generator",
            *self.scale.generator.settings,
            f"init_from={self.folder}/text",
            *self._tokens_and_captions(),
        )

    def _tokens_and_captions(self) -> list[str]:
        return [
            f"model.init_args.tokenizer={self.folder}/tokenizer/model",
            f"model.init_args.text.init_args.vocabulary={self.folder}/data/vocabulary.model",
            f"data.init_args.train={self.folder}/data/train",
            f"data.init_args.validation={self.folder}/data/validation",
            f"data.init_args.cache={self.folder}/tokens/train",
            f"data.init_args.validation_cache={self.folder}/tokens/validation",
        ]

    def evaluate(self) -> None:
        t2i = TextToImage.from_pretrained(self.folder / "generator/model").to(self.device)
        shipped = TextToImage.from_pretrained(shipped_model()).to(self.device)
        with self._autocast():
            tokenizer = evaluate_tokenizer(t2i.tokenizer, self.scale.tokenizer_images, workers=self.workers)
        prompts = {which: self._prompts(which) for which in ("seen", "held_out")}
        pictures: list[dict[str, Any]] = []
        results = {which: self._score(t2i, "quickstart", which, prompts[which], pictures) for which in prompts}
        few = take(prompts["seen"], PICTURES // 12)  # it draws four candidates of each
        self._score(shipped, "shipped", "seen", few, pictures)
        write_json(self.folder / "evaluation/samples.json", pictures)
        self._write_sheet(pictures)
        scores = {
            "tokenizer": tokenizer,
            "generator": generator_metrics(results),
            "shipped": read_json(shipped_model() / "metrics.json")["generator"],
        }
        write_json(self.folder / "evaluation/scores.json", scores)

    def _prompts(self, which: Kinds) -> list[ScenePrompt]:
        kept = [prompt for prompt in committed(which) if prompt.category in self.scale.categories]
        # What the run is asked for is the score of seen combinations; the others get half of the time.
        return take(kept, self.scale.prompts_a_category // (1 if which == "seen" else 2))

    def _score(
        self, t2i: TextToImage, model: str, which: str, prompts: list[ScenePrompt], pictures: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Scores of one model on one set of prompts; some pictures of each category go into the report's list."""
        title = f"{model}, {which}"
        result, images = evaluate_prompts(t2i, prompts, steps=16, batch_size=32, bf16=self._bf16, workers=self.workers, name=title)
        shown = {id(prompt) for prompt in take(prompts, PICTURES // 6)}
        folder = self.folder / "evaluation/samples"
        folder.mkdir(parents=True, exist_ok=True)
        for index, prompt in enumerate(prompts):
            if id(prompt) in shown:
                name = f"{model}-{which}-{index:04d}.png"
                Image.fromarray(images[index]).save(folder / name)
                (passed,) = verdicts([images[index]], [prompt])
                entry = {"file": f"samples/{name}", "prompt": prompt.prompt, "category": prompt.category}
                pictures.append({**entry, "passed": passed, "set": which, "model": model})
        return result

    def _write_sheet(self, pictures: list[dict[str, Any]]) -> None:
        """evaluation/sheet.png: what the trained model drew for seen combinations, as it came."""
        shown = [entry for entry in pictures if entry["model"] == "quickstart" and entry["set"] == "seen"]
        images = [Image.open(self.folder / "evaluation" / entry["file"]) for entry in shown]
        save_whole(contact_sheet(images, [entry["prompt"] for entry in shown]), self.folder / "evaluation/sheet.png")

    def finish(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Write metrics.json and the report, say where to look; returns the metrics."""
        scores = read_json(self.folder / "evaluation/scores.json")
        install = install_seconds()
        wall = {
            "install": install,
            "data": seconds["data"] + seconds["tokens"],
            "tokenizer": seconds["tokenizer"],
            "generator": seconds["text"] + seconds["generator"],
            "evaluation": seconds["evaluation"],
        }
        wall["total"] = sum(wall.values())
        metrics = {**scores, "wall_seconds": {name: round(value, 1) for name, value in wall.items()}}
        metrics |= {"machine": describe_machine(), "versions": versions()}
        write_json(self.folder / "metrics.json", metrics)
        write_report(self.folder)
        accuracy, tokenizer = scores["generator"]["scene_accuracy"], scores["tokenizer"]
        print(
            f"\nDone in {(wall['total'] - install) / 60:.1f} minutes after installing.\n"
            f"  tokenizer        {tokenizer['psnr']:.1f} dB, {tokenizer['codebook_use']:.0%} of the codes in use\n"
            f"  scene accuracy   {accuracy['seen']['overall']:.3f} seen, {accuracy['held_out']['overall']:.3f} held out, "
            f"{accuracy['shuffled']['overall']:.3f} shuffled\n"
            f"  report           {self.folder / 'report.html'}\n"
            f"  pictures         {self.folder / 'evaluation/sheet.png'}\n"
            f'Draw your own:     nar-t2i generate --model {self.folder / "generator/model"} --prompt "a red star" --candidates 4'
        )
        return metrics

    @property
    def _bf16(self) -> bool:
        return fast_precision() == "bf16-mixed"

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)

    def _fit(self, stage: str, *overrides: str) -> None:
        always = [f"run_dir={self.folder / stage}", f"trainer.precision={fast_precision()}"]
        status = run("fit", [f"quickstart/{stage}"], [*always, *overrides])
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            sys.exit(status)


def install_seconds() -> float:
    """What the Makefile noted beside the environment; 0 where it was installed in another way."""
    note = Path(sys.prefix) / "install_seconds"
    return float(note.read_text()) if note.exists() else 0.0
