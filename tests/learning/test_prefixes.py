"""Learning from prefixes: the mean over all questions, of which a step asks some of each stage."""

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.learning import Causal, CriticOf, Masked, Prefixes
from nar_t2i.networks import CausalDecoder, EncoderDecoder, PrefixDecoder, TokenCritic
from nar_t2i.noise import Noise
from nar_t2i.training import GeneratorModule
from nar_t2i.types import TokenBatch
from tests.inference.test_confidence import make_condition
from tests.networks.test_prefix import make_network, tokens_of, whole
from tests.toys import ToyCodec, ToyMasked, ToyText


def lost(strategy, network, progress=0.5, rows=2, seed=0):
    batch = TokenBatch(tokens_of(rows), make_condition(rows, torch.float64)[0])
    term = strategy.loss(network, batch, Noise(seed, torch.arange(rows), torch.float64), progress)["loss"]
    return (term.total / term.weight).item()


def test_the_loss_is_the_mean_over_all_questions():
    """With stages of one slot these are the tokens, each given those before it."""
    network, tokens = make_network(stages=[1] * 5), tokens_of()
    nll = torch.nn.functional.cross_entropy(whole(network, tokens).flatten(0, 1), tokens.flatten())
    assert lost(Prefixes(16), network) == pytest.approx(nll.item(), rel=1e-9)
    assert lost(Prefixes(16), make_network(stages=[1, 1, 3])) != pytest.approx(nll.item(), rel=1e-3)


def test_some_of_a_stage_stand_for_all_of_it():
    network = make_network()
    everything, parts = lost(Prefixes(16), network), [lost(Prefixes(3), network, step / 400) for step in range(400)]
    mean, spread = torch.tensor(parts).mean(), torch.tensor(parts).std()
    assert spread > 0.01 and abs(mean - everything) < 4 * spread / 20
    assert lost(Prefixes(3), network, 0.25) == lost(Prefixes(3), network, 0.25) != lost(Prefixes(3), network, 0.25, seed=1)


def test_validation_asks_about_all():
    assert lost(Prefixes(3).eval(), make_network()) == lost(Prefixes(16), make_network())


def test_asking_about_none_is_refused():
    with pytest.raises(UserError, match="most 0"):
        Prefixes(0)


def test_a_last_stage_of_one_slot_is_asked_about():
    network = make_network(stages=[15])
    assert lost(Prefixes(14), network) == lost(Prefixes(16), network)


@pytest.mark.parametrize(
    ("network", "learning"),
    [
        (PrefixDecoder, Masked()),
        (CausalDecoder, Masked()),
        (EncoderDecoder, Causal()),
        (EncoderDecoder, Prefixes()),
        (TokenCritic, Masked()),
        (EncoderDecoder, CriticOf(ToyMasked(ToyCodec().spec, ToyText().widths))),
    ],
)
def test_what_does_not_teach_a_network_is_refused_before_training(network, learning):
    """Masked training of a causal network would show it what it should foretell."""

    def make(learning):
        return GeneratorModule(
            ToyCodec(), ToyText(), lambda spec, widths: network(spec, widths, width=16, depth=1, heads=2), learning
        )

    with pytest.raises(UserError, match=f"{type(learning).__name__} does not teach {network.__name__}"):
        make(learning)
    if network is not TokenCritic:
        assert make(Causal() if network.causal else Masked()).learning.causal == network.causal


def test_a_causal_network_without_stages_is_refused():
    network = CausalDecoder(make_network().spec, (8,), width=16, depth=1, heads=2).double()
    with pytest.raises(UserError, match="CausalDecoder has no order in stages"):
        lost(Prefixes(), network)
