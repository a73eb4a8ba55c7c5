"""aMUSEd's network against diffusers' own class with the same weights, and the promises that every network keeps."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UVit2DModel
from safetensors.torch import load_file, save_file

from nar_t2i.errors import UserError
from nar_t2i.folders import load_part, save_part
from nar_t2i.inference.guided import GuidedNetwork
from nar_t2i.learning import Masked
from nar_t2i.networks import UVit
from nar_t2i.networks.uvit import MICRO_CONDITIONS
from nar_t2i.networks.uvit_blocks import norm_over_tokens
from nar_t2i.networks.uvit_weights import FILE, load_amused, settings_of, uvit_from_amused
from nar_t2i.noise import Noise
from nar_t2i.schedules import Guidance
from nar_t2i.text.null import NullCaption
from nar_t2i.types import Condition, TokenBatch, TokenSpec, TokenState

CODES, SIDE, MASK = 17, 6, 23
TINY = dict(
    hidden_size=32,
    cond_embed_dim=12,
    micro_cond_encode_dim=8,
    micro_cond_embed_dim=40,
    encoder_hidden_size=20,
    vocab_size=MASK + 1,
    codebook_size=CODES,
    in_channels=24,
    block_out_channels=16,
    num_res_blocks=2,
    block_num_heads=2,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=44,
    sample_size=SIDE,
)
# As at 256 px, as at 512 px, and where text and channels are of one width, which leaves a projection out.
GEOMETRIES = {"256": {}, "512": {"downsample": True, "upsample": True}, "one width": {"block_out_channels": 32}}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def theirs(geometry="256", **settings):
    """With random gains and responses, too, which start at one and zero."""
    torch.manual_seed(0)
    model = UVit2DModel(**{**TINY, **GEOMETRIES[geometry], **settings}).eval()
    for name, p in model.named_parameters():
        if "gamma" in name or "beta" in name:
            torch.nn.init.normal_(p, std=0.3)
        elif p.ndim < 2:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    return model


def ours(model):
    return load_amused(UVit(**settings_of(model.config)), model.state_dict()).eval()


def inputs(rows=3, words=5):
    """Tokens of which some are masked, texts of full length, and micro-conditions of which one row differs."""
    torch.manual_seed(1)
    state = TokenState(torch.randint(CODES, (rows, SIDE**2)), torch.rand(rows, SIDE**2) < 0.6)
    micro = torch.tensor([[96.0, 96, 0, 0, 6]] * rows)
    micro[1] = torch.tensor([50.0, 70, 3, 4, 5.5])
    text, pooled = torch.randn(rows, words, 20), torch.randn(rows, 12)
    return state, Condition((text,), (torch.ones(rows, words, dtype=torch.bool),), pooled, dict(zip(MICRO_CONDITIONS, micro.T)))


@torch.no_grad()
def ask(model, state, condition):
    """(B, N, V) logits of diffusers' class."""
    tokens = torch.where(state.masked, MASK, state.values).view(-1, SIDE, SIDE)
    micro = torch.stack([condition.scalars[name] for name in MICRO_CONDITIONS], 1).to(condition.pooled.dtype)
    return model(tokens, condition.states[0], condition.pooled, micro).permute(0, 2, 3, 1).flatten(1, 2)


@geometries
@torch.no_grad()
def test_same_logits_as_diffusers(geometry):
    model = theirs(geometry)
    network, (state, condition) = ours(model), inputs()
    expected = ask(model, state, condition)
    assert expected.std() > 0.3
    prepared = network.prepare(condition)
    for tokens in (state, inputs()[0]._replace(masked=~state.masked)):  # one preparation serves all passes
        torch.testing.assert_close(network(tokens, prepared).logits, ask(model, tokens, condition), rtol=0, atol=1e-4)
    slots = torch.tensor([[3, 0, 35], [7, 7, 1], [20, 21, 5]])
    some = torch.stack([expected[row, slots[row]] for row in range(3)])
    torch.testing.assert_close(network(state, prepared, read=slots).logits, some, rtol=0, atol=1e-4)
    torch.testing.assert_close(network(state, prepared, read=state.masked).logits, expected[state.masked], rtol=0, atol=1e-4)


