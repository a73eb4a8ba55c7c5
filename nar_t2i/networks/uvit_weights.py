"""Weights of aMUSEd, as diffusers' UVit2DModel saves them, into a UVit: by name, and nothing may be left over.

network = uvit_from_amused("amused-256/transformer")     # the folder of the weights and their config.json
load_amused(network, state)                              # or into a network of that shape, from a folder or a state dict
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.files import read_json
from nar_t2i.networks.uvit import MICRO_CONDITIONS, UVit
from nar_t2i.types import TokenSpec

FILE = "diffusion_pytorch_model.safetensors"
# Settings of UVit2DModel that UVit has no choice of.
FIXED = {"use_bias": False, "ln_elementwise_affine": True, "layer_norm_eps": 1e-6}


class Source(NamedTuple):
    """One weight of ours: what it is made of, and how."""

    name: str
    theirs: tuple[str, ...]
    make: Callable[..., Tensor]


def load_amused(network: UVit, source: str | Path | Mapping[str, Tensor]) -> UVit:
    """Fill the network with weights of the same shape.

    source: a state dict of UVit2DModel, its safetensors file, or the folder that it lies in. UserError where a weight is
    missing, of another shape, or has no place here. Of the embedding's rows one a code and the last, which stands for MASK,
    are taken; those between them fill up to a round number and mean nothing.
    """
    where, theirs = ("state", source) if isinstance(source, Mapping) else _read(Path(source))
    own, filled, used = network.state_dict(), {}, set()
    for name, parts, make in sources(network):
        if lacking := [part for part in parts if part not in theirs]:
            raise UserError(f"{where}: lacks the weight {lacking[0]}")
        try:
            weight = make(*(theirs[part] for part in parts))
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{where}: {parts[0]} has the shape {tuple(theirs[parts[0]].shape)}: {error}") from error
        if weight.shape != own[name].shape:
            raise UserError(f"{where}: {parts[0]} makes {name} of the shape {tuple(weight.shape)}, and the network needs "
                            f"{tuple(own[name].shape)}")  # fmt: skip
        filled[name] = weight
        used.update(parts)
    if unknown := sorted(set(theirs) - used):
        raise UserError(f"{where}: has {len(unknown)} weights that this network has no place for, such as {unknown[0]}")
    network.load_state_dict(filled)  # which misses none: the names are all of the network's
    return network


def uvit_from_amused(folder: str | Path, downsampling: int = 16) -> UVit:
    """A UVit of the shape that the folder's config.json tells, with the folder's weights. downsampling: see `settings_of`."""
    network = UVit(**settings_of(read_json(Path(folder, "config.json")), downsampling))
    return load_amused(network, folder).eval()


def settings_of(config: Mapping[str, Any], downsampling: int = 16) -> dict[str, Any]:
    """The arguments of a UVit from UVit2DModel's configuration. UserError where it asks for what a UVit is not.

    downsampling: pixels a side of a token."""
    try:
        for name, value in FIXED.items():
            if config[name] != value:
                raise UserError(f"config.json: {name} is {config[name]}, and a UVit has {value}")
        if config["downsample"] != config["upsample"]:
            raise UserError("config.json: downsample and upsample differ")
        side, micro = config["sample_size"], config["micro_cond_embed_dim"] // config["micro_cond_encode_dim"]
        if micro != len(MICRO_CONDITIONS):
            raise UserError(f"config.json: {micro} micro-conditions, and aMUSEd has {len(MICRO_CONDITIONS)}")
        pixels = {"original_width": float(downsampling * side), "original_height": float(downsampling * side)}
        return dict(
            spec=TokenSpec((side, side), "categorical", config["codebook_size"]), text_widths=(config["encoder_hidden_size"],),
            pooled_width=config["cond_embed_dim"], width=config["hidden_size"], depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"], mlp_width=config["intermediate_size"], channels=config["block_out_channels"],
            channel_heads=config["block_num_heads"], stages=config["num_res_blocks"], embedding_width=config["in_channels"],
            halving=config["downsample"], micro_conditions=MICRO_CONDITIONS | pixels, micro_width=config["micro_cond_encode_dim"],
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(f"config.json: is not UVit2DModel's: {type(error).__name__} {error}") from error


def sources(network: UVit) -> Iterator[Source]:
    """Where each weight of the network comes from."""
    codes = network.spec.size
    yield Source("embedding.value.weight", ("embed.embeddings.weight",), lambda w: w[:codes])
    yield Source("embedding.mask", ("embed.embeddings.weight",), lambda w: w[-1])
    yield _same("embedding.norm.weight", "embed.layer_norm.weight")
    yield _matrix("embedding.project.weight", "embed.conv.weight")
    yield _same("text.0.weight", "encoder_proj.weight")
    yield _same("text_norm.weight", "encoder_proj_layer_norm.weight")
    yield _same("vector.0.weight", "cond_embed.linear_1.weight")
    yield _same("vector.2.weight", "cond_embed.linear_2.weight")
    if network.halving is not None:
        yield _same("halving.norm.weight", "down_block.downsample.norm.weight")
        yield Source("halving.linear.weight", ("down_block.downsample.conv.weight",), lambda w: w.permute(0, 2, 3, 1).flatten(1))
        yield _same("doubling.norm.weight", "up_block.upsample.norm.weight")
        yield Source("doubling.linear.weight", ("up_block.upsample.conv.weight",), lambda w: w.permute(2, 3, 1, 0).flatten(0, 2))
    for ours, theirs, stages in (("down", "down_block", network.down), ("up", "up_block", network.up)):
        for number in range(len(stages)):
            yield from _stage(f"{ours}.{number}", f"{theirs}.res_blocks.{number}", f"{theirs}.attention_blocks.{number}", network)
    yield _same("into.0.weight", "project_to_hidden_norm.weight")
    yield _same("into.1.weight", "project_to_hidden.weight")
    for number in range(len(network.layers)):
        yield from _layer(f"layers.{number}", f"transformer_layers.{number}")
    yield _same("out.0.weight", "project_from_hidden_norm.weight")
    yield _same("out.1.weight", "project_from_hidden.weight")
    yield _matrix("head.project.weight", "mlm_layer.conv1.weight")
    yield _same("head.norm.weight", "mlm_layer.layer_norm.weight")
    yield _matrix("head.logits.weight", "mlm_layer.conv2.weight")


def _same(ours: str, theirs: str) -> Source:
    return Source(ours, (theirs,), lambda w: w)


def _matrix(ours: str, theirs: str) -> Source:
    """A 1 × 1 convolution is a matrix."""
    return Source(ours, (theirs,), lambda w: w.flatten(1))


def _stage(ours: str, convolution: str, attention: str, network: UVit) -> Iterator[Source]:
    yield _same(f"{ours}.convolution.depthwise.weight", f"{convolution}.depthwise.weight")
    yield _same(f"{ours}.convolution.norm.weight", f"{convolution}.norm.weight")
    yield _same(f"{ours}.convolution.into.weight", f"{convolution}.channelwise_linear_1.weight")
    for name in ("gamma", "beta"):
        yield Source(f"{ours}.convolution.response.{name}", (f"{convolution}.channelwise_norm.{name}",), torch.flatten)
    yield _same(f"{ours}.convolution.out.weight", f"{convolution}.channelwise_linear_2.weight")
    yield _same(f"{ours}.convolution.scale_and_shift.linear.weight", f"{convolution}.cond_embeds_mapper.weight")
    if f"{ours}.text.1.weight" in network.state_dict():
        yield _same(f"{ours}.text.1.weight", f"{attention}.kv_mapper.weight")
    for name, number in (("first", 1), ("second", 2)):
        yield _same(f"{ours}.norm_{name}.weight", f"{attention}.norm{number}.weight")
        yield from _cross_attention(f"{ours}.{name}", f"{attention}.attn{number}")


def _layer(ours: str, theirs: str) -> Iterator[Source]:
    for number, name in enumerate(("norm_self", "norm_cross", "norm_mlp"), 1):
        yield _same(f"{ours}.{name}.weight", f"{theirs}.norm{number}.norm.weight")
        yield _same(f"{ours}.{name}.scale_and_shift.linear.weight", f"{theirs}.norm{number}.linear.weight")
    of_self = tuple(f"{theirs}.attn1.to_{kind}.weight" for kind in "qkv")
    yield Source(f"{ours}.self_attention.qkv.weight", of_self, lambda *w: torch.cat(w))
    yield _same(f"{ours}.self_attention.out.weight", f"{theirs}.attn1.to_out.0.weight")
    yield from _cross_attention(f"{ours}.cross_attention", f"{theirs}.attn2")
    for half, name in enumerate(("value", "gate")):
        yield Source(f"{ours}.mlp.{name}.weight", (f"{theirs}.ff.net.0.proj.weight",), lambda w, half=half: w.chunk(2)[half])
    yield _same(f"{ours}.mlp.out.weight", f"{theirs}.ff.net.2.weight")


def _cross_attention(ours: str, theirs: str) -> Iterator[Source]:
    yield _same(f"{ours}.q.weight", f"{theirs}.to_q.weight")
    yield Source(f"{ours}.kv.weight", (f"{theirs}.to_k.weight", f"{theirs}.to_v.weight"), lambda *w: torch.cat(w))
    yield _same(f"{ours}.out.weight", f"{theirs}.to_out.0.weight")


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    file = path / FILE if path.is_dir() else path
    try:
        return str(file), load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {error}") from error
