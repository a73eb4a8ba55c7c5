"""A Python that has imported already what a rank needs, and becomes one as often as it is asked: importing takes longer than
most tests' training.

forks.py SOCKET; it listens there until its standard input ends. Asked by `Process`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Process:
    """`python -m module …` in a folder, with a log for what it says; as subprocess.Popen, as far as tests need it."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str], log: Path) -> None:
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_server())
        request = {"arguments": arguments, "folder": str(folder), "environment": environment, "log": str(log)}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._socket.makefile()
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self._answers.readline())
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _server() -> str:
    """The socket of this process's server, which is started."""
    path = os.path.join(tempfile.mkdtemp(), "socket")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.forks", path],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout.readline() == b"listening\n", "the server of ranks did not start"
    atexit.register(server.communicate)
    return path


def serve(path: str) -> list[str]:
    """Returns in each process that is to be a rank, with its arguments."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("listening", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            sys.exit()
        asked, _ = listener.accept()
        if os.fork() == 0:
            break
        asked.close()
    # The rank's parent, which waits for it and says how it ended.
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(asked.makefile().readline())
    pid = os.fork()
    if pid:
        asked.sendall(b"%d\n" % pid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(BrokenPipeError):  # where nobody wants to know
            asked.sendall(b"%d\n" % status)
        os._exit(0)
    asked.close()
    return become(**request)


def become(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> list[str]:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    nothing, said = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for source, target in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    return arguments


def prepare() -> None:
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import lightning.pytorch.cli  # noqa: F401

    import nar_t2i.training.command
    import nar_t2i.training.generator
    import nar_t2i.training.zero  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be copied"
    gc.freeze()


if __name__ == "__main__":
    prepare()
    line = serve(sys.argv[1])
    assert line[0] == "-m", line
    sys.argv = line[1:]
    runpy.run_module(line[1], run_name="__main__", alter_sys=True)
