import numpy as np
import pytest

from nar_t2i.evaluation.regions import erode, label, mean3x3


def flood_fill(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The plain way, pixel by pixel."""
    labels, count = np.zeros(mask.shape, dtype=int), 0
    for start in zip(*np.nonzero(mask)):
        if labels[start]:
            continue
        count += 1
        stack = [start]
        while stack:
            y, x = stack.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not labels[y, x]:
                labels[y, x] = count
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return labels, count


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.6, 0.8, 1.0])
def test_labels_agree_with_a_flood_fill(share):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((17, 23)) < share
        labels, count = label(mask)
        expected, expected_count = flood_fill(mask)
        assert count == expected_count
        pairs = set(zip(labels.ravel().tolist(), expected.ravel().tolist()))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_erosion_takes_a_rim_but_not_at_the_picture_s_border():
    mask = np.zeros((9, 9), dtype=bool)
    mask[0:5, 2:8] = True
    expected = np.zeros_like(mask)
    expected[0:4, 3:7] = True
    assert (erode(mask, 1) == expected).all()
    assert mask[0:5, 2:8].all(), "the argument stays as it was"


def test_mean_of_nine_pixels():
    values = np.zeros((5, 5))
    values[2, 2] = 9
    assert (mean3x3(values)[1:4, 1:4] == 1).all() and mean3x3(values).sum() == 9
