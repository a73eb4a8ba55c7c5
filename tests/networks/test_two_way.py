"""The network whose text reads the image: the same promises as of the one-way network, and that it does read."""

import pytest
import torch
import torch.nn.functional as F

from nar_t2i.networks import TwoWayDecoder
from tests.networks.test_encoder_decoder import SPEC, condition, state


def network(**kwargs):
    torch.manual_seed(0)
    net = TwoWayDecoder(SPEC, (6,), **{"width": 16, "depth": 3, "heads": 2, **kwargs})
    with torch.no_grad():
        net.head.logits.weight.normal_(std=0.3)
    return net


@pytest.mark.parametrize("grid_convolution", [False, True])
def test_reading_all_some_or_masked_slots_agrees(grid_convolution):
    net, tokens = network(grid_convolution=grid_convolution), state()
    prepared = net.prepare(condition())
    whole = net(tokens, prepared).logits
    slots = torch.tensor([[3, 0, 11], [7, 7, 1]])
    expected = torch.stack([whole[row, slots[row]] for row in range(2)])
    torch.testing.assert_close(net(tokens, prepared, read=slots).logits, expected)
    torch.testing.assert_close(net(tokens, prepared, read=tokens.masked).logits, whole[tokens.masked])


def test_the_text_reads_the_image():
    """With everything but the text's reading shut off, a token still tells another one of itself by way of the text."""
    net, tokens = network(), state()
    tokens = tokens._replace(masked=torch.zeros_like(tokens.masked))
    other = tokens._replace(values=tokens.values.index_fill(1, torch.tensor([0]), 9))
    with torch.no_grad():
        for block in net.blocks:
            for p in block.self_attention.out.parameters():
                p.zero_()
    prepared = net.prepare(condition())

    def change() -> float:
        return (net(tokens, prepared).logits - net(other, prepared).logits)[:, 1:].abs().max().item()

    assert change() > 1e-3
    with torch.no_grad():
        for block in net.text_blocks:
            for p in block.cross_attention.out.parameters():
                p.zero_()
    assert change() < 1e-6  # the control


def test_padding_and_company_do_not_matter():
    net, tokens = network().double(), state()
    given, padded = condition(), condition(padding=4)
    given, padded = (c._replace(states=(c.states[0].double(),)) for c in (given, padded))
    padded = padded._replace(states=(torch.where(padded.masks[0][..., None], padded.states[0], 100.0),))
    whole = net(tokens, net.prepare(given)).logits
    torch.testing.assert_close(net(tokens, net.prepare(padded)).logits, whole)
    alone = net(tokens._replace(values=tokens.values[:1], masked=tokens.masked[:1]), net.prepare(given.map(lambda t: t[:1])))
    torch.testing.assert_close(alone.logits, whole[:1])


def test_every_weight_learns_and_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        net, tokens = network(activation_checkpointing=checkpointing, grid_convolution=True), state()
        logits = net(tokens, net.prepare(condition())).logits
        F.cross_entropy(logits.flatten(0, 1), tokens.values.flatten().long()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
