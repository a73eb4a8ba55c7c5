"""`nar-t2i generate`: pictures from prompts, a contact sheet, and films of tokens being filled."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from nar_t2i import recipe as recipes
from nar_t2i.data.files import whole_file
from nar_t2i.editing import Edit, composited, known_outside, known_share, read_edit, read_image
from nar_t2i.errors import UserError
from nar_t2i.folders import CONFIG, folder_hash
from nar_t2i.hardware import best_device
from nar_t2i.hashing import file_hash
from nar_t2i.noise import Noise
from nar_t2i.parts import build, describe, with_defaults
from nar_t2i.pipeline import TextToImage, seeds_of
from nar_t2i.pixels import to_uint8
from nar_t2i.schedules import Guidance
from nar_t2i.types import InferenceStrategy, Known, Step, TokenCodec

AT_ONCE = 64  # pictures, candidates counted
DRAWN_FROM = "nar-t2i"  # the key of a PNG's text that says, as JSON, all that the picture was drawn from
UNKNOWN_GREY = 150
FRAME_MILLISECONDS = 180


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
    inference, guidance = t2i.decoding(arguments.steps, arguments.guidance_scale, arguments.temperature, arguments.candidates)
    if arguments.negative_prompt is not None and guidance.scale == 1:
        print("nar-t2i: a guidance scale of 1 is no guidance, so that --negative-prompt changes nothing", file=sys.stderr)
    films = Films(t2i.tokenizer) if arguments.film != "none" else None
    edit, known = _edit(arguments, t2i, len(prompts))
    seeds = seeds_of(arguments.seed, len(prompts)).tolist()
    drawn = _drawn_from(arguments, inference, guidance)
    out = Path(arguments.out)
    pictures = [Picture(out / f"{seed:04d}-{_slug(prompt)}.png", {"prompt": prompt, "seed": seed, **drawn})
                for prompt, seed in zip(prompts, seeds, strict=True)]  # fmt: skip
    missing = [i for i, picture in enumerate(pictures) if not picture.is_there(arguments.film)]
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    at_once = max(1, AT_ONCE // getattr(inference, "candidates", 1))
    starts = range(0, len(missing), at_once)
    for start in tqdm(starts, desc="pictures", unit="batch", mininterval=0.5, disable=len(starts) < 2):
        rows = missing[start : start + at_once]
        samples = t2i.sample(
            [prompts[i] for i in rows],
            steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            temperature=arguments.temperature,
            seed=[seeds[i] for i in rows],
            negative_prompts=arguments.negative_prompt,
            known=known and Known(known.mask[rows], known.tokens[rows]),
            on_step=films,
            candidates=arguments.candidates,
        )
        pixels = samples.images if edit is None else composited(samples.images, edit)
        with _writing(out):  # what is drawn is on disk, should the rest be interrupted
            for i, image in zip(rows, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                pictures[i].save(Image.fromarray(image))
            if films:
                films.save([pictures[i].path for i in rows], arguments.film)
    with _writing(out):
        save_whole(contact_sheet([picture.open() for picture in pictures], prompts), out / "sheet.png")
    if t2i.text.truncated:
        print(f"nar-t2i: {t2i.text.truncated} of the texts are longer than this model reads; their ends were left out", file=sys.stderr)
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


class Picture(NamedTuple):
    """A picture's file, which says what it was drawn from, as a text of its own: what is there is not drawn again, and no picture is
    overwritten by another."""

    path: Path
    drawn_from: dict[str, Any]

    def is_there(self, film: str) -> bool:
        """And its film, if there is to be one. UserError where another picture is."""
        if not self.path.exists():
            return False
        try:
            with Image.open(self.path) as image:
                image.load()  # all of it
                there = json.loads(image.info[DRAWN_FROM])
        except (OSError, ValueError, KeyError):
            there = None
        same = isinstance(there, dict)
        differing = [key for key, value in json.loads(json.dumps(self.drawn_from)).items() if not same or there.get(key) != value]
        if differing:
            what = f"was drawn by another {differing[0].replace('_', ' ')}" if same else "was not drawn by this command, or is not whole"
            raise UserError(f"--out {self.path.parent}: {self.path.name} is there, and {what}; name another folder, or delete it")
        return film == "none" or film_path(self.path, film).exists()

    def save(self, image: Image.Image) -> None:
        told = PngInfo()
        told.add_text(DRAWN_FROM, json.dumps(self.drawn_from))
        for kind in ("strip", "gif"):
            film_path(self.path, kind).unlink(missing_ok=True)  # of a picture that was here before
        save_whole(image, self.path, pnginfo=told)

    def open(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from error


def save_whole(image: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture so that it is there whole or not at all. options: of Pillow's save."""
    with whole_file(path) as file:
        image.save(file, path.suffix[1:], **options)


