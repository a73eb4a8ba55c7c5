"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import resource
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nar_t2i.errors import UserError

MOST_FILES = 1 << 16  # that a process asks to hold open


def allow_open_files() -> None:
    """Let this process, and those that it starts, hold as many files open as the system lets them, up to MOST_FILES: a shard
    with its index and caches takes several, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def read_json(path: Path) -> Any:
    """Raises UserError where there is no such file, and where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def file_to_write(option: str, name: str, kind: str) -> Path:
    """Where a JSON of a kind, which it says of itself under "kind", is to be written. UserError where that is a folder, or a
    file of anything else, which would be lost."""
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file, such as {path / 'scores.json'}")
    if path.is_file() and path.stat().st_size:
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("kind") != kind:
            raise UserError(f"{option} {path}: is a file of something else, and would be lost; name another")
    return path


def write_json(path: Path, value: Any) -> None:
    """Texts stay readable; names of files that are no UTF-8 are escaped."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_new(path: Path, value: Any) -> bool:
    """As `write_json`, where there is no such file yet; whether this process wrote it, of all that try at once."""
    whole = path.with_name(f".{path.name}.{socket.gethostname()}.{_writer()}.new")
    write_json(whole, value)
    try:
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if path.exists():
            return False
        os.replace(whole, path)  # a file system without links, on which two that try at once may both have written it
    finally:
        whole.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


@contextmanager
def whole_file(path: Path, work: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file under a temporary name and rename it once it is complete and on disk.

    Two writers of the same file, on whichever nodes, do not mix their bytes; the last one's stand. work: a folder of the same
    file system for the temporary file, where the file's own may hold no other.
    """
    with whole_path(path, work) as temporary, open(temporary, "wb") as file:
        yield file


@contextmanager
def whole_path(path: Path, work: Path | None = None) -> Iterator[Path]:
    """As `whole_file`, for writers that open their file by its name."""
    temporary = temporary_name(path) if work is None else work / f"{socket.gethostname()}.{_writer()}.part"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole_file`, for a folder, which must not be there yet, or be empty: make the one that this gives."""
    beside = path.with_name(f"{path.name}.{socket.gethostname()}.{_writer()}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other thread of a running process takes. What killed processes of this node left there is
    deleted."""
    node = socket.gethostname()
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(node)}.*.tmp"):
        process = left.suffixes[-2][1:].partition("-")[0]
        if not Path("/proc", process).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{node}.{_writer()}.tmp")


def _writer() -> str:
    return f"{os.getpid()}-{threading.get_ident()}"


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(handle)
