"""The score, its intervals, and chance against brute force."""

import numpy as np
import pytest

from nar_t2i.data.scenes import OPPOSITE, Group
from nar_t2i.evaluation.detector import DetectedObject, Detection, detect, matches
from nar_t2i.evaluation.scene_accuracy import chance, derangement, detect_all, score, shuffled, verdicts, wilson
from nar_t2i.evaluation.scene_prompts import CATEGORIES, ScenePrompt, committed, take


def perfect(prompt: ScenePrompt) -> Detection:
    """What the detector finds in a perfect picture: group 0 on one side, group 1 on the other."""
    side = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1), None: (1, 0)}[prompt.relation]
    objects = []
    for number, group in enumerate(prompt.groups):
        sign = 1 if number == 0 else -1
        x, y = 0.5 + 0.3 * sign * side[0], 0.5 + 0.3 * sign * side[1]
        for member in range(group.count):  # members differ across the axis, by less than along it
            across = 0.1 * member
            dx, dy = across * abs(side[1]), across * abs(side[0])
            objects.append(DetectedObject(group.color, group.shape, x + dx, y + dy, 0.15, 0.0))
    return Detection(tuple(objects), ())


NOTHING = Detection((), ())


@pytest.mark.parametrize("which", ["seen", "held_out"])
def test_chance_is_what_brute_force_finds(which):
    prompts = take(committed(which), 60)
    pictures = [perfect(p) for p in prompts]
    assert score(pictures, prompts)["overall"] == 1
    result = chance(prompts)
    fixed = shuffled(pictures, prompts)
    for category in CATEGORIES:
        own = [i for i, p in enumerate(prompts) if p.category == category]
        pairs = [(i, j) for i in own for j in own if i != j]
        hits = [matches(pictures[i], prompts[j].groups, prompts[j].relation) for i, j in pairs]
        assert result["all_pairs"][category] == pytest.approx(np.mean(hits), abs=1e-12)
        assert result["derangement"][category] == fixed[category]
    assert result["all_pairs"]["overall"] == pytest.approx(np.mean([result["all_pairs"][c] for c in CATEGORIES]))


def test_the_opposite_form_of_a_relation_counts_as_the_same():
    red, blue = Group(1, "red", "star"), Group(2, "blue", "square")
    said = [
        ScenePrompt("", "position", (red, blue), "above"),
        ScenePrompt("", "position", (blue, red), OPPOSITE["above"]),
        ScenePrompt("", "position", (blue, red), "above"),
    ]
    assert chance(said)["all_pairs"]["position"] == pytest.approx(2 / 6)


def test_partners_are_others_of_the_same_category_and_each_is_used_once():
    prompts = committed("seen")
    partners = derangement(prompts)
    assert sorted(partners) == list(range(len(prompts)))
    assert all(i != j and prompts[i].category == prompts[j].category for i, j in enumerate(partners))
    assert partners == derangement(prompts)


def test_a_prompt_alone_in_its_category_has_no_partner():
    prompts = take(committed("seen"), 1)
    assert derangement(prompts) == [None] * len(CATEGORIES)
    assert shuffled([NOTHING] * len(prompts), prompts)["overall"] is None
    assert chance(prompts)["all_pairs"]["overall"] is None


def test_overall_is_the_mean_of_the_categories_and_counts_are_given():
    prompts = [p for p in take(committed("seen"), 8) if p.category in ("colors", "counting")][:12]
    pictures = [perfect(p) if p.category == "colors" or i % 4 == 0 else NOTHING for i, p in enumerate(prompts)]
    result = score(pictures, prompts)
    assert result["count"] == {"counting": 8, "colors": 4}
    assert result["passed"] == {"counting": 2, "colors": 4}
    assert result["overall"] == pytest.approx((2 / 8 + 1) / 2)
    assert set(result["interval"]) == {"counting", "colors", "overall"}
    apart = 4 / (1 / 8 + 1 / 4)  # the variance of (a + b) / 2, of 8 and of 4 pictures, is that of as many in one
    assert result["interval"]["overall"] == pytest.approx(wilson(0.625 * apart, apart))
    for key, (low, high) in result["interval"].items():
        assert 0 <= low <= result[key] <= high + 1e-12 <= 1 + 1e-9


def test_wilson_s_interval_agrees_with_published_values():
    # Newcombe (1998), table I, method 3.
    published = ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718))
    for passed, count, low, high in published:
        assert wilson(passed, count) == pytest.approx([low, high], abs=6e-5)


def test_pictures_and_what_was_found_in_them_give_the_same_score_on_any_number_of_workers():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    images[:3] = 40
    prompts = take(committed("seen"), 1)
    alone = detect_all(images)
    assert alone == detect_all(images, workers=2) == [detect(image) for image in images]
    assert score(images, prompts) == score(iter(images), prompts) == score(alone, prompts)
    assert verdicts(images, prompts) == [False] * 6


def test_one_picture_a_prompt():
    with pytest.raises(ValueError, match="2 pictures for 1 prompts"):
        score([NOTHING, NOTHING], take(committed("seen"), 1)[:1])
