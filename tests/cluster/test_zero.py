"""ZeRO's stages do what DDP does: the same updates, the same averages, whatever the ranks and the accumulation."""

import itertools

import pytest
import torch

from tests.cluster import ranks

STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
CLIPS = {"no clipping": "0", "clipping": "0.1"}


def updates(folder, count, settings):
    ended = ranks.run(count, ["-m", "tests.cluster.updates", "out.pt", *settings], folder)
    assert ended.status == [0] * count, ended.errors[0][-3000:]
    return torch.load(folder / "out.pt", weights_only=True)


def names(accumulations=(1, 2, 4), optimizers=("sgd", "adamw")):
    return [":".join(x) for x in itertools.product(STRATEGIES, map(str, accumulations), CLIPS.values(), optimizers)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    others = [f"{strategy}:1:0.1:adamw:{what}" for strategy in STRATEGIES for what in ("critic", "prefixes", "uvit")]
    return updates(tmp_path_factory.mktemp("two"), 2, names() + others)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return updates(tmp_path_factory.mktemp("one"), 1, names(accumulations=(1,)))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return updates(tmp_path_factory.mktemp("four"), 4, names(accumulations=(1,)))


def difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_updates_are_ddps(two_ranks, strategy, accumulation, clip, optimizer):
    expected = two_ranks[f"ddp:1:{CLIPS[clip]}:{optimizer}"]
    found = two_ranks[f"{strategy}:{accumulation}:{CLIPS[clip]}:{optimizer}"]
    assert difference(found["weights"], expected["weights"]) < 1e-5
    assert difference(found["applied"], expected["applied"]) < 1e-6
    # The control: averages are not the weights, and clipping matters.
    assert difference(found["applied"], found["weights"]) > 1e-4
    other = two_ranks[f"{strategy}:{accumulation}:{'0' if clip == 'clipping' else '0.1'}:{optimizer}"]
    assert optimizer == "adamw" or difference(found["weights"], other["weights"]) > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_a_critic_learns_as_under_ddp(two_ranks, strategy):
    """The generator that it asks is no part of what is divided."""
    expected, found = (two_ranks[f"{name}:1:0.1:adamw:critic"]["weights"] for name in ("ddp", strategy))
    assert not [name for name in found if name.startswith("learning")] and any("head" in name for name in found)
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("what, has", [("prefixes", "nearness"), ("uvit", "doubling")])
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_other_networks_are_trained_as_under_ddp(two_ranks, strategy, what, has):
    expected, found = (two_ranks[f"{name}:1:0.1:adamw:{what}"]["weights"] for name in ("ddp", strategy))
    assert any(has in name for name in found) and difference(found, expected) < 1e-5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_updates_are_the_same_on_any_number_of_ranks(two_ranks, one_rank, four_ranks, strategy, count, optimizer):
    """The global batch is the same, with the real masked loss, whose masked counts differ from image to image."""
    setting = f"{strategy}:1:0.1:{optimizer}"
    found = {1: one_rank, 4: four_ranks}[count][setting]
    assert difference(found["weights"], two_ranks[f"ddp:1:0.1:{optimizer}"]["weights"]) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_each_rank_averages_only_what_it_updates(two_ranks, strategy):
    found = two_ranks[f"{strategy}:1:0:adamw"]
    pieces = sum(value.numel() for value in found["averages"].values())
    whole = sum(value.numel() for value in found["weights"].values())
    assert 0.3 < pieces / whole < 0.7
    everything = two_ranks["ddp:1:0:adamw"]["averages"]
    assert sum(value.numel() for value in everything.values()) == whole
