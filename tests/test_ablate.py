"""`nar-t2i ablate`: what is trained once, what is judged on whose run, and the table that comes of it."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nar_t2i.ablate import apart, leaving_on_signals, plan
from nar_t2i.cli import main
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.data.shards import ShardSource
from nar_t2i.errors import UserError
from nar_t2i.evaluation.comparison import changes, compare, paired_interval, seeds_interval, share_interval
from nar_t2i.evaluation.scene_accuracy import wilson
from nar_t2i.evaluation.scene_prompts import CATEGORIES
from nar_t2i.folders import load_part, save_part
from nar_t2i.learning import Unrolled
from nar_t2i.parts import build
from nar_t2i.prepare.rendering import write_source
from nar_t2i.prepare.sentencepiece import captions_of, train_sentencepiece
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.recipe import load
from tests.full_disk import files_of_at_most

RECIPES = ["learning/masked", "learning/unrolled", "inference/halton", "inference/one_step"]
LINE = ["--scale", "small", "--prompts", "1", "--out", "out"]
for override in (
    "init_from=null", "model.init_args.text.init_args.trainable=all", "model.init_args.network.init_args.width=16",
    "model.init_args.network.init_args.depth=1", "trainer.max_steps=4", "trainer.val_check_interval=4",
    "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "data.init_args.global_batch_size=4",
    "model.init_args.sample_prompts=[]",
):  # fmt: skip
    LINE += ["--override", override]


@pytest.fixture(scope="module")
def beside_a_quickstart(tmp_path_factory):
    """A folder with what recipes/scale/small needs; the tokenizer has not learned anything."""
    from nar_t2i.training.command import RecipeCLI

    folder = tmp_path_factory.mktemp("ablate")
    run = folder / "runs/quickstart"
    codec = RecipeCLI(load("quickstart/tokenizer")).build_model().codec
    save_part(codec, run / "tokenizer/model")
    for split in ("train", "validation"):
        write_source(RenderedScenes(split, 24), run / "data" / split)
        encode_tokens(codec, ShardSource(str(run / "data" / split)), run / "tokens" / split)
    train_sentencepiece(captions_of(ShardSource(str(run / "data/train"))), run / "data/vocabulary.model", 300)
    return folder


def steps_of(run):
    with open(run / "metrics.csv", newline="") as file:
        return max(int(row["step"]) for row in csv.DictReader(file)) + 1


def test_recipes_are_trained_judged_and_compared_once(beside_a_quickstart, monkeypatch, capsys):
    monkeypatch.chdir(beside_a_quickstart)
    assert main(["ablate", *RECIPES[:2], *LINE]) == 0
    out = beside_a_quickstart / "out"
    assert sorted(path.name for path in (out / "runs/0").iterdir()) == ["masked", "unrolled"]
    assert steps_of(out / "runs/0/masked") == 4 and steps_of(out / "runs/0/unrolled") == 2  # two passes a step
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "comparison" not in path.name}
    for other, reason in ((["--prompts", "2"], "prompts 1"), (["--equal", "steps"], "equal 'flops'"),
                          (["--override", "model.init_args.network.init_args.width=8"], "width 16")):  # fmt: skip
        assert main(["ablate", *RECIPES[:2], *LINE, *other]) == 2
        assert f"was made with {reason}" in capsys.readouterr().err.replace("settings.", "").replace(
            "config.model.init_args.network.init_args.", ""
        ).replace("training.model.init_args.network.init_args.", "")
    capsys.readouterr()
    assert main(["ablate", *RECIPES, *LINE]) == 0
    told = capsys.readouterr().out
    assert "masked, seed 0: judged before" in told and "unrolled, seed 0: judged before" in told
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # nothing was trained or judged again
    assert sorted(path.name for path in (out / "runs/0").iterdir()) == ["masked", "unrolled"]

    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["masked", "unrolled", "halton", "one_step"]
    assert [row["passes"] for row in rows] == [16, 16, 16, 1]
    assert [row["forward_passes"] for row in rows] == [4, 4, 4, 4] and [row["steps"] for row in rows] == [4, 2, 4, 4]
    assert [row["difference"] is None for row in rows] == [True, False, False, False]
    assert rows[2]["strategy"]["inference"]["class_path"] == "nar_t2i.inference.Halton"
    table = (out / "comparison.md").read_text()
    assert table.count("\n| ") == 5 and "reference" in table
    assert len(list(csv.DictReader((out / "comparison.csv").open()))) == 4
    assert (out / "comparison.html").read_text().count("data:image/png") == 5
    verdicts = json.loads((out / "judged/halton-0/verdicts.json").read_text())
    assert len(verdicts["seen"]["passed"]) == 6 and len(verdicts["held_out"]["passed"]) == 6
    (out / "judged/halton-0/settings.json").unlink()  # as if it had been killed before the last file
    capsys.readouterr()
    assert main(["ablate", *RECIPES, *LINE]) == 0
    told = capsys.readouterr().out
    assert told.count("judged before") == 3 and "halton, seed 0: judged before" not in told
    assert json.loads((out / "judged/halton-0/verdicts.json").read_text())["seen"] == verdicts["seen"]


def test_a_report_puts_ablations_into_one_table(beside_a_quickstart, monkeypatch, capsys):
    """After the test above, whose entries are there."""
    monkeypatch.chdir(beside_a_quickstart)
    assert main(["ablate", "learning/linear", *LINE, "--out", "other"]) == 0
    for _ in range(2):  # again, nothing comes twice
        assert main(["report", "out", "other"]) == 0
        found = json.loads((beside_a_quickstart / "out/comparison.json").read_text())
        assert [row["name"] for row in found["rows"]] == ["masked", "unrolled", "halton", "one_step", "linear"]
    fewer = {"inference": {"class_path": "a.B", "init_args": {"steps": 4}}, "guidance": {}}
    more = {"inference": {"class_path": "a.B", "init_args": {"steps": 4, "temperature": 0.8}}, "guidance": {"scale": 2.0}}
    assert changes(fewer, more) == "inference.temperature default, guidance.scale default" and not changes(more, more)
    other = {"inference": {"class_path": "a.C", "init_args": {"order": 1}}, "guidance": {"scale": 2.0}}
    assert changes(other, more) == "inference C, inference.order 1"  # the other's arguments are not missed
    assert found["rows"][4]["changes"] == "learning.schedule linear" and found["rows"][0]["changes"] == ""
    assert found["rows"][2]["changes"].startswith("inference Halton")
    assert "learning.schedule linear" in (beside_a_quickstart / "out/comparison.md").read_text()
    assert main(["ablate", "learning/linear", *LINE, "--out", "third"]) == 0
    assert main(["report", "other", "third"]) == 0
    assert "linear (third)" in (beside_a_quickstart / "other/comparison.md").read_text()
    capsys.readouterr()
    with files_of_at_most(100):
        assert main(["report", "other", "third"]) == 2
    told = capsys.readouterr().err
    assert (
        "File too large" in told
        and told.count("\n") == 1
        and "linear (third)" in (beside_a_quickstart / "other/comparison.md").read_text()
    )
    assert main(["report", "other", "other/runs/0/linear"]) == 0  # an ablation and a run: one table
    columns = {line.split(",")[0] for line in (beside_a_quickstart / "side-by-side.csv").read_text().splitlines()[1:]}
    assert columns == {"linear", "linear (third)", "linear (0)"}


def test_a_critic_is_trained_beside_its_generator_and_then_guides_it(beside_a_quickstart, monkeypatch):
    monkeypatch.chdir(beside_a_quickstart)
    recipes = ["learning/masked", "learning/critic", "inference/critic_guided", "inference/critic_adaptive"]
    text = load("scale/small").config["model"]["init_args"]["text"]
    save_part(
        build({"class_path": text["class_path"], "init_args": {**text["init_args"], "trainable": "all"}}), "runs/quickstart/text"
    )
    frozen = [
        {"init_from=null": "init_from=runs/quickstart/text"}.get(part, part.replace("trainable=all", "trainable=none"))
        for part in LINE
    ]
    assert main(["ablate", *recipes, *frozen, "--out", "criticised"]) == 0
    rows = json.loads((beside_a_quickstart / "criticised/comparison.json").read_text())["rows"]
    assert [(row["name"], row["passes"]) for row in rows] == [("masked", 16), ("critic_guided", 31), ("critic_adaptive", 31)]
    with open(beside_a_quickstart / "criticised/runs/0/critic/metrics.csv", newline="") as file:
        assert any(row.get("critic_accuracy") for row in csv.DictReader(file))


def test_tasks_are_what_can_be_done_side_by_side(beside_a_quickstart, monkeypatch, capsys):
    monkeypatch.chdir(beside_a_quickstart)
    recipes = ["learning/masked", "learning/unrolled", "learning/critic", "inference/halton", "inference/critic_guided"]
    groups = [sorted((e.name, e.seed) for e in group) for group in apart(plan(recipes, "small", 2, [], Path("tasks")))]
    assert sorted(groups) == sorted(
        group for seed in (0, 1)
        for group in ([(name, seed) for name in ("critic", "critic_guided", "halton", "masked")], [("unrolled", seed)])
    )  # fmt: skip
    (beside_a_quickstart / "both.yaml").write_text(
        "extends: learning/unrolled.yaml\nmodel: {init_args: {inference: {class_path: nar_t2i.inference.CriticGuided, "
        'init_args: {critic: "${run_dir}/../critic/model"}}}}\n'
    )
    assert len(apart(plan([*recipes, "both.yaml"], "small", 1, [], Path("tasks")))) == 1  # which needs both runs
    line = ["ablate", "learning/masked", "learning/linear", *LINE, "--out", "tasks"]
    assert main([*line, "--count"]) == 0 and capsys.readouterr().out == "2\n"
    assert main([*line, "--task", "1"]) == 0
    assert (
        "1 of the entries are other tasks'" in capsys.readouterr().out
        and not (beside_a_quickstart / "tasks/comparison.md").exists()
    )
    assert main([*line, "--task", "0"]) == 0 and (beside_a_quickstart / "tasks/comparison.md").exists()
    assert main([*line, "--task", "2"]) == 2 and "there are 2" in capsys.readouterr().err
    Path("tasks/runs/0/masked/ablation.json").unlink()  # as where nar-t2i fit has trained it
    assert main([*line]) == 0


def test_a_recipe_that_trains_otherwise_needs_a_run_of_its_own(tmp_path):
    """Or it would be judged on another's weights."""
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text("extends: learning/masked.yaml\nmodel: {init_args: {guidance: {scale: 1.0}}}\n")
    other.write_text("extends: learning/masked.yaml\nmodel: {init_args: {learning: {init_args: {schedule: linear}}}}\n")
    first, second = plan(["learning/masked", str(same)], None, 1, [], tmp_path)
    assert first.run == second.run and first.config != second.config
    with pytest.raises(UserError, match="other.yaml trains otherwise than learning/masked, but has its run_dir"):
        plan(["learning/masked", str(other)], None, 1, [], tmp_path)


