"""A small grammar that says what a rendered scene shows, in varied words, and the scenes as a data source.

One caption in eight, chosen by a hash of its text, is *reserved*: training never sees that sentence, so that evaluation
prompts are sentences that no model has read.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import islice, zip_longest

import numpy as np

from nar_t2i.data.scenes import LATTICE, Group, Scene, Split, compose, generator, render
from nar_t2i.data.source import Sample, Source
from nar_t2i.errors import UserError
from nar_t2i.parts import part

OPENINGS = ("", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "there {verb} ", "this shows ")
ONE = ("a", "a", "a", "one", "a single")
MANY = {2: ("two", "two", "2"), 3: ("three", "three", "3")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
BACKGROUND_WORDS = ("on {} {} background", "against {} {} background", "with {} {} background")
ATTRIBUTE_WORDS = ("{shape} that {verb} {color}", "{color} colored {shape}", "{shape} colored {color}")
DETAILED = 0.5  # the share of captions that say where every object is
PLACES = {
    (0, 0): "in the top left corner",
    (1, 0): "at the top",
    (2, 0): "in the top right corner",
    (0, 1): "on the left side",
    (1, 1): "in the middle",
    (2, 1): "on the right side",
    (0, 2): "in the bottom left corner",
    (1, 2): "at the bottom",
    (2, 2): "in the bottom right corner",
}


def reserved(caption: str) -> bool:
    """Whether the sentence is kept out of training: one in eight, by its hash, letter case and spaces aside."""
    text = " ".join(caption.lower().split())
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % 8 == 0


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def noun_phrase(group: Group, rng: np.random.Generator, say_size: bool = False, attribute: bool = False) -> str:
    """ "two small red stars", or with `attribute` "two small stars that are red"."""
    number = _pick(rng, ONE if group.count == 1 else MANY[group.count])
    shape = group.shape + ("s" if group.count > 1 else "")
    words = ATTRIBUTE_WORDS if attribute else ("{color} {shape}",)
    phrase = _pick(rng, words).format(color=group.color, shape=shape, verb="is" if group.count == 1 else "are")
    size = f"{group.size} " if say_size else ""
    if number == "a" and (size or phrase)[0] in "aeiou":
        number = "an"
    return f"{number} {size}{phrase}"


def sentence(
    groups: tuple[Group, ...],
    relation: str | None,
    rng: np.random.Generator,
    background: str = "",
    places: tuple[str, ...] = (),
    say_size: bool = False,
    attribute: bool = False,
) -> str:
    """One wording of a scene. `background` is said where it is given, and so are `places`, one a group ("" = unsaid)."""
    phrases = [noun_phrase(group, rng, say_size, attribute) for group in groups]
    phrases = [f"{phrase} {place}" if place else phrase for phrase, place in zip_longest(phrases, places)]
    if relation:
        comma = "," if places and places[0] else ""
        subject = f"{phrases[0]}{comma} {_pick(rng, RELATION_WORDS[relation])} {phrases[1]}"
    else:
        order = rng.permutation(len(phrases))
        subject = _joined([phrases[i] for i in order])
    opening = _pick(rng, OPENINGS).format(verb="is" if groups[0].count == 1 else "are")
    tail = ""
    if background:
        article = "an" if background[0] in "aeiou" else "a"
        tail = " " + _pick(rng, BACKGROUND_WORDS).format(article, background)
    return opening + subject + tail


def _joined(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(p for p in (", ".join(phrases[:-1]), phrases[-1]) if p)


def places_of(scene: Scene) -> tuple[str, ...]:
    """Where the objects of each group are, in nine places: "in the middle and at the bottom"."""
    words = iter(PLACES[tuple(int(np.digitize(v, (0.39, 0.61))) for v in (o.x, o.y))] for o in scene.objects)
    return tuple(_joined(sorted(islice(words, group.count))) for group in scene.groups)


def describe_scene(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene that training may see. Half of them are *detailed*: they place all objects.

    Terse captions alone leave so much open that words of place, which matter to few slots of few images, are hardly
    learned; detailed ones teach them in minutes (for captions of photographs: Betker et al. 2023, "Improving image
    generation with better captions").
    """
    while True:
        detailed = rng.random() < DETAILED
        relation = scene.relation if rng.random() < (0.4 if detailed else 0.9) else None
        alone, crowded = len(scene.objects) == 1, detailed and (relation or len(scene.objects) == 3)
        caption = sentence(
            scene.groups,
            relation,
            rng,
            background=scene.background if rng.random() < 0.3 and not crowded else "",
            places=places_of(scene) if detailed or (alone and rng.random() < 0.2) else (),
            say_size=rng.random() < 0.25 and not crowded,
            attribute=rng.random() < 0.2 and not crowded,
        )
        if not reserved(caption):
            return caption


@part
class RenderedScenes(Source):
    """`count` scenes, drawn when they are read.

    split: "train", "validation" (the same distribution, other scenes) or "all" (held-out combinations too).
    image_size: pixels a side. captions: wordings of each scene. most_objects: 1 to 3 a scene.
    lattice: cells a side (see `nar_t2i.data.scenes.place`), at least 8.
    """

    def __init__(
        self,
        split: Split = "train",
        count: int = 100_000,
        seed: int = 0,
        image_size: int = 64,
        captions: int = 2,
        most_objects: int = 3,
        lattice: int = LATTICE,
    ):
        if not 1 <= most_objects <= 3:
            raise UserError(f"rendered scenes: most_objects must be 1, 2 or 3, not {most_objects}")
        self.split, self.count, self.seed, self.image_size, self.captions = split, count, seed, image_size, captions
        if lattice < 8:
            raise UserError(f"rendered scenes: a lattice of {lattice} cells has no room for objects; take at least 8")
        self.most_objects, self.lattice = most_objects, lattice

    @property
    def name(self) -> str:
        objects = "" if self.most_objects == 3 else f", at most {self.most_objects} objects"
        lattice = "" if self.lattice == LATTICE else f", lattice {self.lattice}"
        captions = "" if self.captions == 2 else f", {self.captions} captions"
        return f"rendered scenes ({self.split}, seed {self.seed}, {self.image_size} px{objects}{lattice}{captions})"

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        return compose(generator(self.split, self.seed, index), self.split, self.most_objects, self.lattice)

    def read(self, index: int) -> Sample:
        rng = generator(self.split, self.seed, index)
        scene = compose(rng, self.split, self.most_objects, self.lattice)
        captions = [describe_scene(scene, rng) for _ in range(self.captions)]
        return Sample(f"{index:08d}", render(scene, self.image_size), captions)


@part
class ShuffledCaptions(Source):
    """Another source with the captions of other images: the control that a generator must not pass."""

    def __init__(self, source: RenderedScenes):
        self.source = source

    @property
    def name(self) -> str:
        return f"{self.source.name}, captions shuffled"

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Sample:
        other = (index + len(self) // 2) % len(self)
        return replace(self.source.read(index), captions=self.source.read(other).captions)
