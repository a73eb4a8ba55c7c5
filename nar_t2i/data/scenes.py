"""Rendered scenes: an endless captioned data set that needs no download.

One to three anti-aliased shapes of two sizes on one of 20 backgrounds, placed on a lattice. A scene is a few *groups*
("two red stars", "a blue square"), perhaps with a relation between two of them. Everything is a pure function of (split,
seed, index) and is drawn at any resolution. The wording is in `nar_t2i.data.captions`.

Held out of training: 4 of the 32 colour × shape pairs, and one in eight of the relation triples (object, relation,
object), whether the caption mentions the relation or not. All of it is our choice.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (222, 30, 38),
    "orange": (255, 140, 0),
    "yellow": (255, 226, 20),
    "green": (28, 158, 52),
    "cyan": (40, 210, 230),
    "blue": (32, 70, 222),
    "purple": (132, 32, 172),
    "pink": (255, 112, 186),
}
BACKGROUNDS = {
    "white": (246, 246, 246),
    "light grey": (200, 202, 204),
    "grey": (132, 134, 136),
    "dark grey": (72, 74, 76),
    "black": (18, 18, 20),
    "cream": (255, 246, 206),
    "beige": (226, 214, 188),
    "tan": (184, 158, 124),
    "brown": (92, 66, 48),
    "mint": (196, 236, 208),
    "olive": (98, 104, 66),
    "forest": (18, 62, 38),
    "teal": (0, 84, 92),
    "sky": (176, 210, 240),
    "slate": (86, 104, 124),
    "navy": (24, 30, 66),
    "indigo": (50, 34, 98),
    "lavender": (206, 200, 228),
    "plum": (92, 42, 86),
    "maroon": (78, 26, 40),
}
SIZES = {"small": 0.14, "large": 0.185}  # radius, as a share of the image's side
LATTICE = 8  # cells a side, unless a data set asks for another lattice
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT_PAIRS = frozenset({("orange", "circle"), ("cyan", "square"), ("pink", "triangle"), ("green", "star")})
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
EXTENT = 1.3  # how far the widest shape (triangle, star) reaches, in radii
RELATION_MARGIN = 0.1  # a relation holds from this distance of centres on, as a share of the image's side

Split = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Group:
    """Identical objects: "two small red stars"."""

    count: int
    color: str
    shape: str
    size: str = "small"

    @property
    def kind(self) -> tuple[str, str]:
        return self.color, self.shape


@dataclass(frozen=True)
class PlacedObject:
    """One object. x, y: centre; radius; all as shares of the image's side, y pointing down."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """groups: what is there. relation: between groups 0 and 1, or None. objects: in the order of the groups."""

    groups: tuple[Group, ...]
    relation: str | None
    background: str
    objects: tuple[PlacedObject, ...]


