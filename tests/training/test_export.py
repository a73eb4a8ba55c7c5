"""`nar-t2i export` turned down."""

import pytest
import yaml

from nar_t2i.cli import main
from tests.cluster.ranks import ROOT


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((ROOT / "tests/cluster/tiny.yaml").read_text())
    recipe["trainer"].update(max_steps=2, num_sanity_val_steps=0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    return tmp_path


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["export", *arguments]) == 2
    return capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(folder, capsys):
    (folder / "full").mkdir()
    (folder / "full/mine").touch()
    assert "full is not empty; export into a new folder" in refused(capsys, "run", "full")


def test_what_is_no_checkpoint(folder, capsys):
    assert "nowhere is neither a whole checkpoint nor a run that has one" in refused(capsys, "nowhere", "out")


def test_a_run_without_its_configuration(folder, capsys):
    (folder / "run/config.yaml").unlink()
    assert "config.yaml: a checkpoint is exported with its run's configuration" in refused(capsys, "run", "out")


def test_a_broken_checkpoint(folder, capsys):
    path = folder / "run/checkpoints/step-00000002.ckpt/run.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "run.pt is not what was written" in refused(capsys, "run", "out")
    assert not (folder / "out").exists()
