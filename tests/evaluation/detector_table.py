"""Print the table in docs/scene-accuracy.md: `python -m tests.evaluation.detector_table`. About five minutes a core."""

import numpy as np

from nar_t2i.data.scenes import render
from nar_t2i.evaluation.detector import detect, matches
from nar_t2i.evaluation.scene_prompts import CATEGORIES
from tests.evaluation import spoil
from tests.evaluation.test_detector import scenes, share_accepted, truth

CHANGES = ("color", "shape", "count", "relation")


def rows(size: int):
    """(what was done, share accepted a category); None where a category has no such change."""
    rng = np.random.default_rng(0)
    yield "perfect", [share_passed(c, size) for c in CATEGORIES]
    soft = ((spoil.softened(render(s, size), rng) for s in scenes(c)) for c in CATEGORIES)
    yield "perfect, softened", [share_accepted(images, scenes(c)) for images, c in zip(soft, CATEGORIES, strict=True)]
    for kind in CHANGES:
        yield f"caption: {kind} changed", [share_changed(c, size, kind, rng) for c in CATEGORIES]
    for kind in spoil.BREAKS:
        broken = ((spoil.broken(s, size, kind, rng) for s in scenes(c)) for c in CATEGORIES)
        shares = [share_accepted(images, scenes(c)) for images, c in zip(broken, CATEGORIES, strict=True)]
        yield f"outline: {kind}", shares
    yield "object added", [share_with_one_more(c, size, rng) for c in CATEGORIES]


def share_passed(category: str, size: int) -> float:
    pairs = zip(truth(category, size), scenes(category), strict=True)
    return float(np.mean([matches(found, scene.groups, scene.relation) for found, scene in pairs]))


def share_changed(category: str, size: int, kind: str, rng: np.random.Generator) -> float | None:
    if kind == "relation" and category != "position":
        return None
    pairs = zip(truth(category, size), scenes(category), strict=True)
    return float(np.mean([matches(found, *spoil.changed(scene, kind, rng)) for found, scene in pairs]))


def share_with_one_more(category: str, size: int, rng: np.random.Generator) -> float:
    more = [(spoil.with_object_added(scene, rng), scene) for scene in scenes(category)]
    drawn = [(detect(render(m, size)), s) for m, s in more if m is not None]
    return float(np.mean([matches(found, scene.groups, scene.relation) for found, scene in drawn]))


def main() -> None:
    for size in (64, 256):
        print(f"\n| {size} px | " + " | ".join(CATEGORIES) + " |\n|" + "---|" * (len(CATEGORIES) + 1))
        for name, shares in rows(size):
            cells = ("–" if share is None else f"{share:.3f}" for share in shares)
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
