"""Four spins on a complete graph, whose conditionals are all known: which strategies draw from their distribution, and how
far off the others are."""

import itertools

import pytest
import torch

from nar_t2i.inference import Confidence, EntropyBounded, GibbsSweeps, Halton, Moment, OneStep, Purity, RandomOrder
from nar_t2i.networks.predictions import Categorical
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import Condition, TokenNetwork, TokenSpec

COUPLING = 0.4
STATES = torch.tensor(list(itertools.product((0, 1), repeat=4)))
_SIGNS = (2 * STATES - 1).double()
ENERGY = torch.stack([sum(s[i] * s[j] for i, j in itertools.combinations(range(4), 2)) for s in _SIGNS])
TRUTH = torch.softmax(COUPLING * ENERGY, dim=0)  # (16,)
DRAWS = 40_000


class Spins(TokenNetwork):
    """Knows the probability of each spin given those in sight."""

    spec = TokenSpec((2, 2), "categorical", 2)

    def prepare(self, condition):
        return None

    def forward(self, state, prepared, read=None, cache=None):
        agrees = (STATES[None] == state.values[:, None]) | state.masked[:, None]
        weights = TRUTH * agrees.all(-1)  # (B, 16)
        up = (weights @ STATES.double()) / weights.sum(1, keepdim=True)
        logits = torch.stack([1 - up, up], dim=-1).clamp(min=1e-300).log()
        return Categorical(logits if read is None else logits.gather(1, read[..., None].expand(-1, -1, 2)))


def distribution(strategy, draws=DRAWS):
    """(16,) shares of the states."""
    none = Condition((torch.zeros(draws, 1, 1),), (torch.ones(draws, 1, dtype=torch.bool),))
    found = strategy.decode(Spins(), none, none, Noise(0, torch.arange(draws), torch.float64), Guidance(1.0))
    return torch.bincount(found.tokens @ torch.tensor([8, 4, 2, 1]), minlength=16).double() / draws


def chi_squared(shares, truth=TRUTH, draws=DRAWS):
    return float((draws * (shares - truth).square() / truth).sum())


def off_by(shares, truth=TRUTH):
    """Total variation."""
    return float((shares - truth).abs().sum() / 2)


LIMIT = 45.0  # 15 degrees of freedom: exceeded by chance once in ten thousand times


@pytest.mark.parametrize("strategy", [
    RandomOrder(4, "linear"), Halton(4, "linear"), EntropyBounded(0.0), GibbsSweeps(RandomOrder(4, "linear"), sweeps=2, block=1),
], ids=lambda strategy: type(strategy).__name__)  # fmt: skip
def test_one_token_a_pass_whatever_it_holds_draws_from_the_distribution(strategy):
    """By the chain rule, where the order does not depend on what is drawn; Gibbs sampling leaves the distribution as it is."""
    assert chi_squared(distribution(strategy)) < LIMIT


MEASURED = [
    (OneStep(temperature=1.0), 0.548), (RandomOrder(2, "linear"), 0.275), (Halton(2, "linear"), 0.321),
    (Confidence(4, "linear", choice_temperature=0.0), 0.239), (Confidence(2, "linear", choice_temperature=4.5), 0.275),
    (Purity(2, sharpness=0.0), 0.275), (Purity(4, sharpness=1.0), 0.243), (Moment(4, "linear"), 0.203),
    (GibbsSweeps(RandomOrder(4, "linear"), block=4), 0.548),
]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "error"), MEASURED, ids=lambda value: type(value).__name__ if not isinstance(value, float) else str(value)
)
def test_how_far_off_the_others_are(strategy, error):
    """Tokens of one pass are drawn apart; a slot that is chosen by what was drawn for it is not that draw any more, even one
    a pass; and sharper draws are other draws. Total variation, as measured here."""
    shares = distribution(strategy)
    assert off_by(shares) == pytest.approx(error, abs=0.01)
    assert chi_squared(shares) > 20 * LIMIT


# ---- k-Gibbs: blocks drawn jointly, and blocks drawn as a product of marginals -------------------------------------


def kernel(block: int, joint: bool):
    """(16, 16) transition probabilities: a block of `block` spins, chosen at random, is drawn given the others."""
    blocks = list(itertools.combinations(range(4), block))
    matrix = torch.zeros(16, 16, dtype=torch.float64)
    for chosen in blocks:
        rest = [i for i in range(4) if i not in chosen]
        for row, state in enumerate(STATES):
            given = (STATES[:, rest] == state[rest]).all(-1)
            conditional = TRUTH * given / (TRUTH * given).sum()
            if not joint:
                up = conditional @ STATES.double()
                marginals = torch.where(STATES == 1, up, 1 - up)[:, list(chosen)].prod(-1)
                conditional = marginals * given
            matrix[row] += conditional / len(blocks)
    return matrix


def stationary(matrix):
    state = torch.full((16,), 1 / 16, dtype=torch.float64)
    return state @ torch.linalg.matrix_power(matrix, 4096)


@pytest.mark.parametrize(("block", "gap", "error"), [(1, 0.038, 0.0), (2, 0.108, 0.036), (3, 0.266, 0.121), (4, 1.0, 0.548)])
def test_joint_blocks_are_exact_and_products_are_not(block, gap, error):
    joint, product = kernel(block, joint=True), kernel(block, joint=False)
    torch.testing.assert_close(stationary(joint), TRUTH, atol=1e-9, rtol=0)
    assert off_by(stationary(product)) == pytest.approx(error, abs=5e-4)
    values = torch.linalg.eigvals(joint).abs().sort(descending=True).values
    assert 1 - values[1].item() == pytest.approx(gap, abs=5e-4)


def test_larger_blocks_are_further_off():
    errors = [off_by(distribution(GibbsSweeps(RandomOrder(4, "linear"), sweeps=8, block=block))) for block in (1, 2, 4)]
    assert errors[0] < 0.02 < errors[1] < errors[2]
