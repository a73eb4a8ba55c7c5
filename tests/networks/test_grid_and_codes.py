"""Two things a network may know beforehand: which tokens are neighbours, and which codes look alike."""

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.networks import EncoderDecoder
from nar_t2i.networks.encoder_decoder import GridConvolution
from nar_t2i.types import Condition, TokenSpec, TokenState

SPEC = TokenSpec((4, 4), "categorical", 12)


def make(**options) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(SPEC, (8,), width=16, depth=2, heads=2, **options)


def make_condition(rows: int = 1) -> Condition:
    return Condition((torch.randn(rows, 3, 8),), (torch.ones(rows, 3, dtype=torch.bool),))


def test_a_grid_convolution_starts_as_nothing_and_reaches_the_eight_neighbours() -> None:
    layer = GridConvolution((4, 4), 6)
    x = torch.randn(2, 16, 6)
    assert torch.equal(layer(x), x)
    torch.nn.init.ones_(layer.convolution.weight)
    changed = x.clone()
    changed[:, 5] += 1  # row 1, column 1
    reached = (layer(changed) - layer(x)).abs().sum((0, 2)) > 1e-6
    assert reached.nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_a_grid_convolution_moves_with_its_input() -> None:
    layer = GridConvolution((4, 4), 6)
    torch.nn.init.normal_(layer.convolution.weight)
    image = torch.zeros(1, 4, 4, 6)
    image[:, 1, 1] = torch.randn(6)
    here, there = layer(image.flatten(1, 2)), layer(image.roll((1, 1), dims=(1, 2)).flatten(1, 2))
    torch.testing.assert_close(here.view(1, 4, 4, 6).roll((1, 1), dims=(1, 2)), there.view(1, 4, 4, 6))


def test_a_grid_convolution_refuses_sequences_and_chosen_positions() -> None:
    with pytest.raises(UserError, match="grid"):
        EncoderDecoder(TokenSpec((16,), "categorical", 12), (8,), width=16, depth=1, heads=2, grid_convolution=True)
    network = make(grid_convolution=True)
    positions = torch.arange(16).flip(0)[None]
    state = TokenState(torch.zeros(1, 16, dtype=torch.long), torch.ones(1, 16, dtype=torch.bool), positions)
    with pytest.raises(ValueError, match="order"):
        network(state, network.prepare(make_condition()))


def test_code_vectors_are_taken_over_scaled_and_saved() -> None:
    network = make(code_width=5)
    vectors = torch.randn(12, 5) * 7
    network.codes.adopt(vectors)
    assert network.codes.vectors.square().mean() == pytest.approx(1)
    other = make(code_width=5)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.codes.vectors, network.codes.vectors)
    with pytest.raises(UserError, match="code_width"):
        network.codes.adopt(torch.randn(12, 6))


def test_codes_that_look_alike_are_embedded_and_predicted_alike() -> None:
    network = make(code_width=5)
    vectors = torch.randn(12, 5)
    vectors[3] = vectors[7]
    network.codes.adopt(vectors)
    torch.nn.init.zeros_(network.embedding.value.weight)  # leaves only what the vectors say
    torch.nn.init.normal_(network.head.project.weight)
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[:, 8:] = True
    states = [TokenState(torch.full((1, 16), code), masked) for code in (3, 7, 4)]
    prepared = network.prepare(make_condition())
    a, b, c = (network(state, prepared).logits for state in states)
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, c, atol=1e-3)
    torch.testing.assert_close(a[..., 3], a[..., 7])
    assert not torch.allclose(a[..., 3], a[..., 4], atol=1e-3)