def test_steps_are_those_that_were_taken_however_often_they_are_logged(beside_a_quickstart, monkeypatch):
    monkeypatch.chdir(beside_a_quickstart)
    seldom = ["--override", "trainer.log_every_n_steps=3", "--override", "trainer.max_steps=8", "--out", "seldom"]
    assert main(["ablate", "learning/masked", "learning/unrolled", *LINE, *seldom]) == 0
    content = json.loads(Path("seldom/comparison.json").read_text())
    assert [row["steps"] for row in content["rows"]] == [8, 4] and [row["forward_passes"] for row in content["rows"]] == [8, 8]
    assert content["prompts"]["seen"] == dict.fromkeys(CATEGORIES, 1)


def test_a_way_to_decode_that_fails_ends_neither_its_run_nor_others(beside_a_quickstart, monkeypatch, capsys):
    import nar_t2i.ablate as module

    judge = module.judge

    def failing(entry, folder, prompts):
        if entry.name == "halton":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if entry.name == "random":
            raise NotImplementedError
        judge(entry, folder, prompts)

    monkeypatch.chdir(beside_a_quickstart)
    monkeypatch.setattr(module, "judge", failing)
    assert (
        main(["ablate", "learning/masked", "inference/halton", "inference/random", "inference/one_step", *LINE, "--out", "halting"])
        == 2
    )
    *lines, last = capsys.readouterr().err.splitlines()
    assert "✗ halton, seed 0: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" in lines
    assert "✗ random, seed 0: NotImplementedError: no more is said" in lines
    assert "not done: halton (seed 0), random (seed 0); " in last and Path("halting/judged/one_step-0/settings.json").exists()


