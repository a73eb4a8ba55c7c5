"""Scene prompts: sentences together with the objects that a picture of them must show. JSON lines, one prompt a line:

    {"prompt": "two red stars above a blue square", "category": "position", "relation": "above",
     "groups": [{"count": 2, "color": "red", "shape": "star"}, {"count": 1, "color": "blue", "shape": "square"}]}

The six categories are GenEval's (Ghosh et al. 2023), in the world of `nar_t2i.data.scenes`:

- single_object: one object ("a red circle");
- two_objects: two objects of different shapes, no relation ("a red circle and a blue star");
- counting: two or three identical objects ("three pink squares");
- colors: one object whose colour is said as an attribute ("a circle that is red");
- position: two groups of one or two objects, and how group 0 lies to group 1 ("two red stars above a blue square");
- color_attribution: two objects, their different colours said as attributes ("a star that is red and a star colored blue").

A third of the committed prompts also name a background; some name a size or a place. None of these is scored.
`nar_t2i.evaluation.prompt_generator` makes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from nar_t2i.data.scenes import COLORS, HELD_OUT_PAIRS, RELATIONS, SHAPES, Group, triple_held_out
from nar_t2i.errors import UserError

CATEGORIES = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
Kinds = Literal["seen", "held_out"]


@dataclass(frozen=True)
class ScenePrompt:
    """prompt: the sentence. groups: exactly what the picture must show (their `size` means nothing here).
    relation: how group 0 lies to group 1, or None."""

    prompt: str
    category: str
    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def held_out(self) -> str | None:
        """ "pair" or "triple" where training never shows such a colour and shape, or such a relation; else None."""
        if any(group.kind in HELD_OUT_PAIRS for group in self.groups):
            return "pair"
        if self.relation and triple_held_out(self.groups[0].kind, self.relation, self.groups[1].kind):
            return "triple"
        return None


# ---- files ---------------------------------------------------------------------------------------------------------


def committed(which: Kinds) -> list[ScenePrompt]:
    """The prompts that travel with the package: "seen" combinations only, or "held_out" ones."""
    with resources.as_file(resources.files("nar_t2i") / "assets" / "prompts" / f"{which}.jsonl") as path:
        return load(path)


def take(prompts: Iterable[ScenePrompt], per_category: int) -> list[ScenePrompt]:
    """The first `per_category` prompts of each category, in their order: a quick look at a long file."""
    left = dict.fromkeys(CATEGORIES, per_category)
    kept = []
    for prompt in prompts:
        if left[prompt.category] > 0:
            left[prompt.category] -= 1
            kept.append(prompt)
    return kept


def load(path: str | os.PathLike[str]) -> list[ScenePrompt]:
    """Read scene prompts; blank lines are skipped. Raises UserError that names file, line and key."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); give a file of scene prompts") from error
    prompts = [_parse(line, f"{path}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no scene prompts; write one JSON object a line")
    return prompts


def save(prompts: Iterable[ScenePrompt], path: str | os.PathLike[str]) -> None:
    """Write scene prompts as JSON lines; the same prompts always give the same bytes."""
    rows = [
        {
            "prompt": p.prompt,
            "category": p.category,
            "groups": [{"count": g.count, "color": g.color, "shape": g.shape} for g in p.groups],
            "relation": p.relation,
        }
        for p in prompts
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_bytes(lines.encode())


def _parse(line: str, where: str) -> ScenePrompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error}); write one JSON object a line") from error
    _check_keys(row, {"prompt", "category", "groups"}, {"relation"}, where)
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise UserError(f"{where}: key 'prompt' must be a sentence, got {row['prompt']!r}")
    _check_one_of(row["category"], CATEGORIES, where, "category")
    if not isinstance(row["groups"], list) or not row["groups"]:
        raise UserError(f"{where}: key 'groups' must be a list of at least one group, got {row['groups']!r}")
    groups = tuple(_parse_group(group, f"{where}: key 'groups'[{i}]") for i, group in enumerate(row["groups"]))
    if len({group.kind for group in groups}) < len(groups):
        raise UserError(f"{where}: key 'groups' names a colour and shape twice; give one group a larger count")
    relation = row.get("relation")
    if (relation is None) == (row["category"] == "position"):
        raise UserError(f"{where}: key 'relation' must be given for position prompts and null for all others")
    if relation is not None:
        _check_one_of(relation, RELATIONS, where, "relation")
        if len(groups) != 2:
            raise UserError(f"{where}: key 'groups' must hold two groups where there is a relation, got {len(groups)}")
    return ScenePrompt(row["prompt"], row["category"], groups, relation)


def _parse_group(group: Any, where: str) -> Group:
    _check_keys(group, {"count", "color", "shape"}, set(), where)
    count = group["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{where}: key 'count' must be a whole number from 1 on, got {count!r}")
    _check_one_of(group["color"], COLORS, where, "color")
    _check_one_of(group["shape"], SHAPES, where, "shape")
    return Group(count, group["color"], group["shape"])


def _check_keys(row: Any, needed: set[str], optional: set[str], where: str) -> None:
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object with the keys {sorted(needed)}, got {row!r}")
    for key in sorted(needed - row.keys()):
        raise UserError(f"{where}: key '{key}' is missing")
    for key in sorted(row.keys() - needed - optional):
        raise UserError(f"{where}: key '{key}' is unknown; the keys are {sorted(needed | optional)}")


def _check_one_of(value: Any, options: Iterable[str], where: str, key: str) -> None:
    if not isinstance(value, str) or value not in tuple(options):
        raise UserError(f"{where}: key '{key}' must be one of {', '.join(options)}; got {value!r}")
