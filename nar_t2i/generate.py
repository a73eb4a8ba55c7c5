"""`nar-t2i generate`: pictures from prompts, a contact sheet, and films of tokens being filled."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nar_t2i import recipe as recipes
from nar_t2i.editing import Edit, composited, known_outside, known_share, read_edit, read_image
from nar_t2i.errors import UserError
from nar_t2i.folders import CONFIG, folder_hash
from nar_t2i.hardware import best_device
from nar_t2i.hashing import file_hash
from nar_t2i.noise import Noise
from nar_t2i.parts import build, describe
from nar_t2i.pictures import Films, Picture, contact_sheet, save_whole
from nar_t2i.pipeline import TextToImage, seeds_of
from nar_t2i.pixels import to_pil
from nar_t2i.schedules import Guidance
from nar_t2i.types import InferenceStrategy, Known

AT_ONCE = 64  # pictures, candidates counted


def shipped_model() -> Path:
    """The small model in the package."""
    folder = Path(str(resources.files("nar_t2i"))) / "assets" / "model"
    if not folder.is_dir():
        raise UserError("this installation has no shipped model; name one with --model FOLDER")
    return folder


def main(arguments: argparse.Namespace) -> int:
    prompts = [*arguments.prompt, *(_read_prompts(arguments.prompts) if arguments.prompts else [])]
    if not prompts:
        raise UserError("generate: give --prompt TEXT or --prompts FILE")
    t2i = TextToImage.from_pretrained(arguments.model or shipped_model()).to(best_device())
    if arguments.recipe:
        config = recipes.load(arguments.recipe, option="--recipe").config
        if "inference" not in config.get("model", {}).get("init_args", {}):
            raise UserError(f"--recipe {arguments.recipe}: says no way to decode (key model.init_args.inference)")
        decode_by(t2i, config)
    if arguments.compile:
        t2i.compile()
    t2i = t2i.with_decoding(arguments.steps, arguments.guidance_scale, arguments.temperature, arguments.candidates)
    if arguments.negative_prompt is not None and t2i.guidance.scale == 1:
        print("nar-t2i: a guidance scale of 1 is no guidance, so that --negative-prompt changes nothing", file=sys.stderr)
    films = Films(t2i.tokenizer) if arguments.film != "none" else None
    edit, known = _edit(arguments, t2i, len(prompts))
    seeds = seeds_of(arguments.seed, len(prompts)).tolist()
    drawn = _drawn_from(arguments, t2i.inference, t2i.guidance)
    out = Path(arguments.out)
    pictures = [Picture(out / f"{seed:04d}-{_slug(prompt)}.png", {"prompt": prompt, "seed": seed, **drawn})
                for prompt, seed in zip(prompts, seeds, strict=True)]  # fmt: skip
    missing = [i for i, picture in enumerate(pictures) if not picture.is_there(arguments.film)]
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    at_once = max(1, AT_ONCE // getattr(t2i.inference, "candidates", 1))
    starts = range(0, len(missing), at_once)
    for start in tqdm(starts, desc="pictures", unit="batch", mininterval=0.5, disable=len(starts) < 2):
        rows = missing[start : start + at_once]
        samples = t2i.sample(
            [prompts[i] for i in rows],
            seed=[seeds[i] for i in rows],
            negative_prompts=arguments.negative_prompt,
            known=known and Known(known.mask[rows], known.tokens[rows]),
            on_step=films,
        )
        pixels = samples.images if edit is None else composited(samples.images, edit)
        with _writing(out):  # what is drawn is on disk, should the rest be interrupted
            for i, image in zip(rows, to_pil(pixels), strict=True):
                pictures[i].save(image)
            if films:
                films.save([pictures[i].path for i in rows], arguments.film)
    with _writing(out):
        save_whole(contact_sheet([picture.open() for picture in pictures], prompts), out / "sheet.png")
    if t2i.text.truncated:
        print(
            f"nar-t2i: {t2i.text.truncated} of the texts are longer than this model reads; their ends were left out",
            file=sys.stderr,
        )
    before = f" ({len(pictures) - len(missing)} of them drawn before)" if len(missing) < len(pictures) else ""
    print(f"{len(pictures)} pictures in {out}{before}, all of them on {out / 'sheet.png'}")
    return 0


def _drawn_from(arguments: argparse.Namespace, inference: InferenceStrategy, guidance: Guidance) -> dict[str, Any]:
    """What all pictures of a command follow from, beside their prompts and seeds."""
    files = {name: getattr(arguments, name) for name in ("image", "mask")}
    try:
        described = describe(inference)
    except TypeError as error:
        raise UserError(f"the recipe's inference: {error}") from error
    return {
        "model": folder_hash(Path(arguments.model or shipped_model())),
        "inference": _with_hashes(described), "guidance": describe(guidance), "negative_prompt": arguments.negative_prompt,
        **{name: file and file_hash(file) for name, file in files.items()}, "variation": arguments.variation,
    }  # fmt: skip


def _with_hashes(described: Any) -> Any:
    """A description with the hash of each model that it names, such as a critic's, in the place of its folder."""
    if isinstance(described, dict):
        return {key: _with_hashes(value) for key, value in described.items()}
    if isinstance(described, list):
        return [_with_hashes(value) for value in described]
    is_model = isinstance(described, str) and (Path(described) / CONFIG).is_file()
    return folder_hash(Path(described)) if is_model else described


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error


def decode_by(t2i: TextToImage, config: Mapping[str, Any]) -> None:
    """Let a pipeline draw as a resolved recipe says; where it says nothing, as before."""
    model = config.get("model", {}).get("init_args", {})
    try:
        if "inference" in model:
            t2i.inference = build(model["inference"])
        if "guidance" in model:
            t2i.guidance = Guidance(**model["guidance"])
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the recipe's inference and guidance cannot be built: {error}") from error
    if not isinstance(t2i.inference, InferenceStrategy):
        raise UserError(f"the recipe's inference must name a strategy, not {model['inference']!r}")


def _edit(arguments: argparse.Namespace, t2i: TextToImage, rows: int) -> tuple[Edit | None, Known | None]:
    """What --image, --mask and --variation say: pixels to keep, and tokens to keep."""
    if arguments.image is None:
        if arguments.mask is not None or arguments.variation is not None:
            raise UserError("generate: --mask and --variation need --image FILE")
        return None, None
    if arguments.variation is not None:
        if arguments.mask is not None:
            raise UserError("generate: give --mask or --variation, not both")
        noise = Noise(0, seeds_of(arguments.seed, rows).to(t2i.device))
        image = read_image(arguments.image, t2i.tokenizer.image_size)
        return None, known_share(t2i.tokenizer, image, arguments.variation, noise)
    edit = read_edit(arguments.image, arguments.mask, t2i.tokenizer.image_size)
    return edit, known_outside(t2i.tokenizer, edit, rows)


def _read_prompts(path: str) -> list[str]:
    """Of a .jsonl, what its lines call `prompt`; of any other file, the lines."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: {error}") from error
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    prompts = [*lines.values()]
    if Path(path).suffix == ".jsonl":
        prompts = [_prompt_of(line, f"--prompts {path}, line {number}") for number, line in lines.items()]
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: {line[:40]!r} is not JSON: {error}") from error
    prompt = content.get("prompt") if isinstance(content, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: {line[:40]!r} is no object with a prompt")
    return prompt.strip()


def _slug(prompt: str) -> str:
    """A short file name: letters and digits of the prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
