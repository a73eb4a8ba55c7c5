"""A data set is prepared by several processes, each of its shards, as tasks of a Slurm array do."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nar_t2i.errors import UserError
from nar_t2i.folders import save_part
from nar_t2i.prepare import folder as from_folder
from nar_t2i.prepare import scenes, tokens
from nar_t2i.prepare.command import shard_range
from nar_t2i.tokenizers import VQGAN, VectorQuantizer

ROOT = Path(__file__).parents[2]
DONE = "these shards are done; others are not yet"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.suffix != ".model"}


def array(monkeypatch, task, tasks, first=0):
    for name, value in {"ID": task, "MIN": first, "MAX": first + tasks - 1, "COUNT": tasks}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


@pytest.mark.parametrize("count", [0, 1, 7, 10])
@pytest.mark.parametrize("tasks", [1, 3, 12])
def test_the_tasks_of_an_array_do_each_shard_once(monkeypatch, count, tasks):
    done = []
    for task in range(5, 5 + tasks):
        array(monkeypatch, task, tasks, first=5)
        done += shard_range("array", count)
    assert done == list(range(count))


def test_an_array_with_gaps_would_leave_shards_undone(monkeypatch):
    array(monkeypatch, 3, 2, first=3)
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "7")
    with pytest.raises(UserError, match="2 tasks from 3 to 7 has gaps"):
        shard_range("array", 10)


@pytest.mark.parametrize(("text", "expected"), [("0:", [0, 1, 2, 3]), ("1:3", [1, 2]), ("3:9", [3]), ("7:9", []), ("2:", [2, 3])])
def test_ranges(text, expected):
    assert list(shard_range(text, 4)) == expected


@pytest.mark.parametrize("text", ["3", "a:b", "3:3", "4:2", "-1:2", ":2"])
def test_what_is_no_range_is_an_error(text):
    with pytest.raises(UserError, match="must be FIRST:LAST, such as 0:100, or array"):
        shard_range(text, 4)


def test_outside_of_an_array_there_is_none(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(UserError, match="this is no task of a Slurm array"):
        shard_range("array", 4)


def commands(tmp_path):
    """Each command as a function of where it writes."""
    images = tmp_path / "images"
    if not images.exists():
        images.mkdir()
        for i in range(25):
            Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)).save(images / f"{i:02d}.png")
            (images / f"{i:02d}.txt").write_text(f"grey {i}" if i != 3 else "")  # one is dropped
        save_part(VQGAN(16, channels=[16, 16], patch=2, quantizer=VectorQuantizer(8, 4)), tmp_path / "codec")
        assert scenes.main([str(tmp_path / "shards"), "--count", "25", "--samples-per-shard", "10", "--image-size", "16"]) == 0
    return {
        "scenes": lambda out, *more: scenes.main(
            [str(out), "--count", "25", "--samples-per-shard", "10", "--image-size", "16", *more]
        ),
        "folder": lambda out, *more: from_folder.main([str(images), str(out), "--samples-per-shard", "10", *more]),
        "tokens": lambda out, *more: tokens.main([str(tmp_path / "shards"), str(tmp_path / "codec"), str(out), *more]),
    }


@pytest.mark.parametrize("command", ["scenes", "folder", "tokens"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_give_what_one_process_gives(tmp_path, monkeypatch, capsys, command, order):
    do = commands(tmp_path)[command]
    assert do(tmp_path / "whole") == 0
    capsys.readouterr()
    for number, task in enumerate(order):
        array(monkeypatch, task, 3)
        assert do(tmp_path / "parts", "--shard-range", "array") == 0
        assert (DONE in capsys.readouterr().out) == (number < 2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # Done again, it changes nothing.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("0*")}
    assert do(tmp_path / "parts") == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("0*")}


def test_two_writers_of_the_same_shards_do_not_corrupt_them(tmp_path):
    assert commands(tmp_path)["scenes"](tmp_path / "whole") == 0
    line = [
        sys.executable,
        ROOT / "data_prep/render_scenes.py",
        tmp_path / "both",
        "--count",
        "25",
        "--samples-per-shard",
        "10",
        "--image-size",
        "16",
    ]
    writers = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for writer in writers:
        _, error = writer.communicate()
        assert writer.returncode == 0, error.decode()
    assert contents(tmp_path / "both") == contents(tmp_path / "whole")


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    from nar_t2i.files import temporary_name

    path = tmp_path / "00000.tar"
    own = temporary_name(path)
    dead = own.with_name(own.name.replace(f".{own.suffixes[-2][1:]}.", ".99999999."))
    alive = own.with_name(own.name.replace(f".{own.suffixes[-2][1:]}.", ".1."))
    for left in (dead, alive):
        left.touch()
    temporary_name(path)
    assert alive.exists() and not dead.exists()
