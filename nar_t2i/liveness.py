"""Work that takes long before training begins says here that it goes on, so that the watch over stalls does not end it."""

from __future__ import annotations

import os
from collections.abc import Callable

_listeners: list[Callable[[], None]] = []
_process = 0  # that listens; one that was forked from it has nobody to tell


def listen(listener: Callable[[], None]) -> None:
    """Call it from now on whenever something goes on."""
    global _process
    _process = os.getpid()
    _listeners.append(listener)


def stop_listening(listener: Callable[[], None]) -> None:
    if listener in _listeners:
        _listeners.remove(listener)


def going_on() -> None:
    """Say that this process is at work."""
    for listener in _listeners if os.getpid() == _process else ():
        listener()
