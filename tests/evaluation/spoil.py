"""Ways to spoil a scene: wrong objects, broken outlines, objects too many, and the softness of a decoder.

Every function takes a numpy Generator and changes one thing, as a person would notice it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nar_t2i.data.scenes import COLORS, PAIRS, RELATIONS, Group, PlacedObject, Scene, backdrop, coverage

BREAKS = ("wedge", "bite", "hole", "band", "lump", "patch")
PIECE = (0.18, 0.3)  # share of an object's area that a break takes away


def _layers(scene: Scene, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """(size, size, 3) background, and one (size, size) share of coverage an object."""
    covers = []
    for placed in scene.objects:
        rows, columns, alpha = coverage(placed, size)
        cover = np.zeros((size, size))
        cover[rows, columns] = alpha
        covers.append(cover)
    return backdrop(scene.background, size).copy(), covers


def _paint(canvas: np.ndarray, cover: np.ndarray, color: str) -> None:
    canvas += cover[..., None] * (np.array(COLORS[color], dtype=np.float64) - canvas)


def broken(scene: Scene, size: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3) uint8: the scene with one object broken in the way that BREAKS names."""
    canvas, covers = _layers(scene, size)
    victim = int(rng.integers(len(covers)))
    for index, (placed, cover) in enumerate(zip(scene.objects, covers, strict=True)):
        if index != victim:
            _paint(canvas, cover, placed.color)
        elif kind == "patch":
            piece = _piece(placed, cover, rng, PIECE)
            _paint(canvas, cover * (1 - piece), placed.color)
            _paint(canvas, cover * piece, str(rng.choice([c for c in COLORS if c != placed.color])))
        elif kind == "lump":
            _paint(canvas, np.maximum(cover, _lump(placed, cover, rng)), placed.color)
        else:
            _paint(canvas, cover * (1 - TAKEN_AWAY[kind](placed, cover, rng)), placed.color)
    return np.rint(canvas).astype(np.uint8)


