"""Who is which rank: what torchrun and srun say, and what a command without them is. Several for real: tests/cluster."""

import pytest

from nar_t2i.errors import UserError
from nar_t2i.evaluation.ranks import Ranks, _found, ranks


@pytest.mark.parametrize("environment, expected", [
    ({}, Ranks(0, 1, 0)),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Ranks(3, 8, 1)),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}, Ranks(1, 2, 0)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, Ranks(0, 1, 0)),  # a batch script, without srun: nobody else would come
    ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Ranks(1, 2, 0)),  # torchrun in a step
])  # fmt: skip
def test_what_starts_a_process_says_who_it_is(environment, expected):
    assert _found(environment) == expected


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}])
def test_what_does_not_fit_is_said(environment):
    with pytest.raises(UserError, match="environment: .*RANK"):
        _found(environment)


def test_alone_everything_happens_here(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with ranks() as group:
        assert group.first and group.together(lambda: 3) == 3 and group.agreed("x") == "x"
        with pytest.raises(UserError, match="mine"):
            group.together(lambda: (_ for _ in ()).throw(UserError("mine")))
