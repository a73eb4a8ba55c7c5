"""Start a program on several ranks of this machine, as Slurm would."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    """How each rank ended, and what it said."""

    status: list[int]
    errors: list[str]


def start(ranks: int, arguments: list[str], folder: Path) -> list[subprocess.Popen]:
    """`python arguments` on each rank, in `folder`; output goes to rank-N.log there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, "DS_ACCELERATOR": "cpu"}  # fmt: skip
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, **{name: str(value) for name, value in shared.items()}, "LOCAL_RANK": str(rank)}
        with open(folder / f"rank-{rank}.log", "a") as log:
            processes.append(
                subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=log)
            )
    return processes


def run(ranks: int, arguments: list[str], folder: Path, timeout: float = 150) -> Ended:
    """`start`, and wait."""
    for log in folder.glob("rank-*.log"):
        log.unlink()
    processes = start(ranks, arguments, folder)
    try:
        status = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Ended(status, [(folder / f"rank-{rank}.log").read_text() for rank in range(ranks)])
