"""Shards + a text encoder → a text cache, from which a generator trains without running the encoder.

    encode_text.py SHARDS MODEL OUT

MODEL: a folder of a saved text encoder, or of a model or run that has one, or a recipe whose text encoder is meant. Any
source and any frozen encoder will do; `nar_t2i.data.text_cache` reads it. Run the same command again after an interruption.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from nar_t2i import recipe as recipes
from nar_t2i.data.arrays import Arrays, open_map
from nar_t2i.data.opening import open_source
from nar_t2i.data.source import SampleError, Source
from nar_t2i.data.text_cache import FORMAT, MANIFEST, Packed, Stored, pack_states, unpack_states
from nar_t2i.errors import UserError
from nar_t2i.files import read_json, whole_file, write_json
from nar_t2i.folders import load_part
from nar_t2i.hashing import text_hash
from nar_t2i.parts import build
from nar_t2i.prepare.command import add_device, add_shard_range, add_shards, at_least, parser, run, shard_range
from nar_t2i.text import ScratchTextEncoder
from nar_t2i.types import Condition, TextEncoder

CAPTIONS_A_FILE = 8192  # captions a file


@torch.inference_mode()
def encode_text(
    text: TextEncoder,
    source: Source,
    folder: str | Path,
    stored: Stored = "float16",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    shards: str = "0:",
    captions_a_file: int = CAPTIONS_A_FILE,
) -> dict[str, Any] | None:
    """Encode every caption of a source once; files that are finished are kept, so it can be interrupted.

    stored: how states are kept; the error that this makes is measured and noted. batch_size: captions a pass. shards:
    the files of the cache to do (see `shard_range`). Returns the manifest, or None while other
    files are to be done. Raises UserError when the folder holds the states of another encoder or of other data.
    """
    if any(p.requires_grad for p in text.parameters()):
        raise UserError("encode_text: this text encoder is one that is trained; the states of a frozen one alone stay valid")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = text.to(device).eval()
    blocks = [
        {"name": source.block_name(number), "length": length, "identity": source.identity(number)}
        for number, length in enumerate(source.blocks)
    ]
    made_by = {
        "format": FORMAT, "encoder": text.fingerprint(), "stored": stored, "shard": captions_a_file,
        "widths": list(text.widths), "pooled_width": text.pooled_width,
        "blocks_hash": text_hash("".join(block["identity"] for block in blocks)),
    }  # fmt: skip
    _refuse_others(folder, made_by)
    places = _numbered(source, folder, [block["name"] for block in blocks], made_by["blocks_hash"])
    names = [f"{number:05d}.text" for number in range(-(-len(places) // captions_a_file))]
    chosen = shard_range(shards, len(names))
    with tqdm(total=min(len(places), len(chosen) * captions_a_file), desc=f"→ {folder}", unit="caption", mininterval=0.5) as bar:
        for number in chosen:
            name, own = names[number], places[number * captions_a_file : (number + 1) * captions_a_file]
            record = folder / f"{name}.json"
            if not (record.exists() and _opens(folder / f"{name}.safetensors")):
                truncated = text.truncated
                captions = [source.read_text(index).captions[which] for index, which in own.tolist()]
                arrays, error = _encode(text, captions, stored, batch_size, bar)
                with whole_file(folder / f"{name}.safetensors") as file:
                    file.write(save(arrays))
                told = {"captions": len(own), "truncated": text.truncated - truncated, "error": error}
                write_json(record, {**made_by, **told})  # last: it says that the file is whole
            else:
                bar.update(len(own))
    # Last, since other tasks have worked meanwhile.
    records = [read_json(record) if (record := folder / f"{name}.json").exists() else None for name in names]
    if None in records:
        return None
    count = sum(record["captions"] for record in records)
    manifest = {
        **made_by, "source": source.name, "blocks": blocks, "captions": count,
        "truncated": sum(record["truncated"] for record in records),
        "error": max((record["error"] for record in records), default=0.0),
    }  # fmt: skip
    write_json(folder / MANIFEST, manifest)
    return manifest


def _opens(path: Path) -> bool:
    """Whether a file of arrays is there, and whole."""
    try:
        Arrays(open_map(path))
    except (OSError, ValueError, KeyError, struct.error):
        return False
    return True


def _refuse_others(folder: Path, made_by: dict[str, Any]) -> None:
    """Raise UserError where the folder holds files that something else made."""
    for record in sorted(folder.glob("*.text.json")):
        found = read_json(record)
        differing = [key for key, value in made_by.items() if found.get(key) != value]
        if differing:
            named = ", ".join("source shards" if key == "blocks_hash" else key for key in differing)
            raise UserError(f"{folder} holds text states that differ in {named} ({record.name}); choose another folder, or "
                            "delete this one")  # fmt: skip


def _numbered(source: Source, folder: Path, names: list[str], blocks_hash: str) -> np.ndarray:
    """(captions, 2) int64, where each stands first: the sample, and which of its captions. They are numbered once, and which
    samples have which is written; what runs beside or after that, reads it.
    """
    record, path = folder / "captions.json", folder / "captions.npy"
    whole = record.is_file() and read_json(record) == {"blocks_hash": blocks_hash}
    if whole and all(_opens(folder / f"{name}.captions.safetensors") for name in names):
        with suppress(OSError, ValueError, EOFError):
            return np.load(path, allow_pickle=False)
    record.unlink(missing_ok=True)  # which may be of other data, or of files that are gone
    places = np.array(list(_number(source, folder, names)), dtype=np.int64).reshape(-1, 2)
    with whole_file(path) as file:
        np.save(file, places, allow_pickle=False)
    write_json(record, {"blocks_hash": blocks_hash})  # last: it says that all is there
    return places


def _number(source: Source, folder: Path, names: list[str]) -> Iterator[tuple[int, int]]:
    """Where each caption stands first, in the order of the source; on the way, write which samples have which."""
    numbers: dict[bytes, int] = {}
    ends = np.cumsum(source.blocks)
    for name, end, length in tqdm(
        list(zip(names, ends, source.blocks, strict=True)), desc="captions", unit="shard", mininterval=0.5
    ):
        rows, of_block = [0], []
        for index in range(end - length, end):
            for which, caption in enumerate(_captions(source, index)):
                key = hashlib.blake2b(caption.encode("utf-8", "surrogateescape"), digest_size=16).digest()
                if key not in numbers:
                    numbers[key] = len(numbers)
                    yield int(index), which
                of_block.append(numbers[key])
            rows.append(len(of_block))
        arrays = {"rows": np.array(rows, dtype=np.int64), "captions": np.array(of_block, dtype=np.int64)}
        with whole_file(folder / f"{name}.captions.safetensors") as file:
            file.write(save(arrays))


def _captions(source: Source, index: int) -> list[str]:
    try:
        return source.read_text(int(index)).captions
    except SampleError:
        return []  # nobody will ask for them


def _encode(
    text: TextEncoder, captions: list[str], stored: Stored, batch_size: int, bar: tqdm
) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of a file, and the error of its states: root of the mean square, as a share of the states' own."""
    # Of like length in one pass: padding is not stored, but computed.
    order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
    rows: list[list[Tensor]] = [[torch.empty(0)] * len(captions) for _ in text.widths]
    pooled = torch.zeros(len(captions), text.pooled_width)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        condition: Condition = text([captions[i] for i in chosen]).map(lambda x: x.cpu())
        for stream, (states, mask) in enumerate(zip(condition.states, condition.masks, strict=True)):
            lengths = mask.sum(1)
            if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]):
                raise UserError(f"encode_text: {type(text).__name__} puts padding before words, which a cache does not hold")
            for i, state, length in zip(chosen, states.float(), lengths.tolist(), strict=True):
                rows[stream][i] = state[:length]
        if condition.pooled is not None:
            pooled[chosen] = condition.pooled.float()
        bar.update(len(chosen))
    arrays, squared, total = {"pooled": pooled.numpy()}, 0.0, 0.0
    for stream, found in enumerate(rows):
        states = torch.cat(found)
        packed: Packed = pack_states(states, stored)
        squared += float((unpack_states(packed, stored).float() - states).square().sum())
        total += float(states.square().sum())
        arrays[f"ends{stream}"] = np.cumsum([0, *map(len, found)], dtype=np.int64)
        arrays[f"states{stream}"] = packed.values
        if packed.scale is not None:
            arrays[f"scale{stream}"] = packed.scale
    if not np.isfinite(squared):
        raise UserError(f"encode_text: states do not fit into {stored}; choose another --dtype")
    return arrays, (squared / max(total, 1e-30)) ** 0.5


