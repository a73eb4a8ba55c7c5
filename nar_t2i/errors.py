"""The one exception that a user is meant to read, and those of the system that are no fault of the program."""

import errno
import os
from pathlib import Path

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
TERMINATED = 143  # after SIGTERM, as shells have it
REQUEUE = 85  # saved, and to be started again; slurm/train.sh does so

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (*_FULL, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def note_preempted() -> None:
    """Tell slurm/sweep.sh, which sees its agent's status alone, that this process leaves with REQUEUE."""
    if marker := os.environ.get("NAR_T2I_PREEMPTED"):
        Path(marker).touch()


def unwritable(error: OSError) -> str | None:
    """What to say where a disk is full or read-only, or a name leads nowhere; None where the program is at fault."""
    if error.errno not in _UNWRITABLE:
        return None
    name = error.filename2 or error.filename  # of two, the one that a file was to be renamed to
    what = f"{name}: {error.strerror}" if name else str(error.strerror)
    return f"{what}; the same command goes on where it can" if error.errno in _FULL else what


class UserError(Exception):
    """Bad input. The message says what was wrong, where (file, key, sample), and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
