"""Scene accuracy: the share of pictures that show exactly what their scene prompt says, by category.

One picture a prompt. Beside the score stand two yardsticks: the same pictures against *other* prompts of their category
(`shuffled`), and what a perfect generator would get there (`chance`), computed exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np

from nar_t2i.data.scenes import OPPOSITE
from nar_t2i.evaluation.detector import Detection, detect, matches
from nar_t2i.evaluation.scene_prompts import CATEGORIES, ScenePrompt

Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


def detect_all(images: Iterable[np.ndarray], workers: int = 1) -> list[Detection]:
    """What each picture, (S, S, 3) uint8, shows; the work is spread over `workers` processes."""
    if workers <= 1:
        return [detect(image) for image in images]
    with get_context("spawn").Pool(workers) as pool:
        return list(pool.imap(detect, images, chunksize=16))


def verdicts(images: Iterable[np.ndarray | Detection], prompts: Sequence[ScenePrompt], workers: int = 1) -> list[bool]:
    """Whether each picture shows what its prompt says. `images`: pictures, or what `detect_all` found in them."""
    return [matches(d, p.groups, p.relation) for d, p in _pairs(images, prompts, workers)]


def score(images: Iterable[np.ndarray | Detection], prompts: Sequence[ScenePrompt]) -> dict[str, Any]:
    """Accuracy by category, and "overall": the mean of the categories that occur.

    images: (n, S, S, 3) uint8, any iterable of such pictures, or what `detect_all` found in them; one a prompt.
    Returns {category: share, …, "overall": share, "passed": {category: number}, "count": {category: number},
    "interval": {category: [low, high], …, "overall": [low, high]}}, the intervals being Wilson's at 95%.
    """
    return _summary(verdicts(images, prompts), prompts)


def shuffled(images: Iterable[np.ndarray | Detection], prompts: Sequence[ScenePrompt]) -> dict[str, Any]:
    """As `score`, with each picture against another prompt of the same category (`derangement`)."""
    partners = derangement(prompts)
    found = [(d, j) for (d, _), j in zip(_pairs(images, prompts), partners, strict=True) if j is not None]
    asked = [prompts[j] for _, j in found]
    return _summary([matches(d, p.groups, p.relation) for (d, _), p in zip(found, asked, strict=True)], asked)


def chance(prompts: Sequence[ScenePrompt]) -> dict[str, dict[str, Any]]:
    """The probability that a perfect generator's picture of prompt i satisfies another prompt j of its category.

    Returns {"all_pairs": …, "derangement": …}: over all ordered pairs i ≠ j, and over the pairs of `derangement`, which
    is what `shuffled` compares with; each {category: probability, …, "overall": their mean}. Exact: a perfect picture
    shows the objects that prompt i says, and in position their relation, whichever way round j says it.
    """
    contents = [_content(prompt) for prompt in prompts]
    partners = [(i, j) for i, j in enumerate(derangement(prompts)) if j is not None]
    fixed = _summary([contents[i] == contents[j] for i, j in partners], [prompts[j] for _, j in partners])
    pairs = {}
    for category, members in _by_category(prompts).items():
        alike = Counter(contents[i] for i in members)
        if len(members) > 1:
            pairs[category] = sum(n * (n - 1) for n in alike.values()) / (len(members) * (len(members) - 1))
    return {"all_pairs": _with_overall(pairs), "derangement": _with_overall({c: fixed[c] for c in pairs})}


def derangement(prompts: Sequence[ScenePrompt]) -> list[int | None]:
    """For each prompt the index of another one of its category, each used once; None where it is alone in it.

    The prompts of a category are put into an order that depends on their number alone, and each takes the next one.
    """
    partner: list[int | None] = [None] * len(prompts)
    for members in _by_category(prompts).values():
        ring = np.random.Generator(np.random.Philox(key=[0, len(members)])).permutation(members).tolist()
        if len(ring) > 1:
            for i, j in zip(ring, ring[1:] + ring[:1], strict=True):
                partner[i] = j
    return partner


def wilson(passed: float, count: float) -> list[float]:
    """Wilson's 95% interval [low, high] of a share: `passed` of `count`."""
    share, z2 = passed / count, Z95 * Z95
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


def _pairs(
    images: Iterable[np.ndarray | Detection], prompts: Sequence[ScenePrompt], workers: int = 1
) -> list[tuple[Detection, ScenePrompt]]:
    images = list(images)
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts; give one a prompt")
    detections = images if images and isinstance(images[0], Detection) else detect_all(images, workers)
    return list(zip(detections, prompts, strict=True))


def _by_category(prompts: Sequence[ScenePrompt]) -> dict[str, list[int]]:
    """The indices of each category that occurs, in the order of CATEGORIES."""
    members = {category: [i for i, p in enumerate(prompts) if p.category == category] for category in CATEGORIES}
    return {category: indices for category, indices in members.items() if indices}


def _content(prompt: ScenePrompt) -> tuple[Any, ...]:
    """What a picture of the prompt shows, the same for all prompts that mean the same."""
    groups = [(g.count, g.color, g.shape) for g in prompt.groups]
    relation = prompt.relation
    if relation is None:
        return (None, *sorted(groups))
    if relation in ("right of", "below"):
        groups, relation = groups[::-1], OPPOSITE[relation]
    return (relation, *groups)


def _summary(passed: Sequence[bool], prompts: Sequence[ScenePrompt]) -> dict[str, Any]:
    members = _by_category(prompts)
    number = {category: sum(passed[i] for i in indices) for category, indices in members.items()}
    count = {category: len(indices) for category, indices in members.items()}
    result: dict[str, Any] = _with_overall({category: number[category] / count[category] for category in members})
    interval = {category: wilson(number[category], count[category]) for category in members}
    if members:
        # The number of pictures whose plain mean is as certain as this mean of means; the total if all counts agree.
        effective = len(members) ** 2 / sum(1 / n for n in count.values())
        interval["overall"] = wilson(result["overall"] * effective, effective)
    return result | {"passed": number, "count": count, "interval": interval}


def _with_overall(shares: dict[str, float]) -> dict[str, Any]:
    return shares | {"overall": sum(shares.values()) / len(shares) if shares else None}
