"""Several processes of one command, each with its share of the work: started by torchrun or by srun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from nar_t2i.errors import UserError, unwritable

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # ranks that are done wait for those that draw, and for the one that computes


class Ranks(NamedTuple):
    """This process and the others. rank: from 0. local_rank: among those of its node."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """A GPU of its own, where there are as many."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank, once all are done with theirs. A UserError of one rank is raised on all, and so is a
        file that cannot be written or read, as one."""
        result, problem = None, None
        try:
            result = work()
        except UserError as error:
            problem = error
        except OSError as error:
            problem = UserError(unwritable(error) or f"{error.filename or 'a file'}: {error.strerror or error}")
        if self.world > 1:
            problems: list[Any] = [None] * self.world
            dist.all_gather_object(problems, problem and str(problem))
            told = next((text for text in problems if text is not None), None)
            problem = problem or (UserError(told) if told is not None else None)
        if problem is not None:
            raise problem
        return result

    def agreed(self, value: T) -> T:
        """Rank 0's value, on all."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def on_first(self, work: Callable[[], Any]) -> None:
        """`work` on rank 0, while the others wait."""
        self.together(work if self.first else lambda: None)


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks that this process is one of; gloo binds them, since nothing but texts goes between them.

    torchrun says by RANK and WORLD_SIZE who is who. srun says it by SLURM_PROCID; SLURM_STEP_NUM_TASKS is set in its steps
    alone, so that a command in a batch script, without srun, is one process. Raises UserError where these do not fit.
    """
    found = _found(os.environ)
    if found.world == 1:
        yield found
        return
    address, port = _meeting_point(os.environ)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:{port}", rank=found.rank, world_size=found.world, timeout=PATIENCE
    )
    try:
        yield found
    finally:
        dist.destroy_process_group()


def _found(environment: Mapping[str, str]) -> Ranks:
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if environment.get(names[0]) is None or environment.get(names[1]) is None:
            continue
        try:
            found = Ranks(*(int(environment.get(name, 0)) for name in names))
        except ValueError:
            raise UserError(f"environment: {', '.join(names)} must be whole numbers") from None
        if not 0 <= found.rank < found.world:
            raise UserError(f"environment: {names[0]} {found.rank} is none of {names[1]} {found.world}")
        return found
    return Ranks()


def _meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    from lightning.pytorch.plugins.environments import SLURMEnvironment  # which reads Slurm's lists of nodes

    slurm = SLURMEnvironment(auto_requeue=False)
    return slurm.main_address, slurm.main_port
