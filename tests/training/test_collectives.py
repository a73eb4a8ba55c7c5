"""What the first rank does for all: its own error is told, whatever becomes of the others."""

from types import SimpleNamespace

import pytest

from nar_t2i.errors import UserError
from nar_t2i.training import collectives, command


def full():
    raise OSError(28, "No space left on device")


def test_what_the_first_rank_does_is_done_and_its_error_is_its_own():
    done = []
    collectives.on_first(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(OSError, match="No space left"):
        collectives.on_first(full)


@pytest.mark.parametrize(("rank", "raised"), [(0, OSError), (1, UserError)])
def test_all_hear_of_it(monkeypatch, rank, raised):
    monkeypatch.setattr(collectives, "distributed", lambda: True)
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(collectives, "gather", lambda told: ["the first rank: OSError(28, 'No space left on device')", None])
    with pytest.raises(raised, match="No space left on device"):
        collectives.on_first(full)


def test_its_error_is_told_where_another_rank_has_died(monkeypatch):
    def gone(told):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(collectives, "gather", gone)
    with pytest.raises(OSError, match="No space left"):
        collectives.on_first(full)
    with pytest.raises(RuntimeError, match="Connection closed"):
        collectives.on_first(lambda: None)


def test_ranks_that_torch_has_started_are_left_to_it():
    launcher = SimpleNamespace(procs=[object()])  # of processes that have no way to be waited for
    command._end_other_ranks(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    assert len(launcher.procs) == 1
