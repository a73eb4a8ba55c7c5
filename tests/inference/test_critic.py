"""The critic: what it is taught, and what decoding makes of what it says."""

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.inference import BestOf, Confidence, CriticGuided, CriticScore
from nar_t2i.inference.critic_guided import differing_neighbours
from nar_t2i.learning import CriticOf
from nar_t2i.learning.terms import draw_masks
from nar_t2i.networks import CausalDecoder, EncoderDecoder, TokenCritic
from nar_t2i.networks.predictions import Bernoulli
from nar_t2i.noise import Noise
from nar_t2i.schedules import FixedRatio, Guidance
from nar_t2i.training import GeneratorModule
from nar_t2i.types import Known, TokenBatch, TokenNetwork, TokenSpec, TokenState
from tests.inference.test_confidence import SPEC, make_condition
from tests.inference.test_strategies import make_network, some_known
from tests.toys import ToyCodec, ToyMasked, ToyText

ANSWER = torch.randint(SPEC.size, (3, 16), generator=torch.Generator().manual_seed(5))


class Fickle(TokenNetwork):
    """Finds other tokens wrong each time."""

    spec = SPEC

    def __init__(self):
        super().__init__()
        self.calls = 0

    def prepare(self, condition):
        return None

    def forward(self, state, prepared, read=None, cache=None):
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        return Bernoulli(torch.randn(*state.values.shape, 1, generator=generator))


class Judge(TokenNetwork):
    """Knows the answer: is sure of each token whether it is right."""

    spec = SPEC

    def __init__(self):
        super().__init__()
        self.seen = []

    def prepare(self, condition):
        return None

    def forward(self, state, prepared, read=None, cache=None):
        assert not state.masked.any()
        self.seen.append(state.values)
        return Bernoulli(torch.where(state.values == ANSWER, -20.0, 20.0).unsqueeze(-1))


def decoded(strategy, known=None, rows=3):
    steps = []
    condition, null = make_condition(rows, torch.float64)
    noise = Noise(0, torch.arange(rows), torch.float64)
    found = strategy.decode(make_network(torch.float64), condition, null, noise, Guidance(2.0), known, steps.append)
    return found, steps


@pytest.mark.parametrize("persistent", [0.0, 0.5, 1.0])
def test_as_many_tokens_stay_as_the_schedule_says(persistent):
    judge = Judge()
    found, steps = decoded(CriticGuided(judge, steps=4, persistent=persistent))
    assert [int(step.masked.sum(1).unique()) for step in steps] == [12, 8, 4, 0]
    assert len(judge.seen) == 3 and found.passes == 4 + 3 and found.rows == 8 + 3


def test_right_tokens_stay_and_wrong_ones_are_revoked():
    judge = Judge()
    _, steps = decoded(CriticGuided(judge, steps=8))
    for values, step in zip(judge.seen, steps):
        right, kept = values == ANSWER, ~step.masked
        quota = kept.sum(1)
        enough = right.sum(1) >= quota
        # Where enough are right, none that is wrong stays; where too few are, all that are right do.
        assert not (kept & ~right)[enough].any() and not (right & ~kept)[~enough].any()
    stood = [~step.masked for step in steps]
    assert any((before & ~after).any() for before, after in zip(stood, stood[1:])), "nothing was ever revoked"


def test_persistent_tokens_are_not_revoked():
    def revoked(persistent):
        _, steps = decoded(CriticGuided(Fickle(), steps=8, persistent=persistent))
        return sum(int((~before.masked & after.masked).sum()) for before, after in zip(steps, steps[1:]))

    assert revoked(1.0) == 0 < revoked(0.5) < revoked(0.0)
    _, steps = decoded(CriticGuided(Fickle(), steps=8, persistent=1.0))
    for before, after in zip(steps, steps[1:]):
        assert torch.equal(before.tokens[~before.masked], after.tokens[~before.masked])


def test_what_was_protected_once_stays_to_the_end():
    """Also where its slot is no longer among those of least detail."""
    smooth = []

    class Recording(CriticGuided):
        def smooth(self, tokens, free, spec):
            smooth.append(super().smooth(tokens, free, spec))
            return smooth[-1]

    _, steps = decoded(Recording(Fickle(), steps=8, persistent=0.5))
    stood = [torch.zeros_like(steps[0].masked), *(~step.masked for step in steps)]
    left_again = 0
    for number, least in enumerate(smooth):
        protected = least & stood[number]
        assert not any((protected & step.masked).any() for step in steps[number:])
        left_again += sum(int((protected & ~later).sum()) for later in smooth[number + 1 :])
    assert left_again  # some of them did leave that share


