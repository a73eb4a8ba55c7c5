"""`nar-t2i quickstart`: the whole chain on the embedded data set, in stages that an interruption does not lose.

    runs/quickstart/
      data/        rendered scenes as shards, and the vocabulary
      tokenizer/   a run folder; model/ is the trained codec
      tokens/      the token caches of the shards
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

from nar_t2i.errors import UserError
from nar_t2i.folders import read_json, write_json

INTERRUPTED = 130


@dataclass(frozen=True)
class Scale:
    """How much of everything. Minutes bound the training stages on slow machines; steps bound them on fast ones."""

    train_scenes: int
    validation_scenes: int
    tokenizer_minutes: float
    generator_minutes: float
    tokenizer_images: int
    prompts_a_category: int


FULL = Scale(48_000, 1000, 3.75, 7.25, 1000, 200)
SHORTENED = Scale(12_000, 200, 1.5, 2.0, 200, 50)


class Stages:
    """stages.json: what is finished, what it took, and with which settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path = folder / "stages.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.state = read_json(self.path) if self.path.exists() else {"settings": settings, "seconds": {}, "done": []}
        if self.state["settings"] != settings:
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
    scale = SHORTENED if arguments.shortened else FULL
    settings = {"shortened": arguments.shortened, "shuffled_captions": arguments.shuffled_captions, "seed": 0}
    run = Quickstart(Path(arguments.out), scale, shuffled_captions=arguments.shuffled_captions)
    stages = Stages(run.folder, settings)
    # Wall time is a promise to the user, so the two cores go to the arithmetic.
    torch.set_num_threads(os.cpu_count() or 1)
    for name, title, work in (
        ("data", "scenes and vocabulary", run.make_data),
        ("tokenizer", "image tokenizer", run.train_tokenizer),
        ("tokens", "token cache", run.encode),
        ("generator", "generator", run.train_generator),
        ("evaluation", "evaluation", run.evaluate),
    ):
        stages.run(name, title, work)
    return run.finish(stages.state["seconds"])


