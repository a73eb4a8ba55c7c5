"""What is in this picture? An analytic detector for rendered scenes; no learning, no look at the scene.

The picture is explained from front to back, and whatever is left unexplained speaks against it:

1. the background: one line a channel over the rows (plain, or a vertical gradient);
2. the foreground: pixels far from the background; its thick parts are *seeds*, one an object;
3. each seed's colour must be one of the palette's; the share of that colour in each pixel gives area and centroid,
   from which the radius and centre of each of the four shapes follow, refined by a few Gauss-Newton steps;
4. the shape that leaves the least error is accepted if that error is small and clearly below the next shape's;
5. background and objects are drawn again; connected pixels that still differ are *flaws*: an object too many, a notch,
   a hole, a lump, a smear. A picture with a flaw shows nothing that counts.

Errors are averaged over 3 × 3 pixels with their sign before they are judged, so that a soft edge (a decoder's blur,
ringing, an edge half a pixel off) cancels while a missing or an added piece remains. All of it is our choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from nar_t2i.data.scenes import COLORS, SHAPES, Group, outline, relation_between, signed_distance
from nar_t2i.evaluation.regions import erode, label, mean3x3

# Distances between colours are Euclidean, in levels of 0 to 255 a channel. The smallest one between an object's colour
# and a background is 88 (green on olive), between two objects' colours 88 (orange and yellow).
MIN_SIDE = 48  # smaller pictures hold too few pixels to tell a small circle from a square
WORK_SIDE = 96  # larger pictures are reduced to this side, so that every threshold in pixels means the same
FOREGROUND = 38.0  # levels from the background: above a decoder's colour error, below half of the smallest contrast
SEED_EROSION = 0.045  # share of the side that is taken off all round: more than a soft edge, less than a star's body
MIN_SEED = 4  # pixels that a seed holds at least; smaller ones are left to the check for flaws
SEED_COLOR_SHARE = 0.15  # of a seed's pixels, from which on another colour of the palette is a seed of its own
COLOR_TOLERANCE = 60.0  # levels between an object's median colour and the palette's
COLOR_MARGIN = 20.0  # levels by which the next colour of the palette is farther away
RADIUS = (0.115, 0.29)  # share of the side; scenes are drawn with 0.14 to 0.23
MAX_FIT_ERROR = 0.16  # smoothed error over the shape's area
SHAPE_MARGIN = 0.02  # by which the next shape's error is larger
FLAW_LEVELS = 44.0  # smoothed error of a pixel that counts as wrong, away from objects
FLAW_SHARE = 0.36  # the same on and around an object, as a share of its contrast with the background
FLAW_AREA = 0.002  # share of the picture that a connected flaw covers at least (9 pixels at 64 × 64)

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class DetectedObject:
    """One object. x, y, radius: shares of the image's side, y pointing down. error: 0 is a perfect outline."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    error: float


@dataclass(frozen=True)
class Detection:
    """What a picture shows. flaws: in words, what could not be explained; empty for a clean scene."""

    objects: tuple[DetectedObject, ...]
    flaws: tuple[str, ...]


def detect(image: np.ndarray) -> Detection:
    """Find the objects in `image`, (S, S, 3) uint8 with S ≥ 48."""
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a square uint8 image (S, S, 3), got {image.dtype} {image.shape}")
    if image.shape[0] < MIN_SIDE:
        raise ValueError(f"the detector needs at least {MIN_SIDE} pixels a side, got {image.shape[0]}")
    pixels = _working_copy(image)
    background = fit_background(pixels)
    difference = pixels - background[:, None, :]
    foreground = (difference**2).sum(-1) > FOREGROUND**2
    fits, flaws = [], []
    for region, seed in _regions(pixels, foreground):
        fit = _fit_object(pixels, background, region, seed)
        if isinstance(fit, str):
            flaws.append(fit)
        else:
            fits.append(fit)
    flaws += _unexplained(difference, background, fits)
    return Detection(tuple(fit.found for fit in fits), tuple(flaws))