@pytest.mark.parametrize("persistent", [0.0, 0.4, 1.0])
def test_known_tokens_stay_and_images_do_not_depend_on_the_batch(persistent):
    # As many in each row: Judge knows the rows of a whole batch.
    known = Known(
        (torch.arange(16) + torch.arange(3)[:, None]) % 4 == 0,
        torch.randint(SPEC.size, (3, 16), generator=torch.Generator().manual_seed(1)),
    )
    _, steps = decoded(CriticGuided(Judge(), steps=5, persistent=persistent, choice_temperature=1.0), known)
    assert all(torch.equal(step.tokens[known.mask], known.tokens[known.mask]) for step in steps)
    assert not any((step.masked & known.mask).any() for step in steps) and not steps[-1].masked.any()
    everything = Known(torch.ones(3, 16, dtype=torch.bool), known.tokens)
    assert torch.equal(decoded(CriticGuided(Judge()), everything)[0].tokens, known.tokens)

    torch.manual_seed(0)
    critic = TokenCritic(SPEC, (8,), width=16, depth=1, heads=2).double()
    torch.nn.init.normal_(critic.head.logits.weight)
    strategy, known = CriticGuided(critic, steps=5, persistent=persistent), some_known()
    together = decoded(strategy, known)[0].tokens
    condition, null = make_condition(3, torch.float64)
    for row in range(3):
        part = slice(row, row + 1)
        one = [c.map(lambda x, part=part: x[part]) for c in (condition, null)]
        given = Known(known.mask[part], known.tokens[part])
        alone = strategy.decode(
            make_network(torch.float64), *one, Noise(0, torch.tensor([row]), torch.float64), Guidance(2.0), given
        )
        assert torch.equal(alone.tokens[0], together[row])


def test_detail_is_the_share_of_neighbours_that_differ():
    grid = torch.tensor([[1, 1, 2], [1, 1, 2], [3, 3, 3]]).view(1, 9, 1)
    by_hand = [0, 1 / 3, 1 / 2, 1 / 3, 2 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 2]
    assert differing_neighbours(grid, (3, 3)).flatten().tolist() == pytest.approx(by_hand)
    assert differing_neighbours(torch.tensor([[1, 2, 2]]).unsqueeze(-1), (3,)).tolist() == [[1, 0.5, 0]]


def taught(**options):
    torch.manual_seed(0)
    generator = make_network(torch.float64)
    critic = TokenCritic(SPEC, (8,), width=16, depth=1, heads=2).double()
    tokens = torch.randint(SPEC.size, (200, 16), generator=torch.Generator().manual_seed(1))
    batch, noise = TokenBatch(tokens, make_condition(200, torch.float64)[0]), Noise(0, torch.arange(200), torch.float64)
    return CriticOf(generator, **options), critic, batch, noise


@pytest.mark.parametrize("redraw", ["hidden", "all"])
@pytest.mark.parametrize("label", ["drawn", "changed"])
def test_the_critic_is_asked_about_what_the_generator_drew(redraw, label):
    learning, critic, batch, noise = taught(redraw=redraw, label=label)
    terms = learning.loss(critic, batch, noise, 0.0)
    masked = draw_masks(noise, "linear", (4, 4))
    tokens = learning.drawn(batch, noise, masked)
    assert torch.equal(tokens[~masked], batch.tokens[~masked]) == (redraw == "hidden")
    assert (tokens != batch.tokens)[masked].double().mean() > 0.5
    wrong = masked if label == "drawn" else tokens != batch.tokens
    logits = critic(TokenState(tokens, torch.zeros_like(masked)), critic.prepare(batch.condition)).logits.squeeze(-1)
    by_hand = torch.nn.functional.binary_cross_entropy_with_logits(logits, wrong.double(), reduction="none").mean(1).sum()
    torch.testing.assert_close(terms["loss"].total, by_hand)
    terms["loss"].total.backward()
    assert all(p.grad is None for p in learning._generator[0].parameters())
    assert not list(learning.parameters()) and not learning.state_dict()


def test_the_critic_s_draws_and_masks_follow_its_settings():
    cold, critic, batch, noise = taught(temperature=0.0, schedule=FixedRatio(0.5))
    shown = []
    forward = critic.forward
    critic.forward = lambda state, *more, **given: shown.append(state.values) or forward(state, *more, **given)
    terms = cold.loss(critic, batch, noise, 0.0)
    masked = draw_masks(noise, FixedRatio(0.5), (4, 4))
    generator = cold._generator[0]
    likeliest = generator(TokenState(batch.tokens, masked), generator.prepare(batch.condition)).logits.argmax(-1)
    assert torch.equal(shown[0], batch.tokens.where(~masked, likeliest)) and (masked.sum(1) == 8).all()
    assert cold.passes > 1 and terms["loss"].weight == 200


