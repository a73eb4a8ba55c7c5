"""The causal decoder: no slot sees its own token or a later one, and a cache changes nothing."""

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.inference import Autoregressive
from nar_t2i.learning import Causal
from nar_t2i.networks import CausalDecoder, EncoderDecoder
from nar_t2i.networks.attention import StaticCache
from nar_t2i.networks.causal import CausalGridConvolution
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.types import Known, TokenBatch, TokenSpec, TokenState
from tests.inference.test_confidence import make_condition

SPEC = TokenSpec((3, 4), "categorical", 7)


@pytest.fixture(params=[False, True], ids=["plain", "grid convolution"])
def network(request):
    torch.manual_seed(0)
    network = CausalDecoder(SPEC, (8,), width=16, depth=3, heads=2, grid_convolution=request.param).double().eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network


def tokens_of(rows=2, seed=0):
    return torch.randint(7, (rows, 12), generator=torch.Generator().manual_seed(seed))


def whole(network, tokens):
    condition, _ = make_condition(len(tokens), torch.float64)
    return network(TokenState(tokens, torch.zeros_like(tokens, dtype=torch.bool)), network.prepare(condition)).logits


def test_a_token_tells_only_later_slots(network):
    tokens = tokens_of()
    logits = whole(network, tokens)
    for slot in range(12):
        changed = tokens.clone()
        changed[:, slot] = (changed[:, slot] + 1) % 7
        differs = (whole(network, changed) != logits).any(-1).any(0)
        assert not differs[: slot + 1].any() and differs[slot + 1 :].all()


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6], [1, 3, 8]])
def test_a_cache_changes_nothing(network, pieces):
    tokens, found, start = tokens_of(), [], 0
    condition, _ = make_condition(2, torch.float64)
    prepared, cache = network.prepare(condition), StaticCache(12)
    before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
    for size in pieces:
        slots = torch.arange(start, start + size).expand(2, -1)
        state = TokenState(before[:, start : start + size], torch.zeros(2, size, dtype=torch.bool), slots)
        found.append(network(state, prepared, cache=cache).logits)
        start += size
        assert cache.length == start
    torch.testing.assert_close(torch.cat(found, dim=1), whole(network, tokens), rtol=1e-10, atol=1e-10)


def test_a_cropped_cache_goes_on_from_there(network):
    tokens = tokens_of()
    condition, _ = make_condition(2, torch.float64)
    prepared, cache = network.prepare(condition), StaticCache(12)
    before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)

    def read(values, start, end):
        slots = torch.arange(start, end).expand(2, -1)
        return network(
            TokenState(values[:, start:end], torch.zeros(2, end - start, dtype=torch.bool), slots), prepared, cache=cache
        )

    read(before, 0, 4)
    read((before + 1) % 7, 4, 9)  # drafts that are not kept
    cache.crop(4)
    torch.testing.assert_close(read(before, 4, 12).logits, whole(network, tokens)[:, 4:], rtol=1e-10, atol=1e-10)


def test_decoding_draws_what_the_whole_network_says(network):
    condition, null = make_condition(2, torch.float64)
    noise, guidance = Noise(3, torch.arange(2), torch.float64), Guidance(1.0)
    decoded = Autoregressive(0.9, top_k=4).decode(network, condition, null, noise, guidance)
    tokens = torch.zeros(2, 12, dtype=torch.long)
    for slot in range(12):
        here = torch.full((2, 1), slot)
        from nar_t2i.networks.predictions import Categorical

        prediction = Categorical(whole(network, tokens)[:, slot : slot + 1])
        tokens[:, slot] = prediction.sample(noise.at(slot, here), 0.9, top_k=4).values[:, 0]
    assert torch.equal(decoded.tokens, tokens) and decoded.passes == decoded.rows == 12


def test_given_tokens_stay_and_are_read(network):
    condition, null = make_condition(40, torch.float64)
    noise = Noise(3, torch.arange(40), torch.float64)
    known = Known(torch.arange(12).expand(40, -1) < 5, tokens_of(40, seed=4))
    given = Autoregressive().decode(network, condition, null, noise, Guidance(2.0), known)
    free = Autoregressive().decode(network, condition, null, noise, Guidance(2.0))
    assert torch.equal(given.tokens[:, :5], known.tokens[:, :5])
    assert not torch.equal(given.tokens[:, 5:], free.tokens[:, 5:])


def test_a_convolution_alone_tells_slots_of_their_neighbours_above_and_before():
    """Among all that a token may tell through attention, its neighbours hear of it in the convolution, too."""
    convolution = CausalGridConvolution((3, 4), 2).double()
    torch.nn.init.ones_(convolution.convolution.weight)
    x = torch.zeros(1, 12, 2, dtype=torch.float64)
    x[0, 5] = 1.0  # row 1, column 1
    heard = (convolution(x) - x)[0, :, 0]
    assert heard.nonzero().flatten().tolist() == [5, 6, 8, 9, 10]
    torch.testing.assert_close(convolution(x[:, :7]), convolution(x)[:, :7])


@pytest.mark.parametrize("grid", [False, True])
def test_it_is_as_large_as_its_parallel_twin_and_learns(grid):
    options = {"width": 32, "depth": 2, "heads": 2, "grid_convolution": grid}
    sizes = {cls: sum(p.numel() for p in cls(SPEC, (8,), **options).parameters()) for cls in (CausalDecoder, EncoderDecoder)}
    assert sizes[CausalDecoder] == sizes[EncoderDecoder]
    torch.manual_seed(0)
    small = CausalDecoder(SPEC, (8,), **options)
    optimizer = torch.optim.Adam(small.parameters(), 3e-3)
    losses = []
    for step in range(120):
        start = torch.randint(7, (16, 1), generator=torch.Generator().manual_seed(step))
        tokens = (start + torch.arange(12)) % 7  # each follows from the one before
        condition = make_condition(16)[0]
        terms = Causal().loss(small, TokenBatch(tokens, condition), Noise(0, torch.arange(16)), 0.0)
        loss = terms["loss"].total / terms["loss"].weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 < 1.5 < losses[0]  # ln 7 / 12 is left


def test_arguments_that_cannot_be_are_errors():
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(UserError, match="temperature|top_k"):
            Autoregressive(**wrong)
