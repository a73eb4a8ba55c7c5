"""GenEval (Ghosh et al. 2023, arXiv 2310.11513). Formats as in the README, evaluate_images.py and summary_scores.py of
github.com/djghosh13/geneval:

    prompts   evaluation_metadata.jsonl: a JSON object a line, with "tag", "prompt", "include", …
    pictures  00000/metadata.jsonl (the line of the prompt), 00000/samples/0000.png to 0003.png
    results   results.jsonl: a JSON object a picture, with "tag", "prompt", "correct", "metadata"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nar_t2i.errors import UserError
from nar_t2i.evaluation.suites.suite import Item, Scores, Suite, read_text, whole


class GenEval(Suite):
    name = "geneval"

    def read(self, path: Path) -> list[Item]:
        items = []
        for line, row in _rows(path, {"tag", "prompt"}):
            items.append(Item(row["prompt"], f"{len(items):05d}", line))
        return whole(items, path)

    def files(self, item: Item, index: int, pictures: int) -> dict[str, list[int]]:
        return {f"{item.place}/samples/{picture:04d}.png": [picture] for picture in range(pictures)}

    def texts(self, item: Item) -> dict[str, str]:
        return {f"{item.place}/metadata.jsonl": item.line}

    def ingest(self, path: Path) -> Scores:
        correct: dict[str, list[bool]] = {}
        prompts: dict[str, bool] = {}
        files: set[str] = set()
        for line, row in _rows(path, {"tag", "prompt", "correct"}):
            if row.get("filename") in files:
                raise UserError(f"{path}: filename {row['filename']!r}: stands twice")
            files |= {row["filename"]} if isinstance(row.get("filename"), str) else set()
            if row["tag"] in ("overall", "images", "prompts"):
                raise UserError(f"{path}: tag {row['tag']!r}: is none of GenEval's: {line[:80]}")
            if row["correct"] not in (True, False):
                raise UserError(f"{path}: correct must be true or false, not {row['correct']!r}: {line[:80]}")
            correct.setdefault(row["tag"], []).append(bool(row["correct"]))
            key = str(row.get("metadata", row["prompt"]))
            prompts[key] = prompts.get(key, False) or bool(row["correct"])
        if not correct:
            raise UserError(f"{path}: holds no result")
        tags = {tag: sum(right) / len(right) for tag, right in correct.items()}
        images = [right for rights in correct.values() for right in rights]
        scores = {"overall": sum(tags.values()) / len(tags), **tags, "images": sum(images) / len(images),
                  "prompts": sum(prompts.values()) / len(prompts)}  # fmt: skip
        counts = {"images": len(images), "prompts": len(prompts), **{tag: len(right) for tag, right in correct.items()}}
        return Scores(
            scores, counts, "shares of right pictures; overall: the mean of the tasks; prompts: with at least one right picture"
        )


def _rows(path: Path, needed: set[str]) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for count, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{count}: is not JSON ({error})") from error
        missing = sorted(needed - row.keys()) if isinstance(row, dict) else sorted(needed)
        if missing:
            raise UserError(f"{path}:{count}: key '{missing[0]}' is missing")
        for key in ("tag", "prompt"):
            if not isinstance(row[key], str):
                raise UserError(f"{path}:{count}: key '{key}' must be a text, not {row[key]!r}")
        rows.append((line, row))
    return rows