def test_a_critic_learns_and_another_generators_tokens_are_refused():
    learning, critic, batch, _ = taught()
    even = batch._replace(tokens=(batch.tokens // 2) * 2 % 10)  # true tokens are even, so that odd ones give the generator away
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for step in range(80):
        terms = learning.loss(critic, even, Noise(step, torch.arange(200), torch.float64), 0.0)
        loss = terms["loss"].total / terms["loss"].weight
        if step == 0:
            first = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.85 * first and terms["critic_accuracy"].total / 200 > 0.6
    with pytest.raises(UserError, match="the critic reads"):
        learning.loss(
            TokenCritic(TokenSpec((4, 4), "categorical", 12), (8,), width=16, depth=1), even, Noise(0, torch.arange(200)), 0.0
        )


def test_a_critic_is_taught_on_what_its_generator_would_draw():
    causal = CausalDecoder(SPEC, (8,), width=16, depth=1, heads=2)
    with pytest.raises(UserError, match="sees only what stands before"):
        CriticOf(causal)

    def module(**how):
        made = ToyCodec(), ToyText(), lambda spec, widths: TokenCritic(spec, widths, width=16, depth=1, heads=2)
        return GeneratorModule(*made, CriticOf(ToyMasked(ToyCodec().spec, ToyText().widths)), **how)

    with pytest.raises(UserError, match="caption_dropout 0.1: a critic is never asked without a caption"):
        module()
    assert module(caption_dropout=0.0).network.judges


def test_a_critic_that_is_a_network_keeps_its_weights(tmp_path):
    """Changing the number of steps must not make it anew, and saving must not pretend to keep it."""
    from nar_t2i.parts import changed, describe

    critic = TokenCritic(SPEC, (8,), width=16, depth=1, heads=2)
    strategy = changed(CriticGuided(critic, steps=4), steps=7)
    assert strategy.critic is critic and strategy.steps == 7
    with pytest.raises(TypeError, match="name its folder"):
        describe(strategy)


@pytest.mark.parametrize(
    "strategy",
    [lambda critic: CriticGuided(critic, 4), lambda critic: BestOf(Confidence(2), 2, CriticScore(critic))],
    ids=["guided", "scored"],
)
def test_what_is_no_critic_of_these_tokens_is_refused(strategy):
    torch.manual_seed(0)
    with pytest.raises(UserError, match="name the model of a run with CriticOf"):
        decoded(strategy(EncoderDecoder(SPEC, (8,), width=16, depth=1, heads=2).double()))
    other = TokenCritic(TokenSpec((4, 4), "categorical", 12), (8,), width=16, depth=1, heads=2).double()
    with pytest.raises(UserError, match="the critic reads .*size=12.*, the generator draws .*size=11"):
        decoded(strategy(other))
    reader = TokenCritic(SPEC, (6,), width=16, depth=1, heads=2).double()
    with pytest.raises(
        UserError, match=r"reads text states of the widths \[6\], and is given such of \[8\]: it was trained beside another"
    ):
        decoded(strategy(reader))


def test_a_critic_is_a_folder_too(tmp_path):
    from nar_t2i.folders import save_part

    save_part(EncoderDecoder(SPEC, (8,), width=16, depth=1, heads=2), tmp_path / "generator/network")
    save_part(TokenCritic(SPEC, (8,), width=16, depth=1, heads=2), tmp_path / "critic/network")
    assert isinstance(CriticGuided(str(tmp_path / "critic")).critic, TokenCritic)
    assert isinstance(CriticOf(str(tmp_path / "generator"))._generator[0], EncoderDecoder)
    for wrong in ({"persistent": 1.5}, {"choice_temperature": -1.0}):
        with pytest.raises(UserError, match="CriticGuided"):
            CriticGuided(str(tmp_path / "critic"), **wrong)


def test_a_critic_draws_nothing_by_itself():
    condition, null = make_condition(2)
    with pytest.raises(UserError, match="TokenCritic judges tokens and draws none"):
        critic = TokenCritic(SPEC, [state.shape[-1] for state in condition.states], width=16, depth=1, heads=2)
        Confidence(2).decode(critic, condition, null, Noise(0, torch.arange(2)), Guidance(1.0))
