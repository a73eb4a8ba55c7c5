"""The largest file that this process may write, which stands for a disk that is full."""

import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size: int):
    """In bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