@geometries
@torch.no_grad()
def test_control_every_weight_matters(geometry):
    """Each of our weights, changed a little, moves the logits further than the parity test allows."""
    network, (state, condition) = ours(theirs(geometry)), inputs()
    expected = network(state, network.prepare(condition)).logits
    for name, p in network.named_parameters():
        kept = p.clone()
        p.mul_(1.2).add_(0.05)
        moved = (network(state, network.prepare(condition)).logits - expected).abs().max()
        p.copy_(kept)
        assert moved > 1e-3, name


@geometries
@torch.no_grad()
def test_guided_rows(geometry):
    model = theirs(geometry)
    state, condition = inputs()
    null = inputs()[1]._replace(states=(torch.randn(3, 5, 20),), pooled=torch.randn(3, 12))
    conditional, unconditional = (ask(model, state, text) for text in (condition, null))
    guided = GuidedNetwork(ours(model), condition, null, Guidance(10.0))
    found = guided(state, 0.5, torch.arange(36).expand(3, -1)).logits
    torch.testing.assert_close(found, unconditional + 10 * (conditional - unconditional), rtol=0, atol=1e-3)
    assert (guided.passes, guided.rows) == (1, 2)


@geometries
@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_theirs(geometry):
    model = theirs(geometry)
    network, (state, condition) = ours(model), inputs()
    exact = ask(model, state, condition)
    model, network = model.bfloat16(), network.bfloat16()
    scalars = condition.scalars
    condition = condition.map(lambda x: x.bfloat16() if x.is_floating_point() else x)._replace(scalars=scalars)
    there = (ask(model, state, condition).float() - exact).square().mean().sqrt()
    here = (network(state, network.prepare(condition)).logits - exact).square().mean().sqrt()
    assert 0 < here < 1.25 * there


@geometries
def test_a_folder_of_diffusers_is_opened(geometry, tmp_path):
    model, (state, condition) = theirs(geometry), inputs()
    model.save_pretrained(tmp_path)
    network = uvit_from_amused(tmp_path)
    assert network.micro_conditions["original_width"] == 96 and not network.training
    with torch.no_grad():
        torch.testing.assert_close(
            network(state, network.prepare(condition)).logits, ask(model, state, condition), rtol=0, atol=1e-4
        )


def broken(tmp_path, geometry="256", state=None, **config):
    model = theirs(geometry)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    if state:
        weights = load_file(tmp_path / FILE)
        state(weights)
        save_file(weights, tmp_path / FILE)
    return tmp_path


