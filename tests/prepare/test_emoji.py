"""The emoji of this machine: what they are called, how they are drawn, and that the splits keep their word."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nar_t2i.data.shards import ShardSource
from nar_t2i.prepare import emoji as command
from nar_t2i.prepare.emoji import CLDR, FONT, TONES, UNICODE, Emoji, draw, read_emoji, split_emoji

MISSING = [path for path in (FONT, UNICODE, CLDR) if not Path(path).exists()]


@pytest.fixture(scope="module")
def emoji():
    if MISSING and not os.environ.get("NAR_T2I_REQUIRE_EMOJI"):
        pytest.skip(f"{MISSING[0]} is not here: apt install fonts-noto-color-emoji unicode-data unicode-cldr-core")
    return read_emoji()


@pytest.fixture(scope="module")
def splits(emoji):
    return split_emoji(emoji)


def named(emoji, name):
    (found,) = [e for e in emoji if e.name == name]
    return found


def test_names_and_keywords_are_cldrs(emoji):
    assert len(emoji) > 3500 and len({e.name for e in emoji}) == len(emoji)
    woman = named(emoji, "woman health worker: dark skin tone")
    assert [hex(ord(c)) for c in woman.text] == ["0x1f469", "0x1f3ff", "0x200d", "0x2695", "0xfe0f"]
    assert "doctor" in woman.keywords
    assert woman.captions[:2] == ["woman health worker: dark skin tone", "an emoji of woman health worker: dark skin tone"]
    assert woman.captions[2].startswith("woman health worker: dark skin tone, doctor")
    assert woman.parts == {0x1F469, 0x1F3FF, 0x2695}
    assert named(emoji, "flag: France").words == {"france"}


def test_every_emoji_is_drawn_and_no_two_are_alike(emoji):
    pictures = {}
    for e in emoji:
        picture = draw(e.text, FONT)
        assert picture is not None and picture.shape == (136, 136, 3), e.name
        pictures.setdefault(picture.tobytes(), []).append(e.name)
    alike = [names for names in pictures.values() if len(names) > 1]
    # The font has one picture for a few pairs, such as people without and with a stated gender, and flags of territories.
    assert sum(len(names) - 1 for names in alike) < 120, alike[:5]


def test_a_picture_is_what_its_name_says(emoji):
    def mean(name):
        return draw(named(emoji, name).text, FONT).reshape(-1, 3).astype(float)

    red, green = mean("red circle"), mean("green circle")
    assert red[:, 0].mean() > red[:, 1].mean() + 40 and green[:, 1].mean() > green[:, 0].mean() + 20
    assert mean("woman: dark skin tone").mean() < mean("woman: light skin tone").mean() - 10
    assert (draw(named(emoji, "red circle").text, FONT)[0, 0] == 255).all()


def test_a_sequence_that_the_font_does_not_know_is_no_picture(emoji):
    assert draw("\U0001f469‍\U0001f34e", FONT) is None  # a woman and an apple
    assert draw("\U0010fffd", FONT) is None


def test_held_out_people_are_made_of_parts_that_were_seen(splits):
    assert len(splits["train"]) > 3200 and 200 < len(splits["held_out"]) < 400 and 50 < len(splits["unseen"]) < 100
    assert {"woman guard: dark skin tone", "woman: dark skin tone, red hair"} <= {e.name for e in splits["held_out"]}
    seen = frozenset().union(*(e.parts for e in splits["train"]))
    assert all(e.parts <= seen and e.parts & set(TONES) for e in splits["held_out"])
    assert not {e.text for e in splits["train"]} & {e.text for e in splits["held_out"]}


def test_of_unseen_names_no_word_was_seen(splits):
    little = {"flag", "of", "the", "and", "a", "with", "in", "on", "for", "at", "to", "over"}
    heard = {word.strip(",.:()!’").lower() for e in splits["train"] for caption in e.captions for word in caption.split()}
    named = {word.strip(",.:()!’").lower() for e in splits["unseen"] for word in e.name.split()} - little
    assert len(named) > 50 and not named & heard
    parts = frozenset().union(*(e.parts for e in splits["train"]))
    assert not any(e.parts & parts for e in splits["unseen"] if e.group != "Flags")  # flags are spelled with letters
    seen = {draw(e.text, FONT).tobytes() for e in splits["train"]}
    assert not any(draw(e.text, FONT).tobytes() in seen for e in splits["unseen"])


def test_what_would_give_an_unseen_name_away_is_seen_instead():
    def thing(number, name):
        return Emoji(chr(0x1F400 + number), name, (), "Objects")

    many = [thing(number, f"thing {number}") for number in range(200)] + [thing(300 + n, f"w{chr(97 + n)}") for n in range(26)]
    found = split_emoji(many)
    assert not any("thing" in e.name for e in found["unseen"]) and found["unseen"]


def test_shards(emoji, tmp_path, capsys):
    folder = str(tmp_path / "shards")
    line = [folder, "--split", "unseen", "--image-size", "48", "--samples-per-shard", "20"]
    assert command.main([*line, "--shard-range", "0:2"]) == 0
    assert "others are not yet" in capsys.readouterr().out
    assert command.main(line) == 0
    source, unseen = ShardSource(folder), split_emoji(emoji)["unseen"]
    assert f"kept {len(unseen)} samples in 4 shards, dropped 0" in capsys.readouterr().out
    assert len(source) == len(unseen)
    for index in (0, len(unseen) - 1):
        sample = source.read(index)
        assert sample.captions == unseen[index].captions and sample.image.shape == (48, 48, 3)
        expected = Image.fromarray(draw(unseen[index].text, FONT)).resize((48, 48), Image.Resampling.LANCZOS)
        assert np.abs(sample.image.astype(int) - np.asarray(expected).astype(int)).mean() < 2
    assert command.main([*line, "--image-size", "64"]) == 2
    assert "holds shards from another input" in capsys.readouterr().err
    other = tmp_path / "other.ttf"
    other.write_bytes(Path(FONT).read_bytes() + b"\0")
    assert command.main([*line, "--font", str(other)]) == 2
    assert "holds shards from another input" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "content", "message"), [
    ("--font", None, "no such file; Debian's fonts-noto-color-emoji has it"),
    ("--font", "no font", "not a font with pictures of 109 pixels"),
    ("--unicode", None, "Debian's unicode-data has it"),
    ("--unicode", "nothing", "names no emoji"),
    ("--cldr", None, "Debian's unicode-cldr-core has it"),
])  # fmt: skip
def test_what_is_missing_is_one_error(emoji, tmp_path, capsys, option, content, message):
    if content is not None:
        (tmp_path / "file").write_text(content)
    assert command.main([str(tmp_path / "out"), option, str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