def relation_between(a: tuple[float, float], b: tuple[float, float]) -> str | None:
    """How the centre `a` lies to the centre `b`, along the axis where they differ most; None when they are too near."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if max(abs(dx), abs(dy)) < RELATION_MARGIN:
        return None
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


@cache
def triple_held_out(a: tuple[str, str], relation: str, b: tuple[str, str]) -> bool:
    """Whether (a, relation, b), which is the same as (b, opposite, a), is kept out of training: one triple in eight."""
    if relation in ("right of", "below"):
        a, relation, b = b, OPPOSITE[relation], a
    digest = hashlib.blake2b("|".join((*a, relation, *b)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 8 == 0


def held_out_triples(objects: tuple[PlacedObject, ...]) -> bool:
    """Whether any two of the objects stand in a relation that is held out."""
    for i, a in enumerate(objects):
        for b in objects[i + 1 :]:
            relation = relation_between((a.x, a.y), (b.x, b.y))
            if relation and triple_held_out((a.color, a.shape), relation, (b.color, b.shape)):
                return True
    return False


# ---- drawing -------------------------------------------------------------------------------------------------------


@cache
def outline(shape: str) -> np.ndarray:
    """(K, 2) corners of a polygon of radius 1 around its centre, y pointing down; the circle has none."""
    if shape == "square":
        return 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64)
    corners, inner = (3, None) if shape == "triangle" else (10, 0.5)
    angles = -np.pi / 2 + np.arange(corners) * 2 * np.pi / corners
    radii = np.full(corners, EXTENT)
    if inner:
        radii[1::2] *= inner
    points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    if shape == "triangle":
        points[:, 1] += 0.25  # the middle of its height, not its centroid, stands at the centre
    return points


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of radius 1 at the origin, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    corners = outline(shape)
    distance = np.full(x.shape, np.inf)
    sign = np.ones(x.shape)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0)):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
        above_a, below_b, left = y >= ay, y < by, ex * wy > ey * wx
        crossing = (above_a & below_b & left) | (~above_a & ~below_b & ~left)
        sign = np.where(crossing, -sign, sign)
    return sign * np.sqrt(distance)


def coverage(placed: PlacedObject, size: int) -> tuple[slice, slice, np.ndarray]:
    """Rows, columns and the share of each of these pixels that the object covers, in an image of `size` pixels a side."""
    reach = EXTENT * placed.radius * size + 1.5
    cx, cy, r = placed.x * size, placed.y * size, placed.radius * size
    x0, x1 = max(math.floor(cx - reach), 0), min(math.ceil(cx + reach), size)
    y0, y1 = max(math.floor(cy - reach), 0), min(math.ceil(cy + reach), size)
    x = (np.arange(x0, x1) + 0.5 - cx) / r
    y = (np.arange(y0, y1) + 0.5 - cy) / r
    grid_x, grid_y = np.broadcast_arrays(x[None, :], y[:, None])
    alpha = np.clip(0.5 - signed_distance(placed.shape, grid_x, grid_y) * r, 0, 1)
    return slice(y0, y1), slice(x0, x1), alpha


@lru_cache(maxsize=256)
def backdrop(background: str, size: int) -> np.ndarray:
    """(size, size, 3) float64, 0 to 255."""
    return np.tile(np.array(BACKGROUNDS[background], dtype=np.float64), (size, size, 1))


def render(scene: Scene, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    canvas = backdrop(scene.background, size).copy()
    for placed in scene.objects:
        rows, columns, alpha = coverage(placed, size)
        patch = canvas[rows, columns]
        patch += alpha[:, :, None] * (np.array(COLORS[placed.color], dtype=np.float64) - patch)
    return np.rint(canvas).astype(np.uint8)


# ---- composing -----------------------------------------------------------------------------------------------------


LAYOUTS = ((1,), (2,), (3,), (1, 1), (2, 1), (1, 2), (1, 1, 1))  # members of each group
LAYOUT_SHARES = (0.24, 0.08, 0.10, 0.32, 0.09, 0.09, 0.08)


def compose(rng: np.random.Generator, split: Split = "train", most_objects: int = 3, lattice: int = LATTICE) -> Scene:
    """Draw a scene of at most `most_objects` on a lattice of so many cells a side. "train" and "validation" hold no
    held-out pair or triple; "all" may."""
    allowed = PAIRS if split == "all" else tuple(p for p in PAIRS if p not in HELD_OUT_PAIRS)
    shares = np.array([share * (sum(members) <= most_objects) for members, share in zip(LAYOUTS, LAYOUT_SHARES)])
    layout = LAYOUTS[rng.choice(len(LAYOUTS), p=shares / shares.sum())]
    relation = RELATIONS[rng.integers(4)] if len(layout) == 2 and rng.random() < 0.7 else None
    while True:  # other kinds and sizes until they fit; the shares of layouts and relations stay as they are
        groups = _draw_groups(rng, layout, allowed)
        objects = place(rng, groups, relation, allow_held_out=split == "all", lattice=lattice)
        if objects is not None:
            return Scene(groups, relation, tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], objects)


def _draw_groups(rng: np.random.Generator, layout: tuple[int, ...], allowed: tuple[tuple[str, str], ...]) -> tuple[Group, ...]:
    kinds = [allowed[i] for i in rng.choice(len(allowed), size=len(layout), replace=False)]
    sizes = tuple(SIZES)
    return tuple(Group(count, *kind, sizes[rng.integers(len(sizes))]) for count, kind in zip(layout, kinds, strict=True))


def place(
    rng: np.random.Generator,
    groups: tuple[Group, ...],
    relation: str | None,
    allow_held_out: bool = False,
    lattice: int = LATTICE,
) -> tuple[PlacedObject, ...] | None:
    """Positions without overlap in which `relation` holds clearly, or None where some hundred draws find none.

    The widest shape of a size reaches over a square of so many cells. Each object stands in the middle of such a square,
    so that the lattice cuts an outline in the same way wherever it is.
    """
    members = [group for group in groups for _ in range(group.count)]
    owner = np.array([i for i, group in enumerate(groups) for _ in range(group.count)])
    radius = np.array([SIZES[group.size] for group in members])
    span = np.ceil(2 * EXTENT * radius * lattice).astype(int)[:, None]
    for _ in range(2):
        cells = rng.integers(0, lattice + 1 - span, size=(128, len(members), 2))
        xy = (cells + span / 2) / lattice
        good = _apart(xy, radius)
        if relation:
            good &= _related(xy, owner, relation)
        for index in np.flatnonzero(good):
            objects = tuple(
                PlacedObject(g.color, g.shape, float(x), float(y), float(r))
                for g, (x, y), r in zip(members, xy[index], radius, strict=True)
            )
            if allow_held_out or not held_out_triples(objects):
                return objects
    return None


def _apart(xy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    good = np.ones(len(xy), dtype=bool)
    for i in range(len(radius)):
        for j in range(i):
            gap = 1.15 * (radius[i] + radius[j]) + 0.03
            good &= ((xy[:, i] - xy[:, j]) ** 2).sum(-1) > gap * gap
    return good


def _related(xy: np.ndarray, owner: np.ndarray, relation: str) -> np.ndarray:
    """Every object of group 0 stands in `relation` to every one of group 1, nearer to the axis than 35 degrees."""
    axis, sign = (0, 1) if relation in ("left of", "right of") else (1, 1)
    if relation in ("right of", "below"):
        sign = -1
    good = np.ones(len(xy), dtype=bool)
    for i in np.flatnonzero(owner == 0):
        for j in np.flatnonzero(owner == 1):
            difference = sign * (xy[:, j] - xy[:, i])
            along, across = difference[:, axis], np.abs(difference[:, 1 - axis])
            good &= (along > 1.5 * RELATION_MARGIN) & (across < 0.7 * along)
    return good


def generator(split: Split, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one scene; splits never share any."""
    stream = {"train": 0, "validation": 1, "all": 2}[split]
    return np.random.Generator(np.random.Philox(key=[seed * 4 + stream, index]))
