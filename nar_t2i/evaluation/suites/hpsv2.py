"""HPSv2's benchmark (Wu et al. 2023, arXiv 2306.09341). Formats as in the README and evaluation.py of github.com/tgxs002/HPSv2:

prompts   a folder of anime.json, concept-art.json, paintings.json, photo.json, a list of 800 prompts each; or one of them
pictures  anime/00000.jpg to 00799.jpg, …
results   what hpsv2.evaluate prints, kept as text: "<model> anime 27.34  0.1512" a style, and "Average"; or, where scores
          were taken one by one with hpsv2.score, JSON: {"anime": [0.27, …], …}
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from nar_t2i.errors import UserError
from nar_t2i.evaluation.suites.suite import Item, Scores, Suite, finite_number, read_text, whole
from nar_t2i.files import read_json

ROUNDED = 0.011  # of a mean and its parts, to two decimals each
STYLES = ("anime", "concept-art", "paintings", "photo")
_LINE = re.compile(rf"^.*?\b({'|'.join(STYLES)}|Average)\s+(-?[\d.]+|nan)\s*([\d.]*|nan)\s*$")


class Hpsv2(Suite):
    name = "hpsv2"
    pictures = 1

    def read(self, path: Path) -> list[Item]:
        files = [path / f"{style}.json" for style in STYLES] if path.is_dir() else [path]
        items = []
        for file in files:
            prompts = read_json(file)
            if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
                raise UserError(f"{file}: must be a list of prompts")
            items += [Item(prompt, f"{file.stem}/{index:05d}") for index, prompt in enumerate(prompts)]
        return whole(items, path)

    def files(self, item: Item, index: int, pictures: int) -> dict[str, list[int]]:
        if pictures != 1:
            raise UserError(f"hpsv2: takes 1 picture of a prompt, not {pictures}")
        return {f"{item.place}.jpg": [0]}

    def ingest(self, path: Path) -> Scores:
        text = read_text(path)
        scores, counts = _listed(text, path) if text.lstrip().startswith("{") else _printed(text, path)
        if not scores:
            raise UserError(f"{path}: holds no score of {', '.join(STYLES)}")
        overall = {"overall": scores.pop("Average")} if "Average" in scores else {}
        if not overall and (counts or set(scores) == set(STYLES)):  # some are no whole, and only counts would tell it
            overall = {"overall": sum(scores.values()) / len(scores)}
        return Scores({**overall, **scores}, counts, "HPSv2 in percent; versions 2.0 and 2.1 do not compare")


def _printed(text: str, path: Path) -> tuple[dict[str, float], dict[str, int]]:
    found = [match for match in map(_LINE.match, text.splitlines()) if match]
    scores: dict[str, float] = {}
    for match in found:
        if match[1] in scores:
            raise UserError(f"{path}: holds {match[1]} twice: the scores of several models; keep the lines of one")
        scores[match[1]] = finite_number(match[2], match[0])
        if not 1 < scores[match[1]] < 100:
            raise UserError(f"{path}: {match[0].strip()}: is no score in percent, as the present hpsv2 prints it")
    styles = [scores[style] for style in STYLES if style in scores]
    if "Average" in scores and len(styles) == len(STYLES) and abs(sum(styles) / len(styles) - scores["Average"]) > ROUNDED:
        raise UserError(f"{path}: says {scores['Average']:.2f}, but its styles have a mean of {sum(styles) / len(styles):.2f}")
    return scores, {}


def _listed(text: str, path: Path) -> tuple[dict[str, float], dict[str, int]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    scores, counts = {}, {}
    for style, values in pairs:
        if style in scores:
            raise UserError(f"{path}: key {style}: stands twice")
        if style not in STYLES or not isinstance(values, list) or not values:
            raise UserError(f"{path}: key {style}: must be one of {', '.join(STYLES)} with a list of scores")
        numbers = [finite_number(value, f"{path}: key {style}") for value in values]
        if not all(0 < value < 1 for value in numbers):
            raise UserError(f"{path}: key {style}: holds what is no score as hpsv2.score gives it, such as 0.27")
        scores[style], counts[style] = 100 * sum(numbers) / len(numbers), len(numbers)
    return scores, counts
