"""Makes the committed scene prompts: distinct, of sentences that training never reads, with known held-out parts.

"seen": every pair of colour and shape and every relation triple may occur in training. "held_out": each prompt holds a
held-out pair; in position, every other prompt holds a held-out triple of allowed pairs instead.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nar_t2i.data.captions import PLACES, reserved, sentence
from nar_t2i.data.scenes import BACKGROUNDS, HELD_OUT_PAIRS, PAIRS, RELATIONS, SIZES, Group
from nar_t2i.evaluation.scene_prompts import CATEGORIES, Kinds, ScenePrompt

PER_CATEGORY = 200
ALLOWED_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)
ATTRIBUTE_SHARE = {"colors": 1.0, "color_attribution": 1.0, "counting": 0.2, "position": 0.2}
STRIDE = 11  # of the walk round a pool of pairs (28 or 4): coprime, so that all come equally, neighbours mixed
TRIES = 4000  # draws after which there seem to be no more scenes or sentences of a kind


def generate(which: Kinds, per_category: int = PER_CATEGORY, seed: int = 0) -> list[ScenePrompt]:
    """`per_category` prompts of each category, in the order of CATEGORIES; a pure function of the arguments."""
    prompts = []
    texts: set[str] = set()
    for number, category in enumerate(CATEGORIES):
        rng = np.random.Generator(np.random.Philox(key=[seed, 2 * number + (which == "held_out")]))
        for index in range(per_category):
            wanted = _held_out_part(which, category, index)
            groups, relation = _draw_content(category, wanted, index, rng)
            text = _draw_wording(category, groups, relation, index, rng, texts)
            texts.add(text)
            prompts.append(ScenePrompt(text, category, groups, relation))
    return prompts


def _held_out_part(which: Kinds, category: str, index: int) -> str | None:
    if which == "seen":
        return None
    return "triple" if category == "position" and index % 2 else "pair"


def _draw_content(category: str, wanted: str | None, index: int, rng: np.random.Generator) -> tuple[tuple[Group, ...], str | None]:
    """Groups and relation whose held-out part is `wanted`. One kind goes round the pool, so that all come equally; where pairs and
    triples take turns, every other kind of the triples' pool does."""
    pool = sorted(HELD_OUT_PAIRS) if wanted == "pair" else ALLOWED_PAIRS
    turn = index // 2 if wanted == "pair" and category == "position" else index
    others = PAIRS if wanted == "pair" else ALLOWED_PAIRS
    first = pool[STRIDE * turn % len(pool)]
    for _ in range(TRIES):
        second = others[rng.integers(len(others))]
        if second == first:
            continue
        groups, relation = _arrange(category, first, second, rng)
        if _fits(category, groups, index) and ScenePrompt("", category, groups, relation).held_out == wanted:
            return groups, relation
    raise RuntimeError(f"no {category} scene with the held-out part {wanted!r}")


def _arrange(
    category: str, first: tuple[str, str], second: tuple[str, str], rng: np.random.Generator
) -> tuple[tuple[Group, ...], str | None]:
    if category in ("single_object", "colors"):
        return (Group(1, *first),), None
    if category == "counting":
        return (Group(int(rng.integers(2, 4)), *first),), None
    if category != "position":
        return (Group(1, *first), Group(1, *second)), None
    counts = ((1, 1), (2, 1), (1, 2))[rng.choice(3, p=(0.6, 0.2, 0.2))]
    kinds = (first, second) if rng.random() < 0.5 else (second, first)
    return (Group(counts[0], *kinds[0]), Group(counts[1], *kinds[1])), RELATIONS[rng.integers(len(RELATIONS))]


def _fits(category: str, groups: tuple[Group, ...], index: int) -> bool:
    """Different shapes in two_objects; different colours in color_attribution, every third time of the same shape."""
    if category == "two_objects":
        return groups[0].shape != groups[1].shape
    if category == "color_attribution":
        same_shape = groups[0].shape == groups[1].shape
        return groups[0].color != groups[1].color and same_shape == (index % 3 == 1)
    return True


def _draw_wording(
    category: str,
    groups: tuple[Group, ...],
    relation: str | None,
    index: int,
    rng: np.random.Generator,
    taken: set[str],
) -> str:
    """A reserved sentence that is not taken yet. Every third one names a background, and those that no other sentence
    is left for."""
    sizes = tuple(SIZES)
    for attempt in range(TRIES):
        alone = category in ("single_object", "colors")
        names_background = index % 3 == 0 or attempt >= TRIES // 2
        text = sentence(
            tuple(replace(group, size=sizes[rng.integers(len(sizes))]) for group in groups),
            relation,
            rng,
            background=tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))] if names_background else "",
            places=(tuple(PLACES.values())[rng.integers(len(PLACES))],) if alone and rng.random() < 0.2 else (),
            say_size=rng.random() < 0.25,
            attribute=rng.random() < ATTRIBUTE_SHARE.get(category, 0.0),
        )
        if reserved(text) and text not in taken:
            return text
    raise RuntimeError(f"no more sentences for {groups} in {category}")
