"""The optimizer: which parameters are decayed, how the learning rate moves, and that `build` does both."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nar_t2i.errors import UserError
from nar_t2i.training.optim import OptimizerConfig, build, learning_rate, learning_rate_factor, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm((2, 4))  # two-dimensional weights, and still a norm
        self.position = nn.Parameter(torch.zeros(7, 4))
        self.position.no_decay = True
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight  # shared with the embedding


def names(model, group):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_groups_decay_matrices_only():
    model = Model()
    decayed, undecayed = parameter_groups(model, 0.1, learning_rate_scale=0.5)
    assert names(model, decayed) == {"conv.weight", "linear.weight"} and decayed["weight_decay"] == 0.1
    assert names(model, undecayed) == {"embedding.weight", "conv.bias", "linear.bias", "norm.weight", "norm.bias", "position"}
    assert undecayed["weight_decay"] == 0.0


def test_groups_of_several_modules_hold_each_parameter_once():
    model = Model()
    groups = parameter_groups([model.linear, model], 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in model.parameters())


def test_learning_rate():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="cosine", final_ratio=0.1)
    rates = [config.learning_rate * learning_rate_factor(step, 14, config) for step in range(14)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))
    assert rates[7] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 3 / 9)) / 2)
    constant = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert {learning_rate_factor(step, 10, constant) for step in range(10)} == {1.0}


def test_build_follows_the_schedule_in_every_group():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, clip_norm=0)
    main, text = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    groups = parameter_groups(main, 0.1) + parameter_groups(text, 0.0, learning_rate_scale=0.1)
    optimizer, scheduler = build(config, groups, total_steps=6)
    for step in range(6):
        rates = [group["lr"] for group in optimizer.param_groups]
        expected = learning_rate_factor(step, 6, config)
        assert rates == pytest.approx([expected, 0.1 * expected])
        main(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_that_goes_on_takes_the_rates_of_its_recipe(kind):
    def made(**changed):
        torch.manual_seed(0)
        net = nn.Linear(20, 20)
        return net, *build(
            OptimizerConfig(kind=kind, warmup_steps=2, clip_norm=0, **changed),
            parameter_groups(net, changed.get("weight_decay", 0.05)),
            12,
        )

    def stepped(net, optimizer, scheduler, steps):
        for _ in range(steps):
            net(torch.ones(1, 20)).square().sum().backward()
            optimizer.step(), scheduler.step(), optimizer.zero_grad()
        return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    whole = made(learning_rate=1e-2)
    stepped(*whole, 5)
    states = copy.deepcopy([part.state_dict() for part in whole])
    for changed in ({"learning_rate": 1e-2}, {"learning_rate": 1e-4, "weight_decay": 0.3, "beta2": 0.9}):
        again, asked = made(**changed), made(**changed)
        for part, state in zip(again, states):
            part.load_state_dict(copy.deepcopy(state))
        assert stepped(*again, 3) == stepped(*asked, 8)  # what such a run has after as many steps
        same = torch.equal(again[0].weight, stepped(*whole, 3) and whole[0].weight) if changed == {"learning_rate": 1e-2} else None
        assert same in (True, None)


def test_restored_counts_lie_where_the_update_looks_for_them():
    """Under ZeRO they are read on the host, and partitions take the place of the weights; meta stands for a GPU, to which no
    test can go.
    """
    partition = nn.Parameter(torch.zeros(8, device="meta"))
    optimizer, schedule = build(OptimizerConfig(fused=False), [{"params": [partition], "weight_decay": 0.0, "matrices": False}], 12)
    saved = copy.deepcopy(schedule.state_dict())
    schedule._asked[0]["fused"] = True  # as on a GPU
    optimizer.state[partition]["step"] = torch.tensor(7.0)
    schedule.load_state_dict(saved)
    assert optimizer.state[partition]["step"].device == partition.device
    plain = nn.Parameter(torch.zeros(8))
    optimizer, schedule = build(OptimizerConfig(fused=False), [{"params": [plain], "weight_decay": 0.0, "matrices": False}], 12)
    optimizer.state[plain]["step"] = torch.tensor(7)
    schedule.load_state_dict(saved)
    assert torch.equal(optimizer.state[plain]["step"], torch.tensor(7.0))


def test_fused_and_plain_agree_and_are_adamw():
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, warmup_steps=0, schedule="constant", fused=fused)
        optimizer, _ = build(config, parameter_groups(layer, 0.1), 3)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        results.append(layer.weight.detach())
    assert torch.allclose(*results, atol=1e-6)


def test_build_uses_the_fused_kernel_by_default():
    optimizer, _ = build(OptimizerConfig(), parameter_groups(nn.Linear(2, 2), 0.1), 3)
    assert optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_update_is_that_of_torch_s_adamw_of_the_same_settings(kind):
    settings = dict(learning_rate=0.05, beta1=0.8, beta2=0.7, eps=0.1, weight_decay=0.3)
    ours, theirs = (nn.Parameter(torch.tensor([0.5, -2.0, 3.0])) for _ in range(2))
    config = OptimizerConfig(kind=kind, warmup_steps=0, schedule="constant", **settings)
    optimizer, _ = build(config, [{"params": [ours], "weight_decay": config.weight_decay, "matrices": False}], 4)
    plain = torch.optim.AdamW([theirs], lr=0.05, betas=(0.8, 0.7), eps=0.1, weight_decay=0.3)
    for step in range(4):
        for p, update in ((ours, optimizer), (theirs, plain)):
            p.grad = torch.tensor([1.0, -0.2, 0.01]) * (step + 1)
            update.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("key", "value"), [
    ("learning_rate", -1e-3), ("weight_decay", -0.1), ("warmup_steps", -5), ("clip_norm", -1.0), ("beta1", 1.0), ("beta2", -0.1),
    ("final_ratio", 2.0), ("eps", 0.0), ("clip_norm", float("nan")),
])  # fmt: skip
def test_settings_out_of_range_are_named(key, value):
    """A negative clip_norm would turn gradients round."""
    with pytest.raises(UserError, match=f"optimizer: {key} must be"):
        OptimizerConfig(**{key: value})


def test_the_rate_that_is_told_is_the_keys_and_not_muons():
    muon, first, second = {"muon": True, "lr": 0.05}, {"lr": 0.01}, {"lr": 0.001}
    for groups, expected in (([muon, first, second], 0.01), ([first, second], 0.01), ([muon], 0.05)):
        assert learning_rate(SimpleNamespace(param_groups=groups)) == expected
