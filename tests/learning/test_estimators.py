"""How sure an estimate is that hides k of four tokens (arXiv 2407.21046): the spins of tests/inference/test_distributions.py,
whose coupling is to be learned. Variances are asymptotic, for one sample: of n, they are n times smaller."""

import itertools

import pytest
import torch

from nar_t2i.learning import Masked
from nar_t2i.networks.predictions import Categorical
from nar_t2i.networks.tokens import select
from nar_t2i.noise import Noise
from nar_t2i.schedules import FixedRatio
from nar_t2i.types import Condition, TokenBatch, TokenNetwork
from tests.inference.test_distributions import COUPLING, ENERGY, STATES, TRUTH, Spins

DRAWS = 40_000


def variance_of_joint_blocks(block):
    """Of the estimate that makes Σ log p(block | rest) largest, over all blocks: the inverse of its information."""
    blocks = list(itertools.combinations(range(4), block))
    information = torch.zeros((), dtype=torch.float64)
    for chosen in blocks:
        rest = [i for i in range(4) if i not in chosen]
        for probability, state in zip(TRUTH, STATES):
            given = TRUTH * (STATES[:, rest] == state[rest]).all(-1)
            given = given / given.sum()
            information += probability * ((given * ENERGY**2).sum() - (given * ENERGY).sum() ** 2) / len(blocks)
    return 1 / float(information)


class Learner(TokenNetwork):
    """Spins of a coupling that is a parameter, one for each row, so that each sample has a gradient of its own."""

    spec = Spins.spec

    def __init__(self):
        super().__init__()
        self.coupling = torch.nn.Parameter(torch.full((DRAWS, 1), COUPLING, dtype=torch.float64))

    def prepare(self, condition):
        return None

    def forward(self, state, prepared, read=None, cache=None):
        agrees = ((STATES[None] == state.values[:, None]) | state.masked[:, None]).all(-1)
        weights = torch.softmax(self.coupling * ENERGY, dim=1) * agrees
        up = (weights @ STATES.double()) / weights.sum(1, keepdim=True)
        return Categorical(select(torch.stack([1 - up, up], dim=-1), read).log())


def variance_of_masked_training(block):
    """Of the coupling that the real loss has its minimum at: E[g²] / E[h]², of the loss's derivatives for each sample."""
    drawn = torch.multinomial(TRUTH, DRAWS, True, generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(STATES[drawn], Condition((), ()))
    network = Learner()
    total = Masked(FixedRatio(block / 4)).loss(network, batch, Noise(0, torch.arange(DRAWS), torch.float64), 1.0)["loss"].total
    (first,) = torch.autograd.grad(total, network.coupling, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), network.coupling)
    assert abs(first.mean()) < 4 * first.std() / DRAWS**0.5  # unbiased: the truth is where the loss is smallest
    return float(first.square().mean() / second.mean() ** 2)


def test_larger_blocks_tell_more():
    joint = [variance_of_joint_blocks(block) for block in (1, 2, 3, 4)]
    assert joint == pytest.approx([0.4458, 0.1922, 0.1047, 0.1047], abs=1e-4)
    # Wholly hidden, it is maximum likelihood, than which nothing is surer; one spin alone says nothing of the coupling.
    likelihood = 1 / float((TRUTH * ENERGY**2).sum() - (TRUTH * ENERGY).sum() ** 2)
    assert joint[3] == pytest.approx(likelihood) and joint[0] > joint[1] > joint[2] > likelihood - 1e-9
    # A network gives the marginals of a block: for one token that is the same, for more it tells less.
    masked = [variance_of_masked_training(block) for block in (1, 2, 3)]
    assert masked == pytest.approx([0.4458, 0.2072, 0.1368], rel=0.04)
    assert masked[1] > joint[1] and masked[2] > joint[2]
