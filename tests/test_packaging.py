"""What is installed: pinned versions that fit the declared ranges, and a wheel that works without the checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]


def constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins():
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in constraints())}


def test_constraints_are_exact_and_carry_no_local_labels():
    for line in constraints():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert not {"pip", "wheel", "nar-t2i"} & pins().keys()
    assert len(pins()) == len(constraints())


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_each_dependency_is_pinned_inside_its_range(requirement):
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_ranges_keep_out_what_must_stay_out():
    ranges = {requirement.name: requirement for requirement in REQUIREMENTS}
    assert not any(Version(v) in ranges["lightning"].specifier for v in ("2.6.2", "2.6.3"))  # malicious
    assert ranges["lightning"].extras == set()
    assert "2.14.0" not in ranges["torch"].specifier and "2.13.0" in ranges["torch"].specifier
    assert "0.19.4" not in ranges["deepspeed"].specifier
    assert ranges["jsonargparse"].extras == {"signatures"}


def test_an_old_python_is_refused_in_words(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    result = subprocess.run(["make", "-C", str(tmp_path), "PYTHON=false", "test"], capture_output=True, text=True)
    assert result.returncode != 0 and "needs Python 3.11 or newer" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_both_make_targets_set_themselves_up(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for target in ("test", "quickstart", "quickstart-short"):
        plan = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert "pip install -c constraints.txt -e '.[test]'" in plan
    (tmp_path / ".venv").mkdir()
    for stamp in (".installed", ".models"):
        (tmp_path / ".venv" / stamp).touch()
    plan = subprocess.run(["make", "-n", "test"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "pip install" not in plan and "pytest" in plan


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content, alone in a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed, tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )


def tracked(folder):
    files = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.removeprefix(f"{folder}/") for line in files.stdout.splitlines() if (ROOT / line).is_file()}


def test_recipes_and_assets_travel_in_the_wheel(installed):
    for source, target in (("recipes", "nar_t2i/recipes"), ("nar_t2i", "nar_t2i")):
        inside = {str(p.relative_to(installed / target)) for p in (installed / target).rglob("*") if p.is_file()}
        files = tracked(source) if (ROOT / ".git").exists() else set()
        assert files <= inside
    assert any((installed / "nar_t2i/recipes").rglob("*.yaml"))


def test_the_command_works_from_the_wheel(installed, tmp_path):
    entry = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "nar-t2i = nar_t2i.cli:program" in entry.read_text()
    assert run(installed, tmp_path, "-m", "nar_t2i", "--help").returncode == 0
    code = "import nar_t2i.recipe as r; print(r.__file__); print(r.shipped())"
    file, folder = run(installed, tmp_path, "-c", code).stdout.split()
    assert Path(file).is_relative_to(installed) and Path(folder) == installed / "nar_t2i/recipes"
    name = next((installed / "nar_t2i/recipes").rglob("*.yaml")).relative_to(folder)
    code = f"import nar_t2i.recipe as r; print(r.load({str(name)!r}).config != {{}})"
    assert run(installed, tmp_path, "-c", code).stdout.strip() == "True"
