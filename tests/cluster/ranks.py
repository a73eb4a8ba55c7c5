"""Start a program on several ranks of this machine, as Slurm would."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.forks import ROOT, Process


@dataclass
class Ended:
    """How each rank ended, and what it said."""

    status: list[int]
    errors: list[str]


def start(ranks: int, arguments: list[str], folder: Path) -> list[Process]:
    """`python arguments` on each rank, in `folder`; output goes to rank-N.log there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, "DS_ACCELERATOR": "cpu"}  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in shared.items()}}
    return [
        Process(arguments, folder, {**environment, "LOCAL_RANK": str(rank)}, folder / f"rank-{rank}.log") for rank in range(ranks)
    ]


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
