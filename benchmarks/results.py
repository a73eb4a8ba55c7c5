"""Result files of benchmarks: the numbers beside the command, machine, versions and commit that gave them."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from nar_t2i.cli import leave
from nar_t2i.errors import UserError
from nar_t2i.files import read_json, write_json
from nar_t2i.hardware import describe_machine
from nar_t2i.provenance import git_commit, package_versions

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/results/bench"
PACKAGES = ("torch", "lightning", "deepspeed", "transformers", "webdataset", "diffusers", "numpy")
NEEDED = ("command", "machine", "versions", "commit", "rows")


def program(main: Callable[[], int | None]) -> NoReturn:
    """Run a benchmark as a process of its own. A UserError is one line, and exit status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        status = 2
    leave(status or 0)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Without options yet. description: a script's docstring, which --help shows as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """The type of an option that is a number from 1 on."""
    if (number := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def whole(text: str) -> int:
    """The type of an option that is a number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text}")
    return int(text)


def write(path: str | Path, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Write `{"command", "machine", "versions", "commit", **more, "rows"}` as JSON, and make the folder.

    rows: what was measured, a mapping each; keys end in their unit where they have one (`step_ms`, `peak_mib`). `more`:
    what holds for all rows, such as the matrix rate of the same run. Call it again after each part, so that a run that
    is broken off loses little.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command(),
        "machine": describe_machine() | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "commit": commit(),
        **more,
        "rows": [dict(row) for row in rows],
    }
    write_json(path, content)


def read(path: str | Path) -> dict[str, Any]:
    """A result file. Raises UserError where it is none."""
    content = read_json(Path(path))
    missing = [key for key in NEEDED if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path}: no result of a benchmark, it has no {', '.join(missing)}")
    return content


def number(value: float) -> str:
    """As tables show it: four digits, or a whole number with commas from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def command() -> str:
    """What was typed, from the root of the checkout, as a shell reads it, and the environment that it was measured in."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    return threads + shlex.join(["python", str(name), *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Python, and the packages whose version changes what is measured."""
    return {"python": platform.python_version()} | package_versions(PACKAGES)


def commit() -> str:
    """The commit of the checkout, or "unknown". Code alone counts as a change to it: what one benchmark writes under docs/results
    is none to the next one.
    """
    return git_commit(ROOT, ("nar_t2i", "benchmarks", "recipes")) or "unknown"