def decode_by(t2i: TextToImage, config: Mapping[str, Any]) -> None:
    """Let a pipeline draw as a resolved recipe says; where it says nothing, as before."""
    model = config.get("model", {}).get("init_args", {})
    try:
        if "inference" in model:
            t2i.inference = build(with_defaults(model["inference"]))
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
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if Path(path).suffix == ".jsonl":
        prompts = [_prompt_of(line, path) for line in prompts]
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt")
    return prompts


def _prompt_of(line: str, path: str) -> str:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"--prompts {path}: {line[:40]!r} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise UserError(f"--prompts {path}: {line[:40]!r} is no object with a prompt")
    return content["prompt"].strip()


def _slug(prompt: str) -> str:
    """A short file name: letters and digits of the prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, side: int = 160) -> Image.Image:
    """All pictures in rows, each with its caption below. side: pixels a picture on the sheet."""
    columns = min(columns, len(images))
    font = ImageFont.load_default(size=11)
    text_height, gap = 44, 8
    cell_width, cell_height = side + gap, side + text_height + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + index % columns * cell_width, gap + index // columns * cell_height
        resample = Image.Resampling.NEAREST if side % image.width == 0 else Image.Resampling.BICUBIC
        sheet.paste(image.resize((side, side), resample), (x, y))
        lines = textwrap.wrap(caption, width=side // 6)[:3]
        draw.multiline_text((x, y + side + 3), "\n".join(lines), fill="black", font=font, spacing=2)
    return sheet


def film_path(picture: Path, kind: str) -> Path:
    """Where the film of a picture goes: a name that no picture has."""
    return picture.with_suffix(".film.png" if kind == "strip" else ".film.gif")


class Films:
    """Collects the pictures of every step, until they are saved; tokens that are not known yet are shown as grey patches."""

    def __init__(self, tokenizer: TokenCodec):
        if len(tokenizer.spec.shape) != 2:
            raise UserError("--film: this model's tokens are no grid, so there are no places to show")
        self.tokenizer = tokenizer
        self._batches: list[list[torch.Tensor]] = []

    def __call__(self, step: Step) -> None:
        if step.step == 0:
            self._batches.append([])
        images = to_uint8(self.tokenizer.decode(step.tokens))
        scale = images.shape[-1] // self.tokenizer.spec.shape[-1]
        unknown = step.masked.view(-1, 1, *self.tokenizer.spec.shape)
        unknown = unknown.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        self._batches[-1].append(torch.where(unknown, UNKNOWN_GREY, images).byte().cpu())

    def save(self, paths: Sequence[Path], kind: str) -> None:
        """Write a film beside every picture since the last call. paths: of the pictures. kind: "strip" or "gif"."""
        films = [film for batch in self._batches for film in zip(*batch, strict=True)]
        self._batches = []
        for path, film in zip(paths, films, strict=True):
            frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in film]
            if kind == "strip":
                strip = Image.new("RGB", (len(frames) * (frames[0].width + 2), frames[0].height), "white")
                for index, frame in enumerate(frames):
                    strip.paste(frame, (index * (frame.width + 2), 0))
                save_whole(strip, film_path(path, kind))
            else:
                large = [f.resize((4 * f.width, 4 * f.height), Image.Resampling.NEAREST) for f in frames]
                save_whole(
                    large[0],
                    film_path(path, kind),
                    save_all=True,
                    append_images=large[1:] + [large[-1]] * 6,
                    duration=FRAME_MILLISECONDS,
                    loop=0,
                )
