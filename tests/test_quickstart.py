"""Quickstart's stages: finished ones are kept, time adds up over starts, and the result has its promised keys.

The stages themselves run, at the scale "tiny", in test_readme.py.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nar_t2i import quickstart
from nar_t2i.cli import main
from nar_t2i.errors import UserError
from nar_t2i.evaluation.scene_prompts import CATEGORIES
from nar_t2i.quickstart import Quickstart, Stages, check_against_chance

ORDER = ["make_data", "train_tokenizer", "encode", "train_text", "train_generator", "evaluate"]
ACCURACY = (*CATEGORIES, "overall")


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stages.json").read_text())


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        stages = Stages(tmp_path / "qs", {"scale": "tiny"})
        stages.run("data", "data", lambda: calls.append("data"))
        stages.run("tokenizer", "tokenizer", lambda: calls.append("tokenizer"))
    assert calls == ["data", "tokenizer"]
    assert state(tmp_path / "qs")["done"] == ["data", "tokenizer"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_time_before_an_interruption_counts(tmp_path: Path, end: type[BaseException]) -> None:
    def broken() -> None:
        time.sleep(0.05)
        raise end

    for start in (1, 2):
        with pytest.raises(end):
            Stages(tmp_path, {}).run("data", "data", broken)
        assert state(tmp_path)["done"] == []
        assert state(tmp_path)["seconds"]["data"] >= 0.05 * start
    before = state(tmp_path)["seconds"]["data"]
    Stages(tmp_path, {}).run("data", "data", lambda: time.sleep(0.02))
    assert state(tmp_path)["done"] == ["data"]
    assert state(tmp_path)["seconds"]["data"] >= before + 0.02


def test_a_finished_stage_costs_no_more_time(tmp_path: Path) -> None:
    Stages(tmp_path, {}).run("data", "data", lambda: time.sleep(0.02))
    before = state(tmp_path)
    Stages(tmp_path, {}).run("data", "data", lambda: time.sleep(5))
    assert state(tmp_path) == before


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Stages(tmp_path, {"scale": "full"}).run("data", "data", lambda: None)
    with pytest.raises(UserError, match="other settings.*--out"):
        Stages(tmp_path, {"scale": "shortened"})
    Stages(tmp_path, {"scale": "full"})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages as they are called; none does anything. NAR_T2I_QUICKSTART_SCALE is "tiny"."""
    calls: list[str] = []
    for name in ORDER:
        monkeypatch.setattr(Quickstart, name, lambda self, name=name: calls.append(name))
    monkeypatch.setattr(Quickstart, "finish", lambda self, seconds: {})
    monkeypatch.setattr(quickstart.torch, "set_num_threads", lambda number: None)
    monkeypatch.setenv("NAR_T2I_QUICKSTART_SCALE", "tiny")
    return calls


def test_the_command_goes_on_where_it_was_interrupted(
    tmp_path: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["quickstart", "--out", str(tmp_path / "qs")]
    encode = Quickstart.encode

    def interrupted(self: Quickstart) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Quickstart, "encode", interrupted)
    assert main(command) == 130
    assert recorded == ORDER[:2] and "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(Quickstart, "encode", encode)
    assert main(command) == 0
    assert recorded == ORDER, "each stage once, in order"
    assert "finished before" in capsys.readouterr().out


def test_the_command_refuses_another_scale_in_the_same_folder(
    tmp_path: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ["quickstart", "--out", str(tmp_path / "qs")]
    assert main(command) == 0
    monkeypatch.delenv("NAR_T2I_QUICKSTART_SCALE")
    assert main(command) == 2
    assert str(tmp_path / "qs") in capsys.readouterr().err
    assert recorded == ORDER


def test_an_unknown_scale_is_named(
    tmp_path: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("NAR_T2I_QUICKSTART_SCALE", "huge")
    assert main(["quickstart", "--out", str(tmp_path / "qs")]) == 2
    assert "'huge'" in capsys.readouterr().err and recorded == []


@pytest.mark.parametrize("score, shuffled_captions, status", [
    (0.8, False, 0), (0.251, False, 0), (0.25, False, 1), (0.0, False, 1),
    (0.8, True, 1), (0.251, True, 1), (0.25, True, 0), (0.0, True, 0),
])  # fmt: skip
def test_the_check_wants_twice_chance_and_of_shuffled_captions_that_they_fail(
    score: float, shuffled_captions: bool, status: int
) -> None:
    shuffled = {"chance": {"derangement": {"overall": 0.125}}}
    metrics = {"generator": {"scene_accuracy": {"seen": {"overall": score}, "shuffled": shuffled}}}
    assert check_against_chance(metrics, shuffled_captions) == status


def test_the_result_has_the_promised_keys(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    share = dict.fromkeys(ACCURACY, 0.5)
    scores = {
        "tokenizer": {"psnr": 25.0, "codebook_use": 0.8, "detector_ratio": 0.97},
        "generator": {"scene_accuracy": {"seen": share, "held_out": share, "shuffled": share}, "decoder_passes": 16},
    }
    run = Quickstart(tmp_path, quickstart.SCALES["tiny"], shuffled_captions=False)
    for name in ("tokenizer", "generator"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,loss\n1,2.0\n")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/scores.json").write_text(json.dumps(scores))
    seconds = {"data": 10.0, "tokens": 5.0, "tokenizer": 20.0, "text": 6.0, "generator": 34.0, "evaluation": 8.0}
    metrics = run.finish(seconds)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    wall = metrics["wall_seconds"]
    assert set(wall) == {"install", "data", "tokenizer", "generator", "evaluation", "total"}
    assert wall["data"] == 15.0 and wall["generator"] == 40.0 and wall["total"] == pytest.approx(wall["install"] + 83.0, abs=0.2)
    assert {"psnr", "codebook_use", "detector_ratio"} <= set(metrics["tokenizer"])
    assert metrics["generator"]["decoder_passes"] == 16
    for which in ("seen", "held_out", "shuffled"):
        assert set(ACCURACY) <= set(metrics["generator"]["scene_accuracy"][which])
    assert (tmp_path / "report.html").is_file()
    assert str(tmp_path / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize("note, seconds", [("73\n", 73.0), (None, 0.0)])
def test_the_time_of_installing_is_what_make_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str | None, seconds: float
) -> None:
    if note:
        (tmp_path / "install_seconds").write_text(note)
    monkeypatch.setattr(quickstart.sys, "prefix", str(tmp_path))
    assert quickstart.install_seconds() == seconds