class Quickstart:
    """The stages themselves."""

    def __init__(self, folder: Path, scale: Scale, shuffled_captions: bool):
        self.folder, self.scale, self.shuffled_captions = folder, scale, shuffled_captions
        self.workers = os.cpu_count() or 1

    def make_data(self) -> None:
        from nar_t2i.data.captions import RenderedScenes, ShuffledCaptions
        from nar_t2i.data.shards import ShardSource
        from nar_t2i.prepare.rendering import write_source
        from nar_t2i.prepare.sentencepiece import captions_of, train_sentencepiece

        data = self.folder / "data"
        for split, count in (("train", self.scale.train_scenes), ("validation", self.scale.validation_scenes)):
            scenes = RenderedScenes(split, count)
            write_source(ShuffledCaptions(scenes) if self.shuffled_captions else scenes, data / split, workers=self.workers)
        train_sentencepiece(captions_of(ShardSource(str(data / "train")), 50_000), data / "vocabulary.model", 400)

    def train_tokenizer(self) -> None:
        self._fit(
            "tokenizer",
            f"model.init_args.budget_minutes={self.scale.tokenizer_minutes}",
            f"data.init_args.train={self.folder}/data/train",
            f"data.init_args.validation={self.folder}/data/validation",
        )

    def encode(self) -> None:
        from nar_t2i.data.shards import ShardSource
        from nar_t2i.folders import load_part
        from nar_t2i.prepare.tokens import encode_tokens

        codec = load_part(self.folder / "tokenizer/model")
        for split in ("train", "validation"):
            with self._autocast():
                encode_tokens(codec, ShardSource(str(self.folder / "data" / split)), self.folder / "tokens" / split, 256)

    def train_generator(self) -> None:
        self._fit(
            "generator",
            f"model.init_args.budget_minutes={self.scale.generator_minutes}",
            f"model.init_args.tokenizer={self.folder}/tokenizer/model",
            f"model.init_args.text.init_args.vocabulary={self.folder}/data/vocabulary.model",
            f"data.init_args.train={self.folder}/data/train",
            f"data.init_args.validation={self.folder}/data/validation",
            f"data.init_args.cache={self.folder}/tokens/train",
            f"data.init_args.validation_cache={self.folder}/tokens/validation",
        )

    def evaluate(self) -> None:
        from nar_t2i.evaluation.command import evaluate_prompts, generator_metrics
        from nar_t2i.evaluation.scene_prompts import committed
        from nar_t2i.evaluation.tokenizer import evaluate_tokenizer
        from nar_t2i.pipeline import TextToImage

        t2i = TextToImage.from_pretrained(self.folder / "generator/model")
        with self._autocast():
            tokenizer = evaluate_tokenizer(t2i.tokenizer, self.scale.tokenizer_images, workers=self.workers)
        results = {}
        for which in ("seen", "held_out"):
            prompts = _first_of_each(committed(which), self.scale.prompts_a_category)
            results[which], _ = evaluate_prompts(
                t2i, prompts, steps=16, batch_size=128, bf16=self._bf16, workers=self.workers, name=which
            )
        (self.folder / "evaluation").mkdir(exist_ok=True)
        write_json(
            self.folder / "evaluation/scores.json",
            {"tokenizer": tokenizer, "generator": generator_metrics(results)},
        )

    def finish(self, seconds: dict[str, float]) -> int:
        """Metrics, the report, and where to look. Status 1 where a shortened run fails its check."""
        from nar_t2i.evaluation.report import write_report

        scores = read_json(self.folder / "evaluation/scores.json")
        install = install_seconds()
        wall = {
            "install": install,
            "data": seconds["data"] + seconds["tokens"],
            "tokenizer": seconds["tokenizer"],
            "generator": seconds["generator"],
            "evaluation": seconds["evaluation"],
        }
        wall["total"] = sum(wall.values())
        metrics = {**scores, "wall_seconds": {name: round(value, 1) for name, value in wall.items()}}
        write_json(self.folder / "metrics.json", metrics)
        write_report(self.folder)
        accuracy = scores["generator"]["scene_accuracy"]
        print(
            f"\nDone in {(wall['total'] - install) / 60:.1f} minutes after installing.\n"
            f"  tokenizer        {scores['tokenizer']['psnr']:.1f} dB, {scores['tokenizer']['codebook_use']:.0%} of the codes\n"
            f"  scene accuracy   {accuracy['seen']['overall']:.3f} seen, {accuracy['held_out']['overall']:.3f} held out, "
            f"{accuracy['shuffled']['overall']:.3f} shuffled\n"
            f"  report           {self.folder / 'report.html'}\n"
            f"  pictures         {self.folder / 'generator/pictures'}\n"
            f'Draw your own:     nar-t2i generate --model {self.folder / "generator/model"} --prompt "a red star above a blue square"'
        )
        return 0

    @property
    def _bf16(self) -> bool:
        from nar_t2i.hardware import fast_precision

        return fast_precision() == "bf16-mixed"

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._bf16)

    def _fit(self, stage: str, *overrides: str) -> None:
        from nar_t2i.hardware import fast_precision
        from nar_t2i.training.command import run

        always = [f"run_dir={self.folder / stage}", f"trainer.precision={fast_precision()}"]
        status = run("fit", [f"quickstart/{stage}"], [*always, *overrides])
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            sys.exit(status)


def _first_of_each(prompts: list[Any], count: int) -> list[Any]:
    """The first `count` prompts of each category, in their order."""
    taken: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        taken[prompt.category] = taken.get(prompt.category, 0) + 1
        if taken[prompt.category] <= count:
            chosen.append(prompt)
    return chosen


def install_seconds() -> float:
    """What the Makefile noted beside the environment; 0 where it was installed in another way."""
    note = Path(sys.prefix) / "install_seconds"
    return float(note.read_text()) if note.exists() else 0.0