ERRORS = {
    "missing": (
        dict(state=lambda w: w.pop("transformer_layers.1.attn2.to_k.weight")),
        "lacks the weight transformer_layers.1.attn2.to_k",
    ),
    "unknown": (dict(state=lambda w: w.update(other=torch.ones(1))), "1 weights that .* no place for, such as other"),
    "another shape": (
        dict(state=lambda w: w.update({"encoder_proj.weight": torch.ones(32, 3)})),
        r"encoder_proj.weight .*\(32, 3\)",
    ),
    "another form": (
        dict(state=lambda w: w.update({"transformer_layers.0.attn1.to_q.weight": torch.ones(3)})),
        "layers.0.attn1.to_q",
    ),
    "fewer layers": (dict(num_hidden_layers=2), "such as transformer_layers.2"),
    "halving": (dict(downsample=True, upsample=True), "lacks the weight down_block.downsample.norm.weight"),
    "one side halves": (dict(downsample=True), "downsample and upsample differ"),
    "biases": (dict(use_bias=True), "use_bias is True"),
    "no setting": (dict(hidden_size=None), "config.json: .*hidden_size"),
    "micro-conditions": (dict(micro_cond_embed_dim=48), "6 micro-conditions"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_named(case, tmp_path):
    changes, message = ERRORS[case]
    with pytest.raises(UserError, match=message) as caught:
        uvit_from_amused(broken(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match=FILE):
        load_amused(UVit(**settings_of(theirs().config)), tmp_path)
    (tmp_path / FILE).write_bytes(b"{}")
    with pytest.raises(UserError, match=FILE):
        load_amused(UVit(**settings_of(theirs().config)), tmp_path / FILE)


@pytest.mark.parametrize("halving, millions", [(False, 603), (True, 608)])
def test_as_large_as_the_paper_says(halving, millions):
    side = 32 if halving else 16
    with torch.device("meta"):
        network = UVit(TokenSpec((side, side), "categorical", 8192), (768,), halving=halving)
    # Theirs keeps 63 rows of the embedding that stand for nothing.
    assert sum(p.numel() for p in network.parameters()) + 63 * 768 == pytest.approx(millions * 1e6, rel=0.001)


def network(halving=False, side=SIDE, **settings):
    torch.manual_seed(0)
    tiny = dict(
        pooled_width=12,
        width=16,
        depth=2,
        heads=2,
        mlp_width=24,
        channels=8,
        channel_heads=2,
        stages=1,
        embedding_width=8,
        micro_width=8,
    )
    net = UVit(TokenSpec((side, side), "categorical", CODES), (20,), halving=halving, **{**tiny, **settings})
    for name, p in net.named_parameters():
        if "scale_and_shift" in name or "head.logits" in name or "response" in name:  # which start at zero
            torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.mark.parametrize("halving", [False, True])
def test_padding_of_the_text_does_not_matter(halving):
    net, (state, condition) = network(halving).eval(), inputs()
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    given = condition._replace(masks=(mask,))
    other = given._replace(states=(torch.where(mask[..., None], given.states[0], 7.0),))
    longer = other._replace(states=(F.pad(other.states[0], (0, 0, 0, 3)),), masks=(F.pad(mask, (0, 3)),))
    with torch.no_grad():
        whole, padded = (net(state, net.prepare(text)).logits for text in (given, longer))
        torch.testing.assert_close(padded, whole)
        assert not torch.allclose(net(state, net.prepare(condition)).logits, whole, atol=1e-3), "the text is not read"


@torch.no_grad()
def test_values_of_masked_slots_are_not_read_and_every_slot_sees_every_slot():
    net, (state, condition) = network().eval(), inputs()
    prepared = net.prepare(condition)
    other = state._replace(values=torch.where(state.masked, (state.values + 1) % CODES, state.values))
    assert torch.equal(net(state, prepared).logits, net(other, prepared).logits)
    seen = state._replace(masked=torch.zeros_like(state.masked))
    changed = seen._replace(values=torch.cat([(seen.values[:, :1] + 1) % CODES, seen.values[:, 1:]], 1))
    assert ((net(changed, prepared).logits - net(seen, prepared).logits).abs().amax(-1) > 1e-7).all()


@torch.no_grad()
def test_a_micro_condition_that_nobody_tells_has_its_usual_value():
    net, (state, condition) = network(micro_conditions={"crop_top": 0.0, "aesthetic_score": 6.0}).eval(), inputs()

    def logits(**scalars):
        return net(state, net.prepare(condition._replace(scalars={k: torch.tensor(v) for k, v in scalars.items()}))).logits

    usual = logits()
    assert torch.equal(usual, logits(aesthetic_score=[6.0, 6.0, 6.0], crop_top=[float("nan")] * 3, crop_left=[9.0] * 3))
    told = logits(aesthetic_score=[6.0, 3.0, 6.0])
    assert torch.equal(told[0], usual[0]) and not torch.allclose(told[1], usual[1], atol=1e-4)


def test_a_pooled_state_of_another_width():
    net, (_, condition) = network(), inputs()
    for pooled, found in ((None, 0), (torch.zeros(3, 5), 5)):
        with pytest.raises(UserError, match=f"pooled_width is 12, and the text encoder's pooled state has {found}"):
            net.prepare(condition._replace(pooled=pooled))
    net = network(pooled_width=0)
    assert net(inputs()[0], net.prepare(condition._replace(pooled=None))).logits.shape == (3, 36, CODES)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(spec=TokenSpec((36,), "categorical", 9)), "codes on a grid"),
        (dict(spec=TokenSpec((6, 6), "binary", 9)), "codes on a grid"),
        (dict(spec=TokenSpec((5, 6), "categorical", 9), halving=True), "even sides"),
        (dict(heads=3), "heads must divide"),
        (dict(pooled_width=0, micro_conditions={}), "neither"),
    ],
)
def test_shapes_that_cannot_be(settings, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        UVit(**{"spec": TokenSpec((6, 6), "categorical", 9), "text_widths": (20,), "width": 16, "depth": 1, "heads": 2, **settings})


def test_chosen_positions_are_refused():
    net, (state, condition) = network(), inputs()
    with pytest.raises(ValueError, match="in their order"):
        net(state._replace(positions=torch.arange(36).expand(3, -1)), net.prepare(condition))


@pytest.mark.parametrize("halving", [False, True])
def test_gradient_reaches_all_parameters_with_and_without_checkpointing(halving):
    gradients = []
    for activation_checkpointing in (False, True):
        net, (state, condition) = network(halving, activation_checkpointing=activation_checkpointing), inputs()
        net(state, net.prepare(condition), read=state.masked).nll(state.values[state.masked]).mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert not [name for name, g in gradients[0].items() if g is None or not g.abs().sum() > 0]
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())


