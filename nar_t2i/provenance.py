"""What a result comes from, besides its configuration and the machine (see `nar_t2i.hardware`): packages, and the commit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit(root: Path, paths: Sequence[str] = ()) -> str | None:
    """The commit of a checkout, with "+changes" where tracked files differ from it; None outside of one. paths: of the files that
    count; none: all.
    """
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "-uno", "--", *paths]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+changes" * bool(changed)
