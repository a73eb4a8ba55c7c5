"""The detector against ground truth and against all that a person would call wrong, by category, at 64 and 256 px.

The scenes are perfect pictures of the committed prompts, so that each category is tested on what it will be asked.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from nar_t2i.data.scenes import BACKGROUNDS, SIZES, Group, PlacedObject, Scene, compose, generator, place, render
from nar_t2i.evaluation import detector
from nar_t2i.evaluation.detector import Detection, detect, matches
from nar_t2i.evaluation.scene_prompts import CATEGORIES, ScenePrompt, committed, take
from tests.evaluation import spoil

PROMPTS = {"seen": 100, "held_out": 70}  # of each category: 1,020 pictures
ENOUGH, FEW = 0.99, 0.01


def perfect_scene(prompt: ScenePrompt, rng: np.random.Generator) -> Scene:
    """A scene that shows the prompt, of objects of any size on any background."""
    sizes = tuple(SIZES)
    objects = None
    while objects is None:
        groups = tuple(replace(group, size=sizes[rng.integers(len(sizes))]) for group in prompt.groups)
        objects = place(rng, groups, prompt.relation, allow_held_out=True)
    return Scene(groups, prompt.relation, tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], objects)


@cache
def scenes(category: str) -> list[Scene]:
    prompts = [p for which, n in PROMPTS.items() for p in take(committed(which), n) if p.category == category]
    assert len(prompts) == sum(PROMPTS.values())
    rng = np.random.default_rng(CATEGORIES.index(category))
    return [perfect_scene(prompt, rng) for prompt in prompts]


@cache
def truth(category: str, size: int) -> list[Detection]:
    return [detect(render(scene, size)) for scene in scenes(category)]


def share_accepted(images, expected: list[Scene]) -> float:
    return float(np.mean([matches(detect(i), s.groups, s.relation) for i, s in zip(images, expected, strict=True)]))


def some(category: str, size: int) -> list[Scene]:
    """All scenes at 64 pixels, every fourth at 256, where drawing takes long."""
    return scenes(category) if size == 64 else scenes(category)[::4]


sizes_and_categories = pytest.mark.parametrize(
    "size, category", [(size, category) for size in (64, 256) for category in CATEGORIES]
)


@sizes_and_categories
def test_perfect_pictures_pass(size, category):
    passed = [matches(d, s.groups, s.relation) for d, s in zip(truth(category, size), scenes(category), strict=True)]
    assert np.mean(passed) >= ENOUGH


@pytest.mark.parametrize("size, count", [(48, 100), (64, 300), (100, 100), (256, 100)])
def test_scenes_as_they_are_drawn_for_training_pass(size, count):
    drawn = [compose(generator("all", 3, index), "all") for index in range(count)]
    assert share_accepted((render(scene, size) for scene in drawn), drawn) >= ENOUGH


@sizes_and_categories
def test_a_caption_with_one_thing_changed_fails(size, category):
    rng = np.random.default_rng(1)
    pairs = list(zip(truth(category, size), scenes(category), strict=True))
    for kind in ("color", "shape", "count") + (("relation",) if category == "position" else ()):
        assert np.mean([matches(found, *spoil.changed(scene, kind, rng)) for found, scene in pairs]) <= FEW, kind


@sizes_and_categories
def test_a_broken_outline_fails(size, category):
    rng = np.random.default_rng(2)
    kinds = spoil.BREAKS if size == 64 else spoil.BREAKS[::2]
    cases = [(scene, kind) for n, kind in enumerate(kinds) for scene in some(category, size)[n % 2 :: 2]]
    images = (spoil.broken(scene, size, kind, rng) for scene, kind in cases)
    assert share_accepted(images, [scene for scene, _ in cases]) <= FEW


@sizes_and_categories
def test_an_added_object_fails(size, category):
    rng = np.random.default_rng(3)
    added = [(spoil.with_object_added(scene, rng), scene) for scene in some(category, size)]
    added = [(more, scene) for more, scene in added if more is not None]
    assert len(added) >= 0.5 * len(some(category, size))
    assert share_accepted((render(more, size) for more, _ in added), [scene for _, scene in added]) <= FEW


@pytest.mark.parametrize("size, step", [(64, 4), (256, 34)])
def test_mild_softness_is_forgiven_and_hides_no_break(size, step):
    rng = np.random.default_rng(4)
    chosen = [scene for category in CATEGORIES for scene in scenes(category)[::step]]
    assert share_accepted((spoil.softened(render(scene, size), rng) for scene in chosen), chosen) >= 0.97
    kinds = [spoil.BREAKS[i % len(spoil.BREAKS)] for i in range(len(chosen))]
    images = [spoil.softened(spoil.broken(s, size, k, rng), rng) for s, k in zip(chosen, kinds, strict=True)]
    assert share_accepted(images, chosen) <= FEW


def test_without_its_thresholds_the_detector_accepts_broken_outlines(monkeypatch):
    """The tests above can fail."""
    monkeypatch.setattr(detector, "MAX_FIT_ERROR", np.inf)
    monkeypatch.setattr(detector, "SHAPE_MARGIN", 0.0)
    monkeypatch.setattr(detector, "FLAW_AREA", 2.0)
    rng = np.random.default_rng(5)
    chosen = scenes("single_object")[:60]
    for kind in ("wedge", "bite", "hole", "lump"):
        images = (spoil.broken(scene, 64, kind, rng) for scene in chosen)
        assert share_accepted(images, chosen) > 10 * FEW, kind


def test_where_and_how_large_objects_are():
    for size in (64, 256):
        for scene, found in zip(scenes("position"), truth("position", size), strict=True):
            assert len(found.objects) == len(scene.objects)
            for placed in scene.objects:
                near = min(found.objects, key=lambda o: np.hypot(o.x - placed.x, o.y - placed.y))
                assert (near.color, near.shape) == (placed.color, placed.shape)
                offsets = (near.x - placed.x, near.y - placed.y, near.radius - placed.radius)
                assert np.abs(offsets).max() < 0.5 / 64


def test_empty_and_featureless_pictures_show_nothing():
    group = (Group(1, "red", "circle"),)
    assert detect(np.full((64, 64, 3), 200, dtype=np.uint8)) == Detection((), ())
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image in (np.full((64, 64, 3), (222, 30, 38), dtype=np.uint8), noise):
        assert not matches(detect(image), group)


def test_a_relation_holds_between_every_member_of_both_groups():
    groups = (Group(2, "red", "star"), Group(1, "blue", "square"))
    objects = (
        PlacedObject("red", "star", 0.25, 0.25, 0.15),
        PlacedObject("red", "star", 0.75, 0.25, 0.15),
        PlacedObject("blue", "square", 0.5, 0.75, 0.15),
    )
    image = render(Scene(groups, None, "white", objects), 64)
    found = detect(image)
    assert matches(found, groups) and matches(found, groups, "above")
    assert matches(found, groups[::-1], "below") and not matches(found, groups, "left of")
    moved = replace(objects[1], x=0.8, y=0.77)  # one of the two stars is no longer above the square
    image = render(Scene(groups, None, "white", (objects[0], moved, replace(objects[2], x=0.4))), 64)
    assert matches(detect(image), groups) and not matches(detect(image), groups, "above")


@pytest.mark.parametrize(
    "image", [np.zeros((64, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((32, 32, 3), np.uint8)]
)
def test_unfit_input_is_refused(image):
    with pytest.raises(ValueError):
        detect(image)