def matches(detection: Detection, groups: Sequence[Group], relation: str | None = None) -> bool:
    """Whether the picture shows exactly these groups, without flaw, and every object of group 0 in `relation` to every
    object of group 1. Sizes and background are not looked at."""
    wanted: Counter = Counter()
    for group in groups:
        wanted[group.kind] += group.count
    if detection.flaws or Counter((o.color, o.shape) for o in detection.objects) != wanted:
        return False
    if relation is None:
        return True
    first, second = ([o for o in detection.objects if (o.color, o.shape) == g.kind] for g in groups[:2])
    return all(relation_between((a.x, a.y), (b.x, b.y)) == relation for a in first for b in second)


# ---- background and regions ----------------------------------------------------------------------------------------


def _working_copy(image: np.ndarray) -> np.ndarray:
    """float32, at most WORK_SIDE pixels a side (by area average)."""
    if image.shape[0] > WORK_SIDE:
        image = np.asarray(Image.fromarray(image).resize((WORK_SIDE, WORK_SIDE), Image.Resampling.BOX))
    return image.astype(np.float32)


def fit_background(pixels: np.ndarray) -> np.ndarray:
    """(S, S, 3) → (S, 3), the colour of each row: a line a channel through the pixels that are near it, from the
    border's median on."""
    side = len(pixels)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    rows = np.broadcast_to(np.median(border, axis=0), (side, 3))
    y = np.linspace(-1, 1, side, dtype=np.float32)
    for tolerance in (FOREGROUND, 0.75 * FOREGROUND):
        near = ((pixels - rows[:, None, :]) ** 2).sum(-1) < tolerance**2
        weight = near.sum(1).astype(np.float32)
        total = max(float(weight.sum()), 1.0)
        sums = np.einsum("yx,yxc->yc", near.astype(np.float32), pixels)
        middle = (weight @ y) / total
        mean = sums.sum(0) / total
        slope = ((y - middle) @ sums) / max(float(weight @ (y - middle) ** 2), 1.0)
        rows = (mean + (y - middle)[:, None] * slope).clip(0, 255)
    return rows