def test_a_mistake_in_the_last_recipe_is_told_before_the_first_is_trained(beside_a_quickstart, monkeypatch, capsys):
    monkeypatch.chdir(beside_a_quickstart)
    Path("wrong.yaml").write_text("extends: inference/halton.yaml\nmodel: {init_args: {inference: {init_args: {stepz: 3}}}}\n")
    assert main(["ablate", "learning/square", "wrong.yaml", *LINE, "--out", "mistaken"]) == 2
    assert "wrong.yaml: key model.init_args.inference.init_args.stepz: unknown key" in capsys.readouterr().err
    assert not Path("mistaken").exists()


def test_an_entry_that_fails_is_named_and_the_others_are_done(beside_a_quickstart, monkeypatch, capsys):
    monkeypatch.chdir(beside_a_quickstart)
    Path("slow.yaml").write_text("extends: learning/progressive.yaml\nmodel: {init_args: {inference: {init_args: {steps: 9}}}}\n")
    line = [*LINE, "--out", "failing"]
    assert main(["ablate", "learning/progressive", "slow.yaml", "learning/masked", *line]) == 2  # whose token cache has no errors
    *lines, last = capsys.readouterr().err.splitlines()
    assert any(
        "✗ progressive, seed 0: the cache runs/quickstart/tokens/train holds no quantisation errors" in line for line in lines
    )
    assert any("✗ slow, seed 0: the run failing/runs/0/progressive failed" in line for line in lines)
    assert last.startswith("nar-t2i: error: not done: progressive (seed 0), slow (seed 0); ")
    assert main(["report", "failing"]) == 2 and "failing: an ablation that is not finished" in capsys.readouterr().err
    assert main(["ablate", "learning/masked", *line]) == 0 and "judged before" in capsys.readouterr().out
    assert [row["name"] for row in json.loads(Path("failing/comparison.json").read_text())["rows"]] == ["masked"]
    for split in ("train", "validation"):
        codec = load_part("runs/quickstart/tokenizer/model")
        encode_tokens(codec, ShardSource(f"runs/quickstart/data/{split}"), Path("erring", split), errors=True)
    caches = ["--override", "data.init_args.cache=erring/train", "--override", "data.init_args.validation_cache=erring/validation"]
    assert main(["ablate", "learning/progressive", "learning/masked", *line, *caches]) == 2  # masked was trained on others
    assert "was made with" in capsys.readouterr().err
    assert main(["ablate", "learning/progressive", "slow.yaml", *line, *caches]) == 0  # of which nothing had been trained
    assert [row["passes"] for row in json.loads(Path("failing/comparison.json").read_text())["rows"]] == [4, 9]


