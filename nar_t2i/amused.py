"""`nar-t2i import FOLDER MODEL`: aMUSEd's published weights, as diffusers stores them, as a model folder of ours.

    FOLDER/   model_index.json, and transformer/ text_encoder/ tokenizer/ vqvae/ scheduler/ with their configurations and weights
    MODEL/    see nar_t2i.pipeline

The model draws the tokens that diffusers' AmusedPipeline draws, given the same random numbers. Its null caption is the empty
prompt's states, 77 tokens of them, which a training that starts from it goes on learning.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nar_t2i.errors import UserError
from nar_t2i.files import read_json, whole_folder
from nar_t2i.folders import first_difference
from nar_t2i.inference import AmusedConfidence
from nar_t2i.networks.uvit import UVit
from nar_t2i.networks.uvit_weights import FILE, uvit_from_amused
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance
from nar_t2i.text.clip import ClipTextEncoder
from nar_t2i.text.null import NullCaption
from nar_t2i.tokenizers.amused import AmusedVQ

PIPELINES = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")  # of the same parts
STEPS, SCALE = 12, 10.0  # AmusedPipeline's own


def main(arguments: argparse.Namespace) -> int:
    folder, model = Path(arguments.folder), Path(arguments.model)
    if model.exists() and (not model.is_dir() or any(model.iterdir())):
        raise UserError(f"{model} is not an empty folder; import into a new one")
    with whole_folder(model) as beside, imported(folder) as t2i:
        t2i.save_pretrained(beside)
    parameters = sum(p.numel() for p in t2i.network.parameters())
    print(f"{model}: {parameters / 1e6:,.0f}M parameters, {t2i.tokenizer.image_size} px, {t2i.network.spec.length} tokens")
    return 0


@contextmanager
def imported(folder: Path) -> Iterator[TextToImage]:
    """The pipeline of a folder, to be saved within the context. UserError where the folder is not aMUSEd's, or not whole."""
    kind = _config(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{folder / 'model_index.json'}: a {kind}; of diffusers' pipelines only aMUSEd's can be imported")
    vq = _config(folder / "vqvae/config.json")
    downsampling = 2 ** (len(vq.get("block_out_channels", ())) - 1)
    network = uvit_from_amused(folder / "transformer", downsampling)
    tokenizer = _tokenizer(folder / "vqvae", vq, network)
    inference = AmusedConfidence(STEPS, _schedule(folder))
    with _text_folder(folder) as together:
        text = _text(folder, together)
        _check_widths(folder, text, network)
        yield TextToImage(tokenizer, text, _empty_prompt(text), network, inference, Guidance(SCALE))


def _config(path: Path) -> dict:
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a mapping")
    return found


def _tokenizer(folder: Path, config: dict, network: UVit) -> AmusedVQ:
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    side = network.spec.shape[0] * 2 ** (len(config.get("block_out_channels", ())) - 1)
    tokenizer = AmusedVQ(settings, side).eval()
    try:
        tokenizer.model.load_state_dict(load_file(folder / FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / FILE}: {first_difference(error)}") from error
    if tokenizer.spec != network.spec:
        raise UserError(f"{folder}: has {tokenizer.spec.size} codes, and transformer has {network.spec.size}")
    return tokenizer


def _schedule(folder: Path) -> str:
    path = folder / "scheduler/scheduler_config.json"
    scheduler, codes = _config(path), _config(folder / "transformer/config.json")["vocab_size"]
    if scheduler.get("mask_token_id") != codes - 1:
        raise UserError(f"{path}: mask_token_id is {scheduler.get('mask_token_id')}, and transformer's last code is {codes - 1}")
    if (schedule := scheduler.get("masking_schedule", "cosine")) not in ("cosine", "linear"):
        raise UserError(f"{path}: masking_schedule is {schedule}, and can be cosine or linear")
    return schedule


@contextmanager
def _text_folder(folder: Path) -> Iterator[str]:
    """The text encoder and its tokenizer in one folder, as a text encoder of ours reads them."""
    with tempfile.TemporaryDirectory() as together:
        for part in ("text_encoder", "tokenizer"):
            if not (folder / part).is_dir():
                raise UserError(f"{folder / part}: no such folder")
            for file in (folder / part).iterdir():
                Path(together, file.name).symlink_to(file.resolve())
        yield together


def _text(folder: Path, together: str) -> ClipTextEncoder:
    config, told = (_config(folder / name) for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"))
    longest = min(told.get("model_max_length", 77), config.get("max_position_embeddings", 77))
    try:
        return ClipTextEncoder(together, layer=-2, max_length=longest, mask_padding=False, final_norm=False)
    except UserError as error:
        raise UserError(str(error).replace(together, f"{folder}/{{text_encoder,tokenizer}}")) from error


def _check_widths(folder: Path, text: ClipTextEncoder, network: UVit) -> None:
    if (text.widths[0], text.pooled_width) != (network.text[0].in_features, network.pooled_width):
        raise UserError(f"{folder}: text_encoder's states have {text.widths[0]} and {text.pooled_width} channels, and transformer "
                        f"reads {network.text[0].in_features} and {network.pooled_width}")  # fmt: skip


@torch.no_grad()
def _empty_prompt(text: ClipTextEncoder) -> NullCaption:
    """What aMUSEd is told when it is told nothing."""
    empty = text([""])
    text.encoded = text.truncated = 0
    null = NullCaption(text.widths, text.pooled_width, text.max_length)
    null.states[0].copy_(empty.states[0][0])
    null.pooled.copy_(empty.pooled[0])
    return null
