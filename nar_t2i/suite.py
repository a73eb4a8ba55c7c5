"""`nar-t2i suite draw | ingest`: pictures for the programs of another benchmark, in its layout, and its results back.

    OUT/                the pictures, and nothing else
    OUT.work/           settings.json, and files that are being written

A prompt whose files are there is not drawn again, so that the same command goes on after an interruption; ranks share the
prompts. Picture j of prompt i has seed + i · pictures + j.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from tqdm import tqdm

from nar_t2i.errors import UserError
from nar_t2i.evaluation.drawing import Sampler
from nar_t2i.evaluation.ranks import Ranks, ranks
from nar_t2i.evaluation.suites import SUITES, Suite
from nar_t2i.evaluation.suites.suite import Item
from nar_t2i.files import file_to_write, read_json, whole_file, write_json
from nar_t2i.folders import check_same
from nar_t2i.hardware import exact_fp32
from nar_t2i.hashing import file_hash, text_hash
from nar_t2i.pipeline import TextToImage
from nar_t2i.pixels import to_pil
from nar_t2i.training.models import open_models

FORMAT = 1
JPEG_QUALITY = 95  # our choice


def main(arguments: argparse.Namespace) -> int:
    suite = SUITES[arguments.name]
    if arguments.step == "ingest":
        return ingest(suite, Path(arguments.results), file_to_write("--out", arguments.out, "suite"))
    exact_fp32()
    with ranks() as group:
        draw(suite, arguments, group)
    return 0


def ingest(suite: Suite, results: Path, out: Path) -> int:
    """Write a suite's results as JSON that `nar-t2i report` shows."""
    found = suite.ingest(results)
    source: dict[str, Any] = {"name": results.name} | ({"sha256": file_hash(results)} if results.is_file() else {})
    content = {"format": FORMAT, "kind": "suite", "suite": suite.name, "about": found.about, **found._asdict(), "source": source}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, content)
    print(", ".join(f"{name} {value:.4g}" for name, value in found.scores.items()))
    print(f"written to {out}")
    return 0


def draw(suite: Suite, arguments: argparse.Namespace, group: Ranks) -> None:
    """Draw what is missing. All ranks must call it. Raises UserError."""
    pictures = suite.pictures if arguments.pictures is None else arguments.pictures
    if pictures < 1 or arguments.batch_size < 1:
        raise UserError(f"--pictures {pictures} and --batch-size {arguments.batch_size} must be at least 1")
    if arguments.weights == "both":
        raise UserError("--weights both: a suite is drawn by one kind of weights at a time; take ema or raw")
    items = suite.read(Path(arguments.prompts))
    out = Path(arguments.out).absolute()
    if out.is_dir() and out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"--out {arguments.out}: holds other things than a suite's pictures; name a folder of their own")
    work = out.with_name(f"{out.name}.work")
    files = [suite.files(item, index, pictures) for index, item in enumerate(items)]
    group.on_first(lambda: work.mkdir(parents=True, exist_ok=True))
    (model,) = open_models(Path(arguments.model), arguments.weights, work, group)
    settings = {
        "suite": suite.name, "prompts": text_hash(repr(items)), "pictures": pictures,
        "model": model.identity, "weights": model.name, "seed": arguments.seed, "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale, "candidates": arguments.candidates, "precision": arguments.precision,
    }  # fmt: skip
    group.on_first(lambda: _settle(work / "settings.json", settings, out))
    t2i = group.together(lambda: TextToImage.from_pretrained(model.folder)).to(group.device)
    sampler = Sampler(
        t2i,
        arguments.steps,
        arguments.guidance_scale,
        arguments.candidates,
        bf16=arguments.precision == "bf16-mixed",
        batch_size=arguments.batch_size,
    )
    missing = group.agreed(
        [n for n in range(len(items)) if not all((out / f).exists() for f in (*files[n], *suite.texts(items[n])))]
    )
    mine = missing[group.rank :: group.world]
    at_once = max(1, arguments.batch_size // pictures)

    def work_through() -> None:
        for start in tqdm(range(0, len(mine), at_once), desc=suite.name, unit="batch", mininterval=0.5, disable=not group.first):
            chosen = mine[start : start + at_once]
            prompts = [items[n].prompt for n in chosen for _ in range(pictures)]
            seeds = [arguments.seed + n * pictures + picture for n in chosen for picture in range(pictures)]
            images = to_pil(sampler(prompts, seeds).images)
            for row, n in enumerate(chosen):
                _write(suite, out, work, items[n], files[n], images[row * pictures : (row + 1) * pictures])

    group.together(work_through)
    if group.first:
        print(f"{len(items)} prompts of {suite.name}, {pictures} pictures each, in {out}")


def _settle(path: Path, settings: dict[str, Any], out: Path) -> None:
    if path.exists() and "suite" not in read_json(path):
        raise UserError(f"--out {out}: {path} is of an evaluation; name another folder")
    if not (out.is_dir() and any(out.iterdir())):
        write_json(path, settings)
    elif path.exists():
        check_same(path, settings)
    else:
        raise UserError(
            f"{out}: holds files, and nothing says what drew them, since {path} is missing; name another folder with --out"
        )


def _write(suite: Suite, out: Path, work: Path, item: Item, files: dict[str, list[int]], images: Sequence[Image.Image]) -> None:
    """The files of one prompt: written beside the folder, since the programs read all that lies in it, and renamed."""
    for name, text in suite.texts(item).items():
        with _placed(out / name, work) as file:
            file.write(text.encode())
    for name, shown in files.items():
        image = suite.image([images[picture] for picture in shown])
        with _placed(out / name, work) as file:
            image.save(file, "JPEG", quality=JPEG_QUALITY) if name.endswith(".jpg") else image.save(file, "PNG")


def _placed(path: Path, work: Path) -> AbstractContextManager[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return whole_file(path, work)