def test_seeds_are_trainings_of_their_own(beside_a_quickstart, monkeypatch):
    monkeypatch.chdir(beside_a_quickstart)
    shutil.rmtree("out", ignore_errors=True)
    assert main(["ablate", "learning/masked", *LINE, "--seeds", "2", "--equal", "steps"]) == 0
    (row,) = json.loads((beside_a_quickstart / "out/comparison.json").read_text())["rows"]
    assert row["seeds"] == 2 and row["spread"] is not None and row["over_seeds"] is None  # itself the reference
    one, other = ((beside_a_quickstart / f"out/runs/{seed}/masked/metrics.csv").read_text() for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize(("names", "reason"), [
    (["learning/masked", "learning/masked"], "two recipes are named masked"), (["quickstart/tokenizer"], "trains no generator"),
    (["learning/none"], "does not exist"),
])  # fmt: skip
def test_lists_that_cannot_be_compared_are_errors(names, reason):
    with pytest.raises(UserError, match=reason):
        plan(names, None, 1, [], Path("out"))


@pytest.mark.parametrize("steps", ["-1", "null"])
def test_what_ends_by_the_clock_has_no_steps_to_equalise(steps):
    overrides = [f"trainer.max_steps={steps}", "model.init_args.budget_minutes=1"]
    with pytest.raises(UserError, match="learning/masked: trainer.max_steps is (-1|None); ablate equalises steps"):
        plan(["learning/masked"], "small", 1, overrides, Path("out"))


def test_a_mistake_in_one_strategy_leaves_the_others(beside_a_quickstart, monkeypatch, capsys):
    """Of any kind: those in new code are rarely of ours."""
    monkeypatch.chdir(beside_a_quickstart)
    monkeypatch.setattr(Unrolled, "loss", lambda *arguments: [][0])
    line = [*LINE[:-1], "mistaken"] if LINE[-1] == "out" else [*LINE, "--out", "mistaken"]
    assert main(["ablate", "learning/unrolled", "learning/masked", *line, "--equal", "steps"]) == 2
    error = capsys.readouterr().err
    assert "✗ unrolled, seed 0: IndexError: list index out of range" in error and "Traceback" in error
    assert "not done: unrolled (seed 0)" in error and Path("mistaken/judged/masked-0/verdicts.json").exists()
    shutil.rmtree("mistaken/judged")
    assert main(["report", "mistaken"]) == 2
    assert "mistaken: an ablation that is not finished" in capsys.readouterr().err
    assert main(["report", "nothing"]) == 2 and "nothing: does not exist" in capsys.readouterr().err


def test_a_signal_while_pictures_are_judged_asks_for_another_start():
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as left, leaving_on_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
    assert left.value.code == 85 and signal.getsignal(signal.SIGUSR1) is before


def judged(*seeds):
    return [{"seen": {"passed": list(map(bool, seed))}, "held_out": {"passed": [True, False]}, "passes": 16, "rows": 31,
             "seconds_an_image": 0.1, "steps": 10, "training_passes": 2, "strategy": {}} for seed in seeds]  # fmt: skip


def test_differences_are_paired():
    draw = np.random.default_rng(0)
    easy = draw.random(2000)
    base, better = easy < 0.5, easy < 0.53  # the same prompts are hard for both
    other = draw.random(2000) < 0.53
    rows = compare({"base": judged(base), "paired": judged(better), "apart": judged(other)})
    half = [row.difference.high - row.difference.mean for row in rows[1:]]
    assert rows[1].difference.mean == pytest.approx(better.mean() - base.mean()) and rows[1].difference.low > 0
    assert half[0] < half[1] / 3  # pairs tell more than two samples
    assert half[1] == pytest.approx(1.96 * (2 * 0.25 / 2000) ** 0.5, rel=0.05)
    assert rows[0].forward_passes == 20 and rows[0].spread is None


@pytest.mark.parametrize("share", [0.02, 0.3])
@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_hold_what_they_say(share, seeds):
    """The mean over prompts, whether those of several seeds are hard or easy together or not, and paired differences."""
    draw, inside, paired = np.random.default_rng(1), 0, 0
    for _ in range(400):
        easy = np.clip(draw.normal(share, share / 3, 500), 0, 1)  # how often each prompt comes out right
        first, second = ((draw.random((seeds, 500)) < easy).astype(float) for _ in range(2))
        interval, difference = share_interval(first), paired_interval(first - second)
        inside += interval.low <= share <= interval.high
        paired += difference.low <= 0 <= difference.high
    assert 0.92 < inside / 400 < 0.985 and 0.92 < paired / 400 < 0.985


def test_no_interval_is_without_width():
    for passed in (np.zeros((1, 100)), np.ones((2, 100))):
        interval, difference = share_interval(passed), paired_interval(passed - passed)
        assert interval.high - interval.low == pytest.approx(0.037, abs=1e-3) and 0 <= interval.low <= interval.high <= 1
        assert difference.mean == 0 and difference.high == -difference.low == pytest.approx(0.019, abs=1e-3)
    assert share_interval(np.array([[1.0] * 30 + [0.0] * 70])).low == pytest.approx(wilson(30, 100)[0])


@pytest.mark.parametrize("seeds", [3, 10])
def test_prompts_that_all_pass_as_often_leave_the_interval_of_all_pictures(seeds):
    passed = np.zeros((seeds, 100))
    passed[np.arange(100) % seeds, np.arange(100)] = 1  # each in one seed
    interval = share_interval(passed)
    assert [interval.low, interval.high] == pytest.approx(wilson(100, 100 * seeds)) and interval.low < interval.mean < interval.high


@pytest.mark.parametrize(("seeds", "t"), [(2, 12.7062), (3, 4.30265), (10, 2.26216), (11, 2.22814), (31, 2.04227)])
def test_the_interval_over_seeds_is_student_s(seeds, t):
    values = np.random.default_rng(seeds).normal(size=seeds)
    interval = seeds_interval(values)
    assert (interval.high - interval.mean) / (values.std(ddof=1) / seeds**0.5) == pytest.approx(t, rel=1.5e-3)


def test_what_other_trainings_would_give_stands_apart():
    first, second = [1] * 60 + [0] * 40, [1] * 40 + [0] * 60
    rows = compare(
        {"base": judged(first, second), "up": judged([1] * 64 + [0] * 36, [1] * 46 + [0] * 54), "one": judged([1] * 70 + [0] * 30)}
    )
    assert rows[0].seen.mean == 0.5 and rows[0].spread == pytest.approx(0.1 * 2**0.5) and rows[0].over_seeds is None
    over = rows[1].over_seeds  # differences of 0.04 and 0.06
    assert over.mean == rows[1].difference.mean == pytest.approx(0.05) and over.high - over.mean == pytest.approx(
        12.7062 * 0.01, rel=1e-3
    )
    assert rows[1].difference.low > 0 > over.low  # sure of these trainings, not of others
    assert rows[2].difference.mean == pytest.approx(0.1) and rows[2].over_seeds is None  # with the reference's first seed
    with pytest.raises(UserError, match="judged on"):
        compare({"one": judged([1, 0, 1]), "other": judged([1, 0])})
