"""The prevailing colour of a picture, for models that draw no clear shapes yet."""

import numpy as np

from nar_t2i.data.scenes import BACKGROUNDS, COLORS, Group, PlacedObject, Scene, render
from nar_t2i.evaluation.detector import prevailing_color
from nar_t2i.evaluation.scene_accuracy import color_accuracy
from nar_t2i.evaluation.scene_prompts import ScenePrompt


def picture(color: str, shape: str = "star", background: tuple[str, str] = ("grey", "plain")) -> np.ndarray:
    placed = PlacedObject(color, shape, 0.5, 0.5, 0.18)
    return render(Scene((Group(1, color, shape),), None, background, (placed,)), 64)


def test_every_colour_on_every_background_is_told_even_when_half_of_the_shape_is_missing() -> None:
    for color in COLORS:
        for background in BACKGROUNDS:
            image = picture(color, background=background)
            assert prevailing_color(image) == color
            image[:, :32] = image[:, :1]
            assert prevailing_color(image) == color


def test_an_empty_picture_has_no_colour() -> None:
    assert prevailing_color(np.full((64, 64, 3), 130, np.uint8)) is None


def test_accuracy_and_chance() -> None:
    def prompt(color: str) -> ScenePrompt:
        return ScenePrompt(color, "colors", (Group(1, color, "star"),))

    asked = ["red", "red", "blue", "green"]
    two = ScenePrompt("two", "two_objects", (Group(1, "red", "star"), Group(1, "blue", "star")))
    images = [picture(color) for color in ("red", "blue", "blue", "pink", "red")]
    scores = color_accuracy(images, [*map(prompt, asked), two])
    assert scores == {"accuracy": 0.5, "chance": 0.5, "count": 4}
