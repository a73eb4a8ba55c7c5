"""The one exception that a user is meant to read, and those of the system that are no fault of the program."""

import errno

# Disks that are full or read-only, and names that lead nowhere.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
              errno.ENAMETOOLONG)  # fmt: skip


class UserError(Exception):
    """Bad input. The message says what was wrong, where (file, key, sample), and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