def test_with_and_without_gradients_it_says_the_same():
    """Norm and attention take other ways on a CPU where no gradient is needed."""
    net, (state, condition) = network(), inputs()
    with torch.no_grad():
        without = net(state, net.prepare(condition)).logits
    torch.testing.assert_close(net(state, net.prepare(condition)).logits.detach(), without)


def test_bf16_autocast():
    net, (state, condition) = network(), inputs()
    whole = net(state, net.prepare(condition)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = net(state, net.prepare(condition), read=state.masked)
    assert prediction.logits.dtype == torch.float32
    torch.testing.assert_close(prediction.logits, whole[state.masked], rtol=0.1, atol=0.1)
    prediction.nll(state.values[state.masked]).mean().backward()
    assert net.embedding.mask.grad.isfinite().all()


def test_it_learns_by_masked_modelling():
    """Captions dropped, scalars told, and the head evaluated at masked slots alone, as GeneratorModule has it."""
    net, (state, condition) = network(), inputs()
    torch.nn.init.zeros_(net.head.logits.weight)  # as it comes
    null, noise = NullCaption((20,), 12), Noise(0, torch.arange(3))
    parameters = [*net.parameters(), *null.parameters()]
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.01), []
    for _ in range(25):
        told = null(condition, torch.tensor([False, True, False]))
        total, weight = Masked().loss(net, TokenBatch(state.values % 3, told), noise, 0.0)["loss"]
        losses.append(float(total.detach() / weight))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(CODES), rel=1e-3) and losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in parameters)


def test_it_travels_in_a_folder(tmp_path):
    net, (state, condition) = network(True), inputs()
    save_part(net, tmp_path)
    other = load_part(tmp_path)
    assert torch.equal(other(state, other.prepare(condition)).logits, net(state, net.prepare(condition)).logits)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_the_norm_over_tokens_is_torchs_with_and_without_gradients(dtype, near):
    x = torch.randn(2, 256, 7, dtype=torch.float64)
    expected = torch.linalg.vector_norm(x.to(dtype).double(), dim=1, keepdim=True)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            found = norm_over_tokens(x.to(dtype))
        assert found.dtype == dtype and ((found.double() - expected) / expected).abs().max() < near
