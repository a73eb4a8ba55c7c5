"""The network that reads text alone: what it must not see, and that its text encoder serves another network."""

import torch
import torch.nn.functional as F

from nar_t2i.networks import EncoderDecoder, TextReader
from nar_t2i.training.init_from import load_weights
from tests.networks.test_encoder_decoder import SPEC, condition, state


def network() -> TextReader:
    torch.manual_seed(0)
    net = TextReader(SPEC, (6,), width=16, heads=2)
    with torch.no_grad():
        net.predict.logits.weight.normal_(std=0.3)
    return net


def test_reading_all_some_or_masked_slots_agrees() -> None:
    net, tokens = network(), state()
    prepared = net.prepare(condition())
    whole = net(tokens, prepared).logits
    assert whole.shape == (2, SPEC.length, SPEC.size)
    slots = torch.tensor([[3, 0, 11], [7, 7, 1]])
    expected = torch.stack([whole[row, slots[row]] for row in range(2)])
    torch.testing.assert_close(net(tokens, prepared, read=slots).logits, expected)
    torch.testing.assert_close(net(tokens, prepared, read=tokens.masked).logits, whole[tokens.masked])
    some = tokens._replace(values=tokens.values.gather(1, slots), masked=tokens.masked.gather(1, slots), positions=slots)
    torch.testing.assert_close(net(some, prepared).logits, expected)


def test_it_reads_the_words_and_nothing_else() -> None:
    net, tokens, given = network(), state(), condition()
    logits = net(tokens, net.prepare(given)).logits
    shown = tokens._replace(masked=torch.zeros_like(tokens.masked), values=(tokens.values + 1) % SPEC.size)
    assert torch.equal(net(shown, net.prepare(given)).logits, logits)
    assert not torch.allclose(logits[:, 0], logits[:, 1])  # each slot asks for itself
    other = given._replace(states=(given.states[0].flip(-1),))
    assert not torch.allclose(net(tokens, net.prepare(other)).logits, logits)  # the control
    padded = condition(padding=4)
    padded = padded._replace(states=(torch.where(padded.masks[0][..., None], padded.states[0], 100.0),))
    torch.testing.assert_close(net(tokens, net.prepare(padded)).logits, logits)


def test_every_weight_learns() -> None:
    net, tokens = network(), state()
    logits = net(tokens, net.prepare(condition())).logits
    F.cross_entropy(logits.flatten(0, 1), tokens.values.flatten().long()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.numel() > 1)


def test_what_reads_the_text_goes_into_another_network_and_nothing_else(tmp_path) -> None:
    reader = network()
    torch.save({"state_dict": reader.state_dict()}, tmp_path / "reader.ckpt")
    drawing = EncoderDecoder(SPEC, (6,), width=16, depth=2, heads=2)
    report = load_weights(drawing, tmp_path / "reader.ckpt")
    assert report.loaded == ["text.0.weight", "text.0.bias", "text_norm.weight", "text_norm.bias"]
    assert torch.equal(drawing.text[0].weight, reader.text[0].weight)
