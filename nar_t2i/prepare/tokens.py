"""Shards + a trained tokenizer → a token cache, from which the generator trains without opening images.

    encode_tokens.py SHARDS MODEL OUT

Any source and any tokenizer will do; `nar_t2i.data.token_cache` reads it. Run the same command again after an interruption.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from nar_t2i.data.opening import open_source
from nar_t2i.data.reading import BatchReader, Choices, Read, View, make_batch, reads
from nar_t2i.data.source import Sample, Source
from nar_t2i.data.token_cache import CONDITIONS, FORMAT, MANIFEST, pack
from nar_t2i.errors import UserError
from nar_t2i.files import read_json, whole_file, write_json
from nar_t2i.folders import load_part
from nar_t2i.hashing import weights_hash
from nar_t2i.pixels import to_float
from nar_t2i.prepare.command import add_device, add_shard_range, add_shards, at_least, parser, run, shard_range
from nar_t2i.types import Batch, TokenCodec, TokenSpec

PREPROCESSING = "shorter side to {size} px (Lanczos), cropped, [-1, 1]"


@torch.inference_mode()
def encode_tokens(
    codec: TokenCodec,
    source: Source,
    folder: str | Path,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device = "cpu",
    float_dtype: str = "float16",
    shards: str = "0:",
    crops: int = 1,
    flips: bool = False,
    errors: bool = False,
) -> dict[str, Any] | None:
    """Encode every image of a source, block by block; blocks that are finished are kept, so it can be interrupted.

    batch_size: images a pass. workers: processes that read. float_dtype: "float16" or "float32", of continuous tokens.
    shards: the blocks to do (see `shard_range`). crops: an image, odd, evenly spread along its longer side. flips: mirrored
    images too. errors: squared quantisation errors too. Returns the manifest, or None while other blocks are to be done. Raises
    UserError when the folder holds the tokens of another codec or of other data.
    """
    if crops < 1 or crops % 2 == 0:
        raise UserError(f"--crops: must be odd, so that one is the middle, not {crops}")
    looks = [
        (place, flip)
        for place in (np.linspace(0, 1, crops) if crops > 1 else [0.5])
        for flip in ((False, True) if flips else (False,))
    ]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    codec = codec.to(device).eval()
    made_by = {
        "format": FORMAT,
        "spec": json.loads(json.dumps(asdict(codec.spec))),  # as JSON gives it back: lists for tuples
        "codec": weights_hash(codec),
        "preprocessing": PREPROCESSING.format(size=codec.image_size),
        "float_dtype": float_dtype if codec.spec.kind == "continuous" else None,
        "crops": crops,
        "flips": flips,
        "errors": errors,
        **({"crop_left": "mirrored where the image is"} if flips else {}),  # which earlier versions did not; one cache has one kind
    }
    starts = np.concatenate([[0], np.cumsum(source.blocks)])
    chosen = shard_range(shards, len(source.blocks))
    wanted = [
        {**made_by, "name": source.block_name(number), "length": length, "identity": source.identity(number)}
        for number, length in enumerate(source.blocks)
    ]
    todo = [number for number in chosen if _finished(folder, wanted[number], len(looks)) is None]
    spans = [range(starts[number], starts[number + 1]) for number in todo]
    reader = _LooksReader(source, View(codec.image_size), looks)
    # One loader for all blocks, whose processes read on while a block is written.
    loader = reads(DataLoader(reader, batch_sampler=_Batches(spans, batch_size), collate_fn=lambda read: read, num_workers=workers))
    images = int(sum(source.blocks[number] for number in chosen))
    finished = images - sum(map(len, spans))
    with tqdm(total=images, initial=finished, desc=f"→ {folder}", unit="image", mininterval=0.5) as bar:
        for number, span in zip(todo, spans, strict=True):
            block = wanted[number]
            arrays, lost = _encode_block(codec, loader, span, looks, errors, batch_size, device, bar)
            arrays["tokens"] = pack(arrays["tokens"], codec.spec, float_dtype)
            for kind, array in arrays.items():
                with whole_file(folder / f"{block['name']}.{kind}.npy") as file:
                    np.save(file, array, allow_pickle=False)
            write_json(folder / f"{block['name']}.tokens.json", {**block, "lost": lost})  # last: it says that the block is whole
    blocks = [_finished(folder, block, len(looks)) for block in wanted]  # last, since other tasks have worked meanwhile
    if None in blocks:
        return None
    told = [{key: block[key] for key in ("name", "length", "identity", "lost")} for block in blocks]
    manifest = {**made_by, "source": source.name, "blocks": told}
    write_json(folder / MANIFEST, manifest)
    return manifest


def _finished(folder: Path, wanted: dict[str, Any], looks: int) -> dict[str, Any] | None:
    """The record of a block that an earlier run finished; None where its arrays are not there, or not whole. Raises UserError
    when it is of something else.
    """
    record = folder / f"{wanted['name']}.tokens.json"
    if not record.exists():
        return None
    found = read_json(record)
    differing = [key for key, value in wanted.items() if found.get(key) != value]
    if differing:
        raise UserError(
            f"{folder} holds tokens that differ in {', '.join(differing)} (block {wanted['name']}); "
            "choose another folder, or delete this one"
        )
    for kind in ("tokens", "conditions", *(["errors"] if wanted["errors"] else [])):
        try:
            if len(np.load(folder / f"{wanted['name']}.{kind}.npy", mmap_mode="r", allow_pickle=False)) != looks * wanted["length"]:
                return None
        except (OSError, ValueError, EOFError):
            return None
    return found


class _Batches:
    """Batches of indices, none of which reaches from one span into another."""

    def __init__(self, spans: list[range], size: int):
        self._spans, self._size = spans, size

    def __iter__(self) -> Iterator[np.ndarray]:
        for span in self._spans:
            for first in span[:: self._size]:
                yield np.arange(first, min(first + self._size, span.stop))


def _encode_block(
    codec: TokenCodec,
    loader: Iterator[Read],
    span: range,
    looks: list[tuple[float, bool]],
    errors: bool,
    batch_size: int,
    device: str | torch.device,
    bar: tqdm,
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, str]]]:
    """What a block's files hold, a row a look at a sample of the span, and the samples that could not be read, with key and
    reason.
    """
    spec, rows = codec.spec, len(span) * len(looks)
    arrays = {"tokens": np.zeros((rows, spec.length, *spec.value_shape), dtype=spec.blank(0).numpy().dtype),
              "conditions": np.zeros((rows, len(CONDITIONS)), dtype=np.float32)}  # fmt: skip
    if errors:
        arrays["errors"] = np.zeros((rows, spec.length), dtype=np.float16)
    lost: dict[str, tuple[str, str]] = {}
    for batch in _Batches([span], batch_size):
        read = next(loader)
        present = np.array([], dtype=np.int64) if read.batch is None else read.batch.ids.numpy()
        missing = np.setdiff1d(batch, present)  # sorted, like the lost samples, which come in the order of the batch
        for index, sample in zip(missing, read.lost_samples):
            lost[str(index - span.start)] = (sample.key, sample.reason)
        if read.batch is not None:
            encoded = codec.encode(to_float(read.batch.images.to(device)))
            at = ((present - span.start)[:, None] * len(looks) + np.arange(len(looks))).ravel()
            arrays["tokens"][at] = _checked(encoded.tokens, spec)
            arrays["conditions"][at] = torch.stack([read.batch.scalars[name] for name in CONDITIONS], 1).numpy()
            if errors:
                if encoded.error is None:
                    raise UserError("--errors: this tokenizer has no quantisation errors")
                arrays["errors"][at] = encoded.error.cpu().numpy()
        bar.update(len(batch))
    return arrays, lost


class _LooksReader(BatchReader):
    """Reads every sample once, and yields all looks at it, side by side."""

    def __init__(self, source: Source, view: View, looks: list[tuple[float, bool]]):
        super().__init__(source, view, order=None)
        self._looks = looks

    def _next_readable(self, index: int) -> tuple[list[Sample], list[int]]:
        """None: a row belongs to its own sample, or to no sample."""
        return [], []

    def _batch(self, samples: list[Sample], ids: torch.Tensor) -> Batch:
        each = [make_batch(samples, ids, self._view, Choices.fixed(len(ids), *look)) for look in self._looks]
        images = torch.stack([batch.images for batch in each], 1).flatten(0, 1)
        scalars = {name: torch.stack([batch.scalars[name] for batch in each], 1).flatten() for name in CONDITIONS}
        return each[0]._replace(images=images, scalars=scalars)


def _checked(tokens: torch.Tensor, spec: TokenSpec) -> np.ndarray:
    """The tokens as an array. Raises UserError when they are not what the codec's spec says."""
    tokens = tokens.cpu()
    if spec.kind == "continuous":
        right = bool(torch.isfinite(tokens).all())
    else:
        right = bool(((tokens >= 0) & (tokens < (spec.size if spec.kind == "categorical" else 2))).all())
    if tokens.shape[1:] != (spec.length, *spec.value_shape) or not right:
        raise UserError(f"the codec's tokens, {tuple(tokens.shape)} {tokens.dtype}, do not agree with its {spec}")
    return tokens.to(spec.dtype).numpy()


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_shards(arguments)
    arguments.add_argument("tokenizer", help="folder of a saved tokenizer, or of a model that has one")
    arguments.add_argument("out", help="folder for the tokens")
    arguments.add_argument("--batch-size", type=at_least(1), default=64, help="images a pass; default: 64")
    arguments.add_argument("--workers", type=at_least(0), default=0, help="processes that read; default: 0")
    add_device(arguments)
    arguments.add_argument("--float-dtype", choices=["float16", "float32"], default="float16", help="of continuous tokens")
    arguments.add_argument("--crops", type=at_least(1), default=1, help="an image, odd, spread along its longer side; default: 1")
    arguments.add_argument("--flip-safe", action="store_true", help="mirrored images too: no caption says left or right")
    arguments.add_argument("--errors", action="store_true", help="squared quantisation errors too")
    add_shard_range(arguments)
    parsed = arguments.parse_args(argv)

    def work() -> str:
        codec = load_part(find_tokenizer(parsed.tokenizer))
        source = open_source(parsed.shards, index_folder=parsed.index_folder)
        manifest = encode_tokens(
            codec,
            source,
            parsed.out,
            batch_size=parsed.batch_size,
            workers=parsed.workers,
            device=parsed.device,
            float_dtype=parsed.float_dtype,
            shards=parsed.shard_range,
            crops=parsed.crops,
            flips=parsed.flip_safe,
            errors=parsed.errors,
        )
        if manifest is None:
            return f"{parsed.out}: these shards are done; others are not yet"
        lost = sum(len(block["lost"]) for block in manifest["blocks"])
        return f"{parsed.out}: tokens of {len(source) - lost} images; {lost + source.lost_count} could not be read"

    return run(work)


def find_tokenizer(folder: str | Path) -> Path:
    """The folder itself, or the tokenizer's within a model folder."""
    inner = Path(folder) / "tokenizer"
    return inner if inner.is_dir() else Path(folder)


if __name__ == "__main__":
    sys.exit(main())