def _regions(pixels: np.ndarray, foreground: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(region, seed) masks, one pair an object. A region is the connected foreground around a seed; where objects touch
    each other by their tips, each pixel goes to the nearest seed."""
    regions, _ = label(foreground)
    seeds, count = label(erode(foreground, round(SEED_EROSION * len(pixels))))
    members: dict[int, list[np.ndarray]] = {}
    for number in range(1, count + 1):
        for seed in _by_color(pixels, seeds == number):
            if seed.sum() >= MIN_SEED:
                members.setdefault(int(regions[seed][0]), []).append(seed)
    pairs = []
    for number, group in members.items():
        region = regions == number
        parts = [region] if len(group) == 1 else _divide(region, group)
        pairs += zip(parts, group, strict=True)
    return pairs


def _by_color(pixels: np.ndarray, seed: np.ndarray) -> list[np.ndarray]:
    """The seed, or its parts where two objects of different colours touch."""
    nearest = ((pixels[seed][:, None] - PALETTE) ** 2).sum(-1).argmin(1)
    shares = np.bincount(nearest, minlength=len(PALETTE)) / len(nearest)
    colors = np.flatnonzero(shares >= SEED_COLOR_SHARE)
    if len(colors) < 2:
        return [seed]
    parts = []
    for color in colors:
        part = np.zeros_like(seed)
        part[seed] = nearest == color
        parts.append(part)
    return parts


def _divide(region: np.ndarray, seeds: list[np.ndarray]) -> list[np.ndarray]:
    """Divide a region among its seeds: each pixel to the nearest."""
    points = np.argwhere(region).astype(np.float32)
    distance = []
    for seed in seeds:
        inside = np.argwhere(seed).astype(np.float32)
        distance.append(((points[:, None] - inside[None]) ** 2).sum(-1).min(1))
    owner = np.argmin(distance, axis=0)
    parts = []
    for index in range(len(seeds)):
        part = np.zeros_like(region)
        part[tuple(points[owner == index].astype(int).T)] = True
        parts.append(part)
    return parts


# ---- shapes --------------------------------------------------------------------------------------------------------

REACH = 1.6  # the tables below end here, in radii
TABLE = 641  # entries along each axis


@cache
def _table(shape: str) -> np.ndarray:
    """(TABLE, TABLE, 3) float32: signed distance of a shape of radius 1, and its derivatives by x and y."""
    axis = np.linspace(-REACH, REACH, TABLE)
    distance = signed_distance(shape, *np.meshgrid(axis, axis))
    by_y, by_x = np.gradient(distance, axis, axis)
    return np.stack([distance, by_x, by_y], axis=-1).astype(np.float32)


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centroid lies below its centre."""
    if shape == "circle":
        return np.pi, 0.0
    x, y = outline(shape).T
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    cross = x * y2 - x2 * y
    return float(cross.sum() / 2), float(((y + y2) * cross).sum() / (3 * cross.sum()))


@dataclass
class _Window:
    """A part of the picture. share: (h, w), how much of each pixel is the object's colour; top, left: its corner."""

    share: np.ndarray
    top: int
    left: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.share.shape[0])

    @property
    def part(self) -> tuple[slice, slice]:
        """Rows and columns of the picture."""
        return self.rows, slice(self.left, self.left + self.share.shape[1])

    def look_up(self, shape: str, center: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(h, w, 3) table entries, and x and y in radii, for `center` = (x, y, radius) in pixels."""
        height, width = self.share.shape
        x = (self.left + 0.5 + np.arange(width) - center[0]) / center[2]
        y = (self.top + 0.5 + np.arange(height) - center[1]) / center[2]
        scale, last = (TABLE - 1) / (2 * REACH), TABLE - 1
        column = np.rint((x + REACH) * scale).clip(0, last).astype(np.intp)
        row = np.rint((y + REACH) * scale).clip(0, last).astype(np.intp)
        return _table(shape)[row[:, None], column[None, :]], x, y

    def template(self, shape: str, center: np.ndarray) -> np.ndarray:
        """(h, w) share of each pixel that the shape covers."""
        return np.clip(0.5 - self.look_up(shape, center)[0][..., 0] * center[2], 0, 1)

    def error(self, shape: str, center: np.ndarray) -> float:
        """Smoothed error as a share of the shape's area."""
        template = self.template(shape, center)
        return float(np.abs(mean3x3(self.share - template)).sum() / max(float(template.sum()), 1.0))

    def start(self, shape: str) -> np.ndarray:
        """(x, y, radius) from area and centroid."""
        total = float(self.share.sum())
        x = float(self.share.sum(0) @ np.arange(self.share.shape[1])) / total + 0.5 + self.left
        y = float(self.share.sum(1) @ np.arange(self.share.shape[0])) / total + 0.5 + self.top
        area, below = _moments(shape)
        radius = (total / area) ** 0.5
        return np.array([x, y - below * radius, radius])

    def refine(self, shape: str, center: np.ndarray, steps: int = 3) -> np.ndarray:
        """Gauss-Newton on the squared error of the shares; steps are bounded to a pixel."""
        for _ in range(steps):
            entries, x, y = self.look_up(shape, center)
            distance = entries[..., 0] * center[2]
            edge = np.abs(distance) < 1
            error = (self.share - np.clip(0.5 - distance, 0, 1))[edge]
            by_x, by_y = entries[..., 1], entries[..., 2]
            by_radius = by_x * x[None, :] + by_y * y[:, None] - entries[..., 0]
            jacobian = np.stack([by_x[edge], by_y[edge], by_radius[edge]])
            normal = jacobian @ jacobian.T + 1e-3 * np.eye(3)
            center = center + np.linalg.solve(normal, jacobian @ error).clip(-1, 1)
        return center


@dataclass
class _Fit:
    """An object that was found, what it covers in the working copy, and its measured colour."""

    found: DetectedObject
    window: _Window
    template: np.ndarray
    color: np.ndarray


def _fit_object(pixels: np.ndarray, background: np.ndarray, region: np.ndarray, seed: np.ndarray) -> _Fit | str:
    """The object around a seed, or in words why it is none."""
    side = len(pixels)
    color = np.median(pixels[seed], axis=0)
    distance = np.sqrt(((PALETTE - color) ** 2).sum(-1))
    nearest, second = np.argsort(distance)[:2]
    name = COLOR_NAMES[nearest]
    if distance[nearest] > COLOR_TOLERANCE or distance[second] - distance[nearest] < COLOR_MARGIN:
        return f"an object of the colour {tuple(int(c) for c in color)}, which is no colour of the palette"
    window = _shares(pixels, background, region, color)
    shape, center, error, margin = _best_shape(window)
    if not RADIUS[0] <= center[2] / side <= RADIUS[1]:
        return f"a {name} object of the radius {center[2] / side:.2f}"
    if error > MAX_FIT_ERROR or margin < SHAPE_MARGIN:
        return f"a {name} object that is no clear {shape} (error {error:.2f}, next shape {margin:+.2f})"
    x, y, radius = (float(v) / side for v in center)
    return _Fit(DetectedObject(name, shape, x, y, radius, error), window, window.template(shape, center), color)


def _shares(pixels: np.ndarray, background: np.ndarray, region: np.ndarray, color: np.ndarray) -> _Window:
    """How much of each pixel is the object's colour, in a window around the region with a rim for soft edges."""
    rim = 3
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, bottom = max(rows[0] - rim, 0), rows[-1] + rim + 1
    left, right = max(columns[0] - rim, 0), columns[-1] + rim + 1
    base = background[top:bottom, None, :]
    contrast = color - base
    share = ((pixels[top:bottom, left:right] - base) * contrast).sum(-1) / (contrast**2).sum(-1)
    share *= ~erode(~region[top:bottom, left:right], 1)
    return _Window(share.clip(0, 1), int(top), int(left))


def _best_shape(window: _Window) -> tuple[str, np.ndarray, float, float]:
    """The shape with the least error, its (x, y, radius) in pixels, that error, and how much larger the next one is.
    Only the two shapes that fit best from the start are refined."""
    starts = {shape: window.start(shape) for shape in SHAPES}
    errors = {shape: window.error(shape, center) for shape, center in starts.items()}
    for shape in sorted(errors, key=errors.__getitem__)[:2]:
        center = window.refine(shape, starts[shape])
        error = window.error(shape, center)
        if error < errors[shape]:
            starts[shape], errors[shape] = center, error
    best, second = sorted(errors, key=errors.__getitem__)[:2]
    return best, starts[best], errors[best], errors[second] - errors[best]


# ---- what is left --------------------------------------------------------------------------------------------------


def _unexplained(difference: np.ndarray, background: np.ndarray, fits: list[_Fit]) -> list[str]:
    """Flaws: connected pixels that background and objects do not explain. difference: pixels minus background.

    On and around an object, an error along the line from background to object may be an edge that lies a little off,
    and is measured against that contrast; an error across the line is another colour, and is measured as anywhere else.
    """
    left_over = difference.copy()
    for fit in fits:
        left_over[fit.window.part] -= fit.template[..., None] * (fit.color - background[fit.window.rows, None, :])
    left_over = mean3x3(left_over)
    wrong = (left_over**2).sum(-1) > FLAW_LEVELS**2
    for fit in fits:
        contrast = fit.color - background[fit.window.rows, None, :]
        length = np.sqrt((contrast**2).sum(-1))
        error = left_over[fit.window.part]
        along = (error * contrast).sum(-1) / length
        across = (error**2).sum(-1) - along**2
        own = (np.abs(along) > np.maximum(FLAW_SHARE * length, FLAW_LEVELS)) | (across > FLAW_LEVELS**2)
        near = ~erode(fit.template < 0.5, 1)
        wrong[fit.window.part] = np.where(near, own, wrong[fit.window.part])
    return _describe_flaws(wrong)


def _describe_flaws(wrong: np.ndarray) -> list[str]:
    side = len(wrong)
    labels, count = label(wrong)
    flaws = []
    for number in range(1, count + 1):
        area = int((labels == number).sum())
        if area >= FLAW_AREA * side * side:
            y, x = np.argwhere(labels == number).mean(0) / side
            flaws.append(f"{area} pixels around ({x:.2f}, {y:.2f}) that nothing explains")
    return flaws
