"""Emage's network: what is read does not change what is said, padding does not matter, and every weight learns."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from nar_t2i.errors import UserError
from nar_t2i.networks import EncoderDecoder, attention
from nar_t2i.networks.attention import CrossAttention, SelfAttention, attend, attend_among
from nar_t2i.networks.encoder_decoder import states_and_mask
from nar_t2i.types import Condition, TokenSpec, TokenState

SPEC = TokenSpec((3, 4), "categorical", 10)


def network(spec=SPEC, widths=(6,), **kwargs):
    torch.manual_seed(0)
    net = EncoderDecoder(spec, widths, **{"width": 16, "depth": 2, "heads": 2, **kwargs})
    with torch.no_grad():
        net.head.logits.weight.normal_(std=0.3)  # starts at zero, which would hide everything
    return net


def condition(lengths=(5, 3), widths=(6,), padding=0):
    torch.manual_seed(1)
    longest = max(lengths)
    states = tuple(F.pad(torch.randn(len(lengths), longest, w), (0, 0, 0, padding)) for w in widths)
    mask = torch.arange(longest + padding) < torch.tensor(lengths)[:, None]
    return Condition(states, (mask,) * len(widths))


def state(spec=SPEC, batch=2):
    torch.manual_seed(2)
    values = torch.randint(spec.size if spec.kind == "categorical" else 2, (batch, spec.length, *spec.value_shape))
    return TokenState(values.to(spec.dtype), torch.rand(batch, spec.length) < 0.5)


@pytest.mark.parametrize("grid_convolution", [False, True])
def test_reading_all_some_or_masked_slots_agrees(grid_convolution):
    net, tokens = network(grid_convolution=grid_convolution), state()
    prepared = net.prepare(condition())
    whole = net(tokens, prepared).logits
    assert whole.shape == (2, 12, 10)
    slots = torch.tensor([[3, 0, 11], [7, 7, 1]])
    some = net(tokens, prepared, read=slots).logits
    assert some.shape == (2, 3, 10)
    torch.testing.assert_close(some, torch.stack([whole[row, slots[row]] for row in range(2)]))
    torch.testing.assert_close(net(tokens, prepared, read=tokens.masked).logits, whole[tokens.masked])


def test_values_of_masked_slots_are_not_read():
    net, tokens = network(), state()
    prepared = net.prepare(condition())
    other = tokens._replace(values=torch.where(tokens.masked, (tokens.values + 1) % 10, tokens.values))
    assert torch.equal(net(tokens, prepared).logits, net(other, prepared).logits)
    unmasked = tokens._replace(masked=torch.zeros_like(tokens.masked))
    changed = other._replace(masked=unmasked.masked)
    assert not torch.allclose(net(unmasked, prepared).logits, net(changed, prepared).logits, atol=1e-3)


def test_every_slot_sees_every_slot():
    net, tokens = network(), state()
    tokens = tokens._replace(masked=torch.zeros_like(tokens.masked))
    prepared = net.prepare(condition())
    whole = net(tokens, prepared).logits
    for slot in (0, 11):
        values = tokens.values.clone()
        values[:, slot] = (values[:, slot] + 1) % 10
        assert ((net(tokens._replace(values=values), prepared).logits - whole).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("gradients", [True, False])  # the mask has two forms
def test_padding_of_the_text_does_not_matter(gradients):
    with torch.set_grad_enabled(gradients):
        padding_does_not_matter()


def padding_does_not_matter():
    net, tokens = network(), state()
    given, padded = condition(), condition(padding=14)  # beyond the multiple that is padded to
    padded = padded._replace(states=(torch.where(padded.masks[0][..., None], padded.states[0], 100.0),))
    whole = net(tokens, net.prepare(given)).logits
    torch.testing.assert_close(net(tokens, net.prepare(padded)).logits, whole)
    text = given._replace(states=(given.states[0] + given.masks[0].unsqueeze(-1),))
    assert not torch.allclose(net(tokens, net.prepare(text)).logits, whole, atol=1e-3), "the text is not read"


@pytest.mark.parametrize(("words", "length"), [(5, 16), (16, 16), (77, 80)])
def test_texts_are_padded_to_a_length_that_attention_is_fast_at(words, length):
    net, given = network(), condition(lengths=(words, 3))
    states, mask = states_and_mask(net.text, net.text_norm, given)
    assert states.shape == (2, length, 16) and mask.shape == (2, 1, 1, length) and mask.flatten(1).sum(1).tolist() == [words, 3]
    torch.testing.assert_close(states[:, :words], net.text_norm(net.text[0](given.states[0])))
    prepared = net.prepare(given)
    assert all(k.shape[2] == v.shape[2] == length for k, v in prepared.keys_and_values) and prepared.mask.shape[-1] == length


def test_two_streams_of_text():
    net = network(widths=(6, 3))
    both = condition(widths=(6, 3))
    whole = net(state(), net.prepare(both)).logits
    for stream in (0, 1):
        states = tuple(s + (i == stream) for i, s in enumerate(both.states))
        other = net(state(), net.prepare(both._replace(states=states))).logits
        assert not torch.allclose(other, whole, atol=1e-3), f"stream {stream} is not read"


def test_other_streams_of_text_are_an_error():
    for widths in ((7,), (6, 6)):
        with pytest.raises(UserError, match="trained beside another text encoder"):
            network().prepare(condition(widths=widths))


def test_positions_can_be_given():
    net, tokens = network(), state()
    prepared = net.prepare(condition())
    order = torch.arange(12).expand(2, -1).flip(1)
    flipped = TokenState(tokens.values.flip(1), tokens.masked.flip(1), positions=order)
    torch.testing.assert_close(net(flipped, prepared).logits.flip(1), net(tokens, prepared).logits)


@pytest.mark.parametrize("kind", ["categorical", "binary"])
@pytest.mark.parametrize("shape, grid_convolution", [((4,), False), ((2, 2), True)])
def test_gradient_reaches_all_parameters(kind, shape, grid_convolution):
    spec = TokenSpec(shape, kind, 5)
    net = network(spec, grid_convolution=grid_convolution)
    tokens = state(spec)
    tokens = tokens._replace(masked=torch.tensor([[True, False, True, False]] * 2))
    net(tokens, net.prepare(condition())).nll(tokens.values).mean().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_activation_checkpointing_gives_equal_gradients():
    gradients = []
    for activation_checkpointing in (False, True):
        net = network(activation_checkpointing=activation_checkpointing)
        tokens = state()
        text = condition()
        net(tokens, net.prepare(text)).nll(tokens.values).mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())


def test_activation_checkpointing_recomputes():
    net = network(activation_checkpointing=True)
    calls = []
    net.blocks[0].norm_self.register_forward_hook(lambda *_: calls.append(1))
    net(state(), net.prepare(condition())).logits.sum().backward()
    assert len(calls) == 2


def test_bf16_autocast():
    net, tokens = network(), state()
    whole = net(tokens, net.prepare(condition())).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = net(tokens, net.prepare(condition()), read=tokens.masked)
    assert prediction.logits.dtype == torch.float32
    torch.testing.assert_close(prediction.logits, whole[tokens.masked], rtol=0.1, atol=0.1)
    prediction.nll(tokens.values[tokens.masked]).mean().backward()
    assert net.embedding.mask.grad.isfinite().all()


def test_the_grid_convolution_sees_neighbours_and_starts_at_nothing():
    plain, net, tokens = network(), network(grid_convolution=True), state()
    net.load_state_dict(plain.state_dict(), strict=False)
    for block in net.blocks:
        torch.nn.init.zeros_(block.local.convolution.bias)
    prepared = net.prepare(condition())
    assert torch.equal(net(tokens, prepared).logits, plain(tokens, prepared).logits)
    x = torch.zeros(1, 12, 16)
    x[0, 5] = 1.0  # row 1, column 1 of three rows and four columns
    local = net.blocks[0].local
    torch.nn.init.ones_(local.convolution.weight)
    moved = (local(x) - x - local.convolution.bias).abs().amax(-1)[0].view(3, 4) > 0
    assert moved.tolist() == [[True, True, True, False]] * 3
    with pytest.raises(UserError, match="needs tokens on a grid"):
        network(TokenSpec((12,), "categorical", 10), grid_convolution=True)


@pytest.mark.parametrize("width, depth, ratio", [(16, 2, 4.0), (24, 3, 2.0)])
def test_count_of_parameters(width, depth, ratio):
    net = network(width=width, depth=depth, mlp_ratio=ratio)
    w, hidden = width, int(width * ratio)
    self_attention = 3 * w * w + 3 * w + w * w + w
    cross_attention = w * w + w + 2 * w * w + 2 * w + w * w + w
    mlp = 2 * w * hidden + hidden + w
    block = self_attention + cross_attention + mlp + 3 * 2 * w
    ends = 10 * w + w + 12 * w + (6 * w + w) + 2 * w + (2 * w + 10 * w + 10)
    assert sum(p.numel() for p in net.parameters()) == depth * block + ends
    net = network(width=width, depth=depth, mlp_ratio=ratio, grid_convolution=True)
    assert sum(p.numel() for p in net.parameters()) == depth * (block + 10 * w) + ends


def by_hand(q, k, v, mask=None):
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])):
        seen = [j for j in range(k.shape[2]) if mask is None or mask.expand(*q.shape[:3], k.shape[2])[b, h, i, j]]
        weights = torch.tensor([float(q[b, h, i] @ k[b, h, j]) / q.shape[-1] ** 0.5 for j in seen]).softmax(0)
        out[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, seen))
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_fused_and_by_hand(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])[:, None, None] if masked else None
    fused = attend(q, k, v, mask)
    torch.testing.assert_close(fused, by_hand(q, k, v, mask), rtol=1e-4, atol=1e-5)
    written = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert written.dtype == torch.bfloat16
    torch.testing.assert_close(written.float(), fused, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("tokens", [127, 128, 512, 513])
def test_attention_among_some_hundred_tokens_is_written_out_in_any_batch(monkeypatch, tokens):
    monkeypatch.setattr(attention, "_KERNEL_HAS_AMX", False)
    kernel = Mock(side_effect=F.scaled_dot_product_attention)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", kernel)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, tokens, 8).bfloat16()
    with torch.no_grad():
        together = attend_among(q, k, v)
        alone = torch.cat([attend_among(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(9)])
    assert kernel.call_count == (0 if 128 <= tokens <= 512 else 10)
    assert torch.equal(together, alone)  # bit for bit: a picture does not depend on its batch
    torch.testing.assert_close(together.float(), attend(q.float(), k.float(), v.float()), rtol=0.03, atol=0.03)


def test_gradients_of_attention_written_out():
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, 5, 4).bfloat16().requires_grad_() for _ in range(3)]
    mask = torch.rand(2, 1, 5, 5) < 0.7
    mask[..., 0] = True
    written = torch.autograd.grad(attend(*tensors, mask).float().square().sum(), tensors)
    precise = [t.detach().float().requires_grad_() for t in tensors]
    fused = torch.autograd.grad(attend(*precise, mask).square().sum(), precise)
    for a, b in zip(written, fused):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)


def test_keys_and_values_made_once_are_those_of_torch():
    """Both attentions against torch.nn.MultiheadAttention with the same weights."""
    torch.manual_seed(0)
    x, text = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    own, cross, theirs = SelfAttention(8, 2), CrossAttention(8, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        for attention, weights, biases in (
            (own, own.qkv.weight, own.qkv.bias),
            (cross, torch.cat([cross.q.weight, cross.kv.weight]), torch.cat([cross.q.bias, cross.kv.bias])),
        ):
            theirs.in_proj_weight.copy_(weights)
            theirs.in_proj_bias.copy_(biases)
            theirs.out_proj.load_state_dict(attention.out.state_dict())
            if attention is own:
                torch.testing.assert_close(own(x), theirs(x, x, x)[0])
            else:
                given = cross(x, cross.keys_and_values(text), mask[:, None, None])
                torch.testing.assert_close(given, theirs(x, text, text, key_padding_mask=~mask)[0])


@pytest.mark.parametrize("heads", [3, 0])
def test_heads_divide_the_width(heads):
    with pytest.raises(UserError, match=f"heads: {heads} do not divide a width of 32"):
        EncoderDecoder(TokenSpec((4, 4), "categorical", 7), (8,), width=32, depth=1, heads=heads)
