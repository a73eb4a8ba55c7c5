"""Muon: steps with a flat spectrum; the other half is torch's AdamW, bit for bit; both go on from a checkpoint."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nar_t2i.training.muon import MuonWithAdamW, orthogonalised
from nar_t2i.training.optim import OptimizerConfig, build, parameter_groups


def spectrum(rows, columns, condition=5.0, seed=0):
    """A random matrix whose singular values fall evenly from 1 to 1 / condition, and the nearest one of ones, U Vᵀ."""
    torch.manual_seed(seed)
    u, values, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return u @ torch.diag(torch.linspace(1, 1 / condition, len(values))) @ v, u @ v


@pytest.mark.parametrize("shape", [(24, 24), (20, 64), (17, 200)])
def test_singular_values_end_near_one(shape):
    matrix, nearest = spectrum(*shape)
    flat = orthogonalised(matrix[None])[0]
    after = torch.linalg.svdvals(flat)
    assert 0.6 < after.min() and after.max() < 1.3
    assert torch.nn.functional.cosine_similarity(flat.flatten(), nearest.flatten(), dim=0) > 0.97


def test_matrices_do_not_disturb_each_other():
    matrices = torch.stack([spectrum(20, 30, seed=seed)[0] * 10.0**seed for seed in range(3)])
    together = orthogonalised(matrices)
    for matrix, flat in zip(matrices, together):
        torch.testing.assert_close(orthogonalised(matrix[None])[0], flat, rtol=0.02, atol=0.01)


def test_the_length_of_a_gradient_does_not_matter():
    matrix = spectrum(20, 30)[0][None]
    torch.testing.assert_close(orthogonalised(1e-3 * matrix), orthogonalised(matrix), rtol=0.05, atol=0.02)
    assert torch.equal(orthogonalised(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def muon(*parameters, **kwargs):
    return MuonWithAdamW([{"params": list(parameters), "muon": True, "lr": 0.1, **kwargs}])


def test_tall_and_wide_matrices_step_alike():
    matrix, nearest = spectrum(40, 20)
    tall, wide, other = (nn.Parameter(torch.zeros(s)) for s in ((40, 20), (20, 40), (20, 40)))
    tall.grad, wide.grad, other.grad = matrix, matrix.T.contiguous(), spectrum(20, 40, seed=1)[0]
    muon(tall, wide, other).step()
    torch.testing.assert_close(tall.detach(), wide.detach().T)
    expected = -0.1 * 0.2 * 40**0.5 * nearest
    assert torch.nn.functional.cosine_similarity(tall.flatten(), expected.flatten(), dim=0) > 0.97
    assert tall.detach().norm() == pytest.approx(float(expected.norm()), rel=0.2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(32, 4, 3, 3), (8, 20, 3, 3)])
def test_convolutions_are_matrices_of_their_outputs(shape, channels_last):
    torch.manual_seed(0)
    start, gradient = torch.randn(shape), torch.randn(shape)
    conv, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    if channels_last:
        conv.data = conv.data.to(memory_format=torch.channels_last)
    optimizers = muon(conv), muon(matrix)
    for step in range(3):
        g = gradient + step * torch.roll(gradient, step)
        conv.grad, matrix.grad = g.clone(memory_format=torch.preserve_format), g.flatten(1)
        if channels_last:
            conv.grad = g.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(conv.detach().flatten(1), matrix.detach(), rtol=1e-3, atol=1e-3)
    assert (matrix.detach() - start.flatten(1)).abs().max() > 0.01
    one = nn.Parameter(start.clone())
    one.grad = gradient
    muon(one).step()
    step = (one.detach() - start).flatten(1) / -0.1
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
    assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.15)  # as large as AdamW's usually is


def test_momentum_is_nesterovs():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(20, 30))
    optimizer, average, expected = muon(p, momentum=0.9), torch.zeros(20, 30), torch.zeros(20, 30)
    for _ in range(4):
        p.grad = torch.randn(20, 30)
        average = 0.9 * average + 0.1 * p.grad
        expected -= 0.1 * 0.2 * 30**0.5 * orthogonalised((0.1 * p.grad + 0.9 * average)[None])[0]
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-2, atol=1e-2)


def test_weight_decay_is_decoupled():
    p, plain = (nn.Parameter(torch.ones(20, 20)) for _ in range(2))
    for q, decay in ((p, 0.5), (plain, 0.0)):
        q.grad = torch.eye(20)
        muon(q, weight_decay=decay).step()
    torch.testing.assert_close(plain.detach() - p.detach(), torch.full((20, 20), 0.1 * 0.5))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3)
        self.wide = nn.Conv2d(20, 24, 3)
        self.norm = nn.GroupNorm(4, 24)
        self.linear = nn.Linear(24, 20)
        self.head = nn.Linear(20, 2)

    def forward(self, x):
        return self.head(self.linear(self.norm(self.wide(self.conv(x))).mean((2, 3))))


def descend(net, optimizer, scheduler, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def made(kind="muon"):
    torch.manual_seed(0)
    net = Net()
    config = OptimizerConfig(kind, 1e-2, muon_learning_rate=2e-2, warmup_steps=2, weight_decay=0.1)
    return net, *build(config, parameter_groups(net, 0.1), 12)


def test_adamws_half_is_torchs():
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    groups = [parameter_groups(net, 0.1) for net in (ours, theirs)]
    a = MuonWithAdamW([{**group, "lr": 1e-2} for group in groups[0]], betas=(0.8, 0.95), eps=1e-6)
    b = torch.optim.AdamW([{**group, "lr": 1e-2} for group in groups[1]], betas=(0.8, 0.95), eps=1e-6, fused=True)
    for net, optimizer in ((ours, a), (theirs, b)):
        descend(net, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step)), 6)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_which_parameters_are_muons():
    net, optimizer, _ = made()
    by_id = {id(p): name for name, p in net.named_parameters()}
    muons = {by_id[id(p)] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert muons == {"conv.weight", "wide.weight", "linear.weight"}  # the head has two rows only
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(by_id)


def test_the_schedule_moves_both_halves():
    net, optimizer, scheduler = made()
    rates = []
    for step in range(12):
        rates.append({group["muon"]: group["lr"] for group in optimizer.param_groups})
        descend(net, optimizer, scheduler, 1, step)
    assert all(rate[True] == pytest.approx(2 * rate[False]) for rate in rates)
    assert rates[0][False] == pytest.approx(5e-3) and rates[2][False] == pytest.approx(1e-2)
    assert rates[-1][False] == pytest.approx(0, abs=1e-9)


def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    whole = made()
    descend(*whole, 8)
    half = made()
    descend(*half, 4)
    torch.save([part.state_dict() for part in half], tmp_path / "half.pt")
    resumed = made()
    for part, state in zip(resumed, torch.load(tmp_path / "half.pt", weights_only=True)):
        part.load_state_dict(state)
    descend(*resumed, 4, first=4)
    assert all(torch.equal(v, resumed[0].state_dict()[k]) for k, v in whole[0].state_dict().items())


def test_restored_step_counts_lie_beside_the_weights():
    """torch leaves them where the checkpoint had them, unless the group is marked: fused AdamW on a GPU then fails."""
    net, optimizer, scheduler = made()
    descend(net, optimizer, scheduler, 1)
    state = copy.deepcopy(optimizer.state_dict())
    elsewhere = copy.deepcopy(net).to("meta")
    config = OptimizerConfig("muon", 1e-2, muon_learning_rate=2e-2, warmup_steps=2, weight_decay=0.1)
    other, _ = build(config, parameter_groups(elsewhere, 0.1), 12)
    other.load_state_dict(state)
    steps = [value["step"] for value in other.state.values() if "step" in value]
    assert steps and all(step.device.type == "meta" and step.dtype == torch.float32 for step in steps)


def test_parameters_without_a_gradient_are_left_alone():
    net, optimizer, _ = made()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not optimizer.state
