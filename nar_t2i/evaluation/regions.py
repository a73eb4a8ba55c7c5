"""Small image operations on masks, in numpy: connected regions, erosion, a 3 × 3 mean."""

from __future__ import annotations

import numpy as np


def label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the connected regions (4 neighbours) of a boolean (H, W) mask: int32 (H, W) with 0 outside, and how many.

    Union-find over the runs of each row, which are few, instead of over pixels.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    row, start = np.nonzero(change == 1)
    end = np.nonzero(change == -1)[1]
    parent = _join_runs(row.tolist(), start.tolist(), end.tolist())
    roots, number = np.unique(parent, return_inverse=True)
    labels = np.zeros((height, width), dtype=np.int32)
    flat = np.repeat(number.reshape(-1) + 1, end - start) if len(row) else np.zeros(0, dtype=np.int32)
    labels[mask] = flat
    return labels, len(roots)


def _join_runs(row: list[int], start: list[int], end: list[int]) -> np.ndarray:
    """The representative of each run; runs come in row order, from left to right. Ends are exclusive."""
    parent = list(range(len(row)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    upper = 0  # the first run that may touch the current one from the row above
    for i in range(len(row)):
        while upper < i and (row[upper] < row[i] - 1 or (row[upper] == row[i] - 1 and end[upper] <= start[i])):
            upper += 1
        j = upper
        while j < i and row[j] == row[i] - 1 and start[j] < end[i]:
            if end[j] > start[i]:
                parent[root(i)] = root(j)
            j += 1
    return np.array([root(i) for i in range(len(row))], dtype=np.int64)


def erode(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Take `pixels` off a boolean (H, W) mask from all eight sides. Outside the picture counts as inside the mask."""
    for _ in range(pixels):
        mask = mask.copy()
        source = mask.copy()
        mask[1:] &= source[:-1]
        mask[:-1] &= source[1:]
        source = mask.copy()
        mask[:, 1:] &= source[:, :-1]
        mask[:, :-1] &= source[:, 1:]
    return mask


def mean3x3(values: np.ndarray) -> np.ndarray:
    """Mean over 3 × 3 pixels of (H, W) or (H, W, C); outside the picture counts as zero."""
    rows = values.copy()
    rows[1:] += values[:-1]
    rows[:-1] += values[1:]
    total = rows.copy()
    total[:, 1:] += rows[:, :-1]
    total[:, :-1] += rows[:, 1:]
    return total / 9
