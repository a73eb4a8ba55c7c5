"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


MOST_FILES = 1 << 16  # that a process asks to hold open


def allow_open_files() -> None:
    """Let this process, and those that it starts, hold as many files open as the system lets them, up to MOST_FILES: a shard
    with its index and caches takes several, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name and rename it once it is complete and on disk.

    Two processes that write the same file, on whichever nodes, do not mix their bytes; the last one's stand.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other running process takes. What killed ones of this node left there is deleted."""
    node = socket.gethostname()
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(node)}.*.tmp"):
        if not Path("/proc", left.suffixes[-2][1:]).exists() and Path("/proc/self").exists():
            left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{node}.{os.getpid()}.tmp")


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