def _grid(placed: PlacedObject, cover: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of each pixel, in pixels from the object's centre."""
    size = len(cover)
    axis = np.arange(size) + 0.5
    return np.meshgrid(axis - placed.x * size, axis - placed.y * size)


def _edge(distance: np.ndarray) -> np.ndarray:
    """Share of each pixel that lies inside (distance < 0)."""
    return np.clip(0.5 - distance, 0, 1)


def _grown(cover: np.ndarray, target: float, make) -> np.ndarray:
    """The piece `make(t)`, growing with t, that covers the share `target` of the object (t by bisection)."""
    low, high = 0.0, 1.0
    for _ in range(24):
        t = (low + high) / 2
        low, high = (t, high) if (cover * make(t)).sum() < target * cover.sum() else (low, t)
    return make(high)


def _piece(placed: PlacedObject, cover: np.ndarray, rng: np.random.Generator, share: tuple[float, float]) -> np.ndarray:
    """What a straight cut in a random direction takes off. A strip along a triangle's side is never cut: what remains
    would be a triangle."""
    x, y = _grid(placed, cover)
    angle, reach = rng.uniform(0, 2 * np.pi), 1.6 * placed.radius * len(cover)
    if placed.shape == "triangle":  # within 35 degrees of a corner; the piece lies towards `angle` + pi
        angle = np.pi / 2 + rng.integers(3) * 2 * np.pi / 3 + rng.uniform(-1, 1) * np.radians(35)
    along = x * np.cos(angle) + y * np.sin(angle)
    return _grown(cover, rng.uniform(*share), lambda t: _edge(along - reach * (2 * t - 1)))


def _bite(placed: PlacedObject, cover: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _piece(placed, cover, rng, PIECE)


def _wedge(placed: PlacedObject, cover: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sector around the centre, as taken out of a pie."""
    x, y = _grid(placed, cover)
    middle = rng.uniform(0, 2 * np.pi)
    angle = np.abs((np.arctan2(y, x) - middle + np.pi) % (2 * np.pi) - np.pi)
    return _grown(cover, rng.uniform(*PIECE), lambda t: (angle < np.pi * t).astype(float))


def _hole(placed: PlacedObject, cover: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A round hole near the centre."""
    x, y = _grid(placed, cover)
    radius = placed.radius * len(cover)
    dx, dy = rng.uniform(-0.2, 0.2, 2) * radius
    distance = np.hypot(x - dx, y - dy)
    return _grown(cover, rng.uniform(*PIECE), lambda t: _edge(distance - radius * t))


def _band(placed: PlacedObject, cover: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A straight gap through the middle, a quarter to four tenths of the radius wide."""
    x, y = _grid(placed, cover)
    angle, radius = rng.uniform(0, 2 * np.pi), placed.radius * len(cover)
    return _edge(np.abs(x * np.cos(angle) + y * np.sin(angle)) - rng.uniform(0.25, 0.4) * radius / 2)


TAKEN_AWAY = {"wedge": _wedge, "bite": _bite, "hole": _hole, "band": _band}


def _lump(placed: PlacedObject, cover: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A disc on the outline that adds at least 12% to the area."""
    x, y = _grid(placed, cover)
    angle, radius = rng.uniform(0, 2 * np.pi), placed.radius * len(cover)
    along, across = x * np.cos(angle) + y * np.sin(angle), x * np.sin(angle) - y * np.cos(angle)
    reach = along[(cover > 0.5) & (np.abs(across) < 1)].max()
    distance = np.hypot(along - reach, across)
    for t in np.linspace(0.35, 1.2, 40):
        disc = _edge(distance - t * radius)
        if (disc * (1 - cover)).sum() > 0.12 * cover.sum():
            return disc
    raise AssertionError("a disc of 1.2 radii adds less than 12%")


def changed(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[tuple[Group, ...], str | None]:
    """What a caption of the scene says with one thing wrong: "color", "shape", "count" or "relation"."""
    groups, relation = list(scene.groups), scene.relation
    if kind == "relation":
        assert relation is not None
        return scene.groups, str(rng.choice([r for r in RELATIONS if r != relation]))
    at = int(rng.integers(len(groups)))
    if kind == "count":
        options = [n for n in (1, 2, 3) if n != groups[at].count]
        groups[at] = replace(groups[at], count=int(rng.choice(options)))
        return tuple(groups), relation
    others = [g.kind for g in groups]
    same = 1 if kind == "color" else 0  # the part of the kind that stays
    options = [p for p in PAIRS if p[same] == groups[at].kind[same] and p not in others]
    color, shape = options[rng.integers(len(options))]
    groups[at] = replace(groups[at], color=color, shape=shape)
    return tuple(groups), relation


def with_object_added(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The scene with one more object of any kind, clear of the others; None where a few hundred draws find no place."""
    for _ in range(300):
        color, shape = PAIRS[rng.integers(len(PAIRS))]
        radius = rng.uniform(0.115, 0.16)
        margin = 1.3 * radius + 0.01
        x, y = margin + rng.random(2) * (1 - 2 * margin)
        clear = [np.hypot(x - o.x, y - o.y) > 1.2 * (radius + o.radius) + 0.03 for o in scene.objects]
        if all(clear):
            added = PlacedObject(color, shape, float(x), float(y), float(radius))
            return replace(scene, objects=(*scene.objects, added))
    return None


def softened(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As after a decoder: blur of 0.6 pixels at 64, noise of 4 levels, a colour shift of up to 10 levels a channel."""
    sigma = 0.6 * len(image) / 64
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    blurred = image.astype(np.float64)
    for axis in (0, 1):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(blurred, width, mode="edge")
        blurred = sum(k * np.take(padded, np.arange(len(image)) + i, axis) for i, k in enumerate(kernel))
    blurred += rng.normal(0, 4, image.shape) + rng.uniform(-10, 10, 3)
    return np.rint(blurred.clip(0, 255)).astype(np.uint8)
