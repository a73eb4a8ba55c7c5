import math

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.schedules import MASK_SCHEDULES, Guidance, mask_ratio, masked_counts, pass_progress


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
def test_ratio_falls_from_one_to_zero(schedule: str) -> None:
    ratios = mask_ratio(schedule, torch.linspace(0, 1, 101))
    assert ratios[0] == pytest.approx(1, abs=1e-6) and ratios[-1] == pytest.approx(0, abs=1e-6)
    assert (ratios.diff() <= 0).all()


@pytest.mark.parametrize("schedule", MASK_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4, 16, 64, 100])
def test_counts_fall_strictly_to_zero(schedule: str, steps: int) -> None:
    unknown = torch.tensor([64, 10, 1, 0])
    left = unknown
    for counts in masked_counts(schedule, steps, unknown):
        assert ((counts < left) | (left == 0)).all()
        left = counts
    assert (left == 0).all()


def test_guidance_ramps_and_interval() -> None:
    assert Guidance(1.0).at(0.3) == 1
    assert Guidance(5.0).at(0.0) == 5
    assert Guidance(5.0, ramp="linear").at(0.5) == 3
    assert Guidance(5.0, ramp="cosine").at(1.0) == 5
    assert [Guidance(5.0, ramp="cosine").at(part) for part in (0, 0.25, 0.5)] == pytest.approx([1, 1 + 4 * 0.1464466, 3])
    assert Guidance(5.0, start=0.25, stop=0.75).at(0.1) == 1
    assert Guidance(5.0, start=0.25, stop=0.75).at(0.5) == 5


def test_the_only_pass_has_all_of_the_guidance() -> None:
    assert pass_progress(0, 1) is None and [pass_progress(step, 3) for step in range(3)] == [0, 0.5, 1]
    for how in ({}, {"ramp": "linear"}, {"ramp": "cosine"}, {"start": 0.5}, {"stop": 0.5}):
        assert Guidance(5.0, **how).at(pass_progress(0, 1)) == 5


@pytest.mark.parametrize("wrong", [
    {"scale": math.nan}, {"start": 50, "stop": 100}, {"start": 0.8, "stop": 0.2}, {"start": -0.1}, {"ramp": "quadratic"},
])  # fmt: skip
def test_guidance_that_cannot_be_is_an_error(wrong: dict) -> None:
    with pytest.raises(UserError, match="guidance"):
        Guidance(**wrong)
