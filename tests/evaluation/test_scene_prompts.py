"""The committed scene prompts: what they ask for, and that training never reads or shows it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nar_t2i.data.captions import describe_scene, reserved
from nar_t2i.data.scenes import HELD_OUT_PAIRS, PAIRS, RELATIONS, compose, generator, relation_between, triple_held_out
from nar_t2i.errors import UserError
from nar_t2i.evaluation.prompt_generator import PER_CATEGORY
from nar_t2i.evaluation.scene_prompts import CATEGORIES, committed, load, save, take

ROOT = Path(__file__).parents[2]
TRAINING_CAPTIONS = 20_000


@pytest.fixture(scope="module")
def prompts():
    return {which: committed(which) for which in ("seen", "held_out")}


def test_every_category_has_its_number_of_distinct_reserved_prompts(prompts):
    texts = [p.prompt for both in prompts.values() for p in both]
    assert len(set(texts)) == len(texts), "a prompt occurs twice, within a file or in both"
    assert all(reserved(text) for text in texts)
    for file in prompts.values():
        assert Counter(p.category for p in file) == dict.fromkeys(CATEGORIES, PER_CATEGORY)
        assert PER_CATEGORY >= 200
        named = Counter(p.category for p in file if p.prompt.endswith("background"))
        assert all(0.3 <= named[category] / PER_CATEGORY <= 0.4 for category in CATEGORIES)


def test_seen_prompts_hold_nothing_held_out_and_held_out_ones_all_do(prompts):
    assert {p.held_out for p in prompts["seen"]} == {None}
    for category in CATEGORIES:
        parts = Counter(p.held_out for p in prompts["held_out"] if p.category == category)
        assert parts == ({"pair": 100, "triple": 100} if category == "position" else {"pair": PER_CATEGORY})


def test_each_category_asks_for_what_it_says(prompts):
    for p in prompts["seen"] + prompts["held_out"]:
        shapes, colors = [g.shape for g in p.groups], [g.color for g in p.groups]
        counts = [g.count for g in p.groups]
        assert (p.relation is not None) == (p.category == "position")
        if p.category in ("single_object", "colors"):
            assert counts == [1]
        elif p.category == "counting":
            assert counts in ([2], [3])
        elif p.category == "position":
            assert len(counts) == 2 and 2 <= sum(counts) <= 3
        else:
            assert counts == [1, 1]
            assert p.category != "two_objects" or shapes[0] != shapes[1]
            assert p.category != "color_attribution" or colors[0] != colors[1]
        for group in p.groups:
            assert group.color in p.prompt and group.shape in p.prompt
    same_shape = [p.groups[0].shape == p.groups[1].shape for p in prompts["seen"] if p.category == "color_attribution"]
    assert 0.3 <= np.mean(same_shape) <= 0.4


def test_training_neither_reads_a_prompt_nor_shows_a_held_out_combination(prompts):
    texts = {p.prompt for both in prompts.values() for p in both}
    for index in range(TRAINING_CAPTIONS // 4):
        rng = generator("train", 0, index)
        scene = compose(rng, "train")
        assert not texts & {describe_scene(scene, rng) for _ in range(4)}
        assert not HELD_OUT_PAIRS & {(o.color, o.shape) for o in scene.objects}
        for i, a in enumerate(scene.objects):
            for b in scene.objects[i + 1 :]:
                relation = relation_between((a.x, a.y), (b.x, b.y))
                assert relation is None or not triple_held_out((a.color, a.shape), relation, (b.color, b.shape))


def test_a_tenth_and_more_of_pairs_and_triples_are_held_out():
    assert len(HELD_OUT_PAIRS) / len(PAIRS) >= 0.1
    triples = [triple_held_out(a, r, b) for a in PAIRS for r in RELATIONS for b in PAIRS]
    assert np.mean(triples) >= 0.1


def test_the_command_writes_the_committed_bytes_again(tmp_path):
    command = [sys.executable, str(ROOT / "data_prep" / "make_scene_prompts.py"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    for which in ("seen", "held_out"):
        made = (tmp_path / f"{which}.jsonl").read_bytes()
        assert made == (ROOT / "nar_t2i" / "assets" / "prompts" / f"{which}.jsonl").read_bytes()


def test_saving_and_loading_gives_the_same_prompts(prompts, tmp_path):
    save(prompts["held_out"], tmp_path / "prompts.jsonl")
    assert load(tmp_path / "prompts.jsonl") == prompts["held_out"]


def test_a_quick_look_takes_as_many_of_each_category_in_their_order(prompts):
    few = take(prompts["seen"], 3)
    assert Counter(p.category for p in few) == dict.fromkeys(CATEGORIES, 3)
    assert few == [p for p in prompts["seen"] if p in few]


GOOD = {"prompt": "x", "category": "single_object", "groups": [{"count": 1, "color": "red", "shape": "star"}]}
TWO = GOOD["groups"] + [{"count": 1, "color": "blue", "shape": "star"}]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": None}, "'prompt'"),
        ({"prompt": " "}, "'prompt'"),
        ({"category": "texture"}, "'category'"),
        ({"category": ["colors"]}, "'category'"),
        ({"groups": []}, "'groups'"),
        ({"groups": [{"count": 1, "color": "red"}]}, "'groups'[0]: key 'shape' is missing"),
        ({"groups": [{"count": 0, "color": "red", "shape": "star"}]}, "'groups'[0]: key 'count'"),
        ({"groups": [{"count": True, "color": "red", "shape": "star"}]}, "'count'"),
        ({"groups": [{"count": 1, "color": "mauve", "shape": "star"}]}, "'color'"),
        ({"groups": [{"count": 1, "color": "red", "shape": 3}]}, "'shape'"),
        ({"groups": GOOD["groups"] * 2}, "'groups'"),
        ({"relation": "above"}, "'relation'"),
        ({"category": "position"}, "'relation'"),
        ({"category": "position", "relation": "near", "groups": TWO}, "'relation'"),
        ({"category": "position", "relation": "above"}, "'groups'"),
        ({"colour": "red"}, "'colour' is unknown"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_key(tmp_path, change, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(UserError) as error:
        load(path)
    assert f"{path}:3: " in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b"[]\n", b"\xff\xfe", b'"text"'])
def test_a_file_that_holds_no_prompts_is_refused(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="mine.jsonl"):
        load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        load(tmp_path / "none.jsonl")
