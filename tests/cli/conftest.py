"""A recipe that trains in an instant, in a folder of its own."""

import pytest

from tests.cli.running import RECIPE


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(RECIPE)
    (tmp_path / "toy.yaml").write_text("extends: base.yaml\nrun_dir: run\n")
    return tmp_path