def find_text(path: str) -> TextEncoder:
    """The text encoder of a part folder, a model folder, a run, or a recipe (which names a frozen one)."""
    folder = Path(path)
    for inner in (folder, folder / "text", folder / "model/text"):
        if (inner / "config.json").is_file() and "class_path" in read_json(inner / "config.json"):
            part = load_part(inner)
            if not isinstance(part, TextEncoder):
                raise UserError(f"{inner} is a {type(part).__name__}, and no text encoder")
            return part.requires_grad_(False)
    if folder.is_dir():
        raise UserError(f"{path} holds no text encoder: name its folder, a model folder, a run's, or a recipe")
    recipe = recipes.load([path])
    text = recipe.config.get("model", {}).get("init_args", {}).get("text")
    if not isinstance(text, dict):
        raise recipe.error("model.init_args.text", "names no text encoder")
    try:
        part = build(text)
    except (TypeError, ValueError) as error:
        raise recipe.error("model.init_args.text", f"cannot be built: {error}") from error
    if any(isinstance(encoder, ScratchTextEncoder) for encoder in getattr(part, "encoders", [part])):
        raise recipe.error("model.init_args.text", "has weights from init_from: name that run or model folder, not the recipe")
    return part


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_shards(arguments)
    arguments.add_argument("model", help="folder of a text encoder, or of a model or run that has one, or a recipe")
    arguments.add_argument("out", help="folder for the states")
    arguments.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16", "int8"], default="float16", help="of stored states"
    )
    arguments.add_argument("--batch-size", type=at_least(1), default=64, help="captions a pass; default: 64")
    add_device(arguments)
    add_shard_range(arguments)
    parsed = arguments.parse_args(argv)

    def work() -> str:
        manifest = encode_text(
            find_text(parsed.model),
            open_source(parsed.shards, index_folder=parsed.index_folder),
            parsed.out,
            stored=parsed.dtype,
            batch_size=parsed.batch_size,
            device=parsed.device,
            shards=parsed.shard_range,
        )
        if manifest is None:
            return f"{parsed.out}: these files are done; others are not yet"
        return (
            f"{parsed.out}: states of {manifest['captions']:,} captions, "
            f"{manifest['truncated'] / max(1, manifest['captions']):.1%} "
            f"of which did not fit; stored as {parsed.dtype}, {manifest['error']:.1e} off"
        )

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
