"""One part, one folder: it comes back as it was, or with one clear error; its files cannot lie elsewhere."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from nar_t2i.errors import UserError
from nar_t2i.files import read_json, whole_folder, write_json
from nar_t2i.folders import load_part, save_part
from nar_t2i.parts import part
from tests.full_disk import files_of_at_most


@part
class Noted(nn.Module):
    """A layer and a text file."""

    assets = ("note",)

    def __init__(self, note: str, width: int = 3):
        super().__init__()
        self.text = open(note, encoding="utf-8").read()
        self.layer = nn.Linear(width, width)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


TRUSTED = (Noted.__module__.split(".")[0],)


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/note.txt").write_text("hello")
    torch.manual_seed(0)
    original = Noted(str(tmp_path / "elsewhere/note.txt"))
    original.steps += 5
    save_part(original, tmp_path / "part")
    shutil.rmtree(tmp_path / "elsewhere")
    return original, tmp_path / "part"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_it_comes_back_and_can_be_moved_and_saved_over_itself(saved, tmp_path):
    original, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "note.txt", "weights.safetensors"]
    assert config_of(folder)["init_args"] == {"note": "note.txt", "width": 3}
    folder.rename(tmp_path / "moved")
    loaded = load_part(tmp_path / "moved", TRUSTED)
    save_part(loaded, tmp_path / "moved")
    again = load_part(tmp_path / "moved", TRUSTED)
    assert again.text == "hello" and again.steps == 5 and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in original.state_dict().items())


def test_weights_that_cannot_be_written_leave_those_that_are_there(saved):
    folder = saved[1]
    part, before = load_part(folder, TRUSTED), (folder / "weights.safetensors").read_bytes()
    with files_of_at_most(100), pytest.raises(UserError, match="weights.safetensors: could not be written: .*File too large"):
        save_part(part, folder)
    assert (folder / "weights.safetensors").read_bytes() == before and not list(folder.glob("*.tmp"))


def test_saving_does_not_change_the_part(saved, tmp_path):
    loaded = load_part(tmp_path / "part", TRUSTED)
    before = dict(loaded._described_args)
    save_part(loaded, tmp_path / "other")
    assert loaded._described_args == before


def test_weights_can_be_stored_in_half_precision(saved, tmp_path):
    original, _ = saved
    loaded = load_part(tmp_path / "part", TRUSTED)
    save_part(loaded, tmp_path / "half", torch.bfloat16)
    half = load_part(tmp_path / "half", TRUSTED)
    assert half.layer.weight.dtype == torch.float32 and half.steps.dtype == torch.int64 and half.steps == 5
    assert torch.equal(half.layer.weight, original.layer.weight.bfloat16().float())


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "", "link"])
def test_a_file_outside_of_the_folder_is_refused(saved, tmp_path, name):
    _, folder = saved
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    config = config_of(folder)
    config["init_args"]["note"] = name
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match="note must be a file of this folder"):
        load_part(folder, TRUSTED)


def test_a_foreign_class_is_refused(saved):
    _, folder = saved
    with pytest.raises(UserError, match="is not part of nar_t2i"):
        load_part(folder)
    write_json(folder / "config.json", {"class_path": "os.system", "init_args": {"command": "true"}})
    with pytest.raises(UserError, match="os.system"):
        load_part(folder, TRUSTED)


def test_what_has_or_makes_a_part_is_told_from_one(saved, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run: a run that has not ended; nar-t2i export"):
        load_part(run)
    with pytest.raises(UserError, match="last.ckpt: a checkpoint; nar-t2i export"):
        load_part(run / "checkpoints/last.ckpt")
    saved[1].rename(run / "model")
    with pytest.raises(UserError, match="run: a run's folder, whose model is .*run/model"):
        load_part(run)
    write_json(run / "model/config.json", {"format": 1})
    with pytest.raises(UserError, match="run/model: a whole model; name one of its parts, such as .*model/tokenizer"):
        load_part(run / "model")


@pytest.mark.parametrize("missing", ["config.json", "weights.safetensors", "note.txt"])
def test_a_folder_that_is_not_whole(saved, missing):
    _, folder = saved
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing.split(".")[0]):
        load_part(folder, TRUSTED)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"class_path": "nar_t2i.schedules.Guidance"}', '{"class_path": 3, "init_args": {}}',
     '{"class_path": "nar_t2i.schedules.Guidance", "init_args": []}'],
)  # fmt: skip
def test_a_configuration_that_is_none(saved, text):
    _, folder = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        load_part(folder, TRUSTED)


def test_weights_that_are_cut_or_do_not_fit(saved):
    _, folder = saved
    config = config_of(folder)
    config["init_args"]["width"] = 4
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match="part"):
        load_part(folder, TRUSTED)
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:60])
    with pytest.raises(UserError, match="part"):
        load_part(folder, TRUSTED)


def test_an_asset_that_is_not_named(saved):
    _, folder = saved
    write_json(folder / "config.json", {**config_of(folder), "init_args": {"width": 3}})
    with pytest.raises(UserError, match="None: no such file"):
        load_part(folder, TRUSTED)


def test_unknown_arguments_are_named(saved):
    _, folder = saved
    config = config_of(folder)
    config["init_args"]["depth"] = 4
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match="depth"):
        load_part(folder, TRUSTED)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_writers_of_one_file_do_not_mix(tmp_path):
    """Threads of one process, too."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write_json(tmp_path / "a.json", {"x": [n] * 20_000}), range(40)))
    assert len(set(read_json(tmp_path / "a.json")["x"])) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def make(folder, fails):
        with whole_folder(folder) as beside:
            beside.mkdir()
            (beside / "first").write_text("1")
            assert not (folder / "first").exists()
            if fails:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        make(tmp_path / "new", fails=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        make(tmp_path / name, fails=False)
        assert (tmp_path / name / "first").read_text() == "1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "new"]
