"""Samples a second of what a training run reads, beside plain webdataset and torch.utils.data over the same pictures.

    python benchmarks/data.py                     # 256 px, 1,024 tokens: minutes
    python benchmarks/data.py --small             # 64 px, 64 tokens: seconds

One run renders scenes, writes them as shards, as single files and as tars of arrays, and makes the caches, with a tokenizer and
a text encoder of random weights. Then the sides take turns; each number is the median over the rounds, and each ratio is taken
within a round. Every side must give the same samples once an epoch, keys, captions and contents: else nothing is reported.

    shards                  our shards, decoded: images
    webdataset, images      the same tars, decoded by webdataset, unshuffled
    files                   torch.utils.data over one file a picture and one a caption, shuffled
    encoded anew            our shards, decoded and encoded by the tokenizer: tokens
    cached                  our token cache: tokens
    webdataset, arrays      tars of the same tokens as .npy
    encoded anew, states    our token cache, and captions encoded by the text encoder: tokens and text states
    cached, states          our token and text caches
    webdataset, states      tars of the same tokens and states as .npy
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import results
from benchmarks.small import SMALL_BERT
from benchmarks.timing import line
from nar_t2i import recipe
from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.errors import UserError
from nar_t2i.parts import build
from nar_t2i.pixels import to_float
from nar_t2i.prepare.rendering import write_source
from nar_t2i.prepare.text import encode_text
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.text import BertTextEncoder
from nar_t2i.types import Condition

# What the tokenizer says does not matter here, only how much.
THIN = {"channels": [16], "patch": 8, "blocks": 1, "attention": False}
CODES = 1024  # two bytes a token, as the recipe's 8,192
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


# The sides of ours that those of a group are compared with.
OURS = {"images": ("cached", "shards"), "tokens": ("cached",), "states": ("cached, states",)}


class Samples(NamedTuple):
    """A batch. contents: (B, …) images or tokens. states: (B, L, D), padded, and which are words, or None."""

    keys: list[str]
    captions: list[str]
    contents: Tensor
    states: tuple[Tensor, Tensor] | None = None


class Side(NamedTuple):
    """group: sides of one group give the same samples. exact: contents are compared bit by bit."""

    group: str
    batches: Callable[[int], Iterator[Samples]]  # of so many workers, without end
    exact: bool = True


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="64 pixels a side, for a few seconds")
    parser.add_argument("--samples", type=results.positive, help="default: 1024, or 256 with --small")
    parser.add_argument("--batch-size", type=results.positive, default=32)
    parser.add_argument("--workers", type=results.whole, nargs="+", default=[0, 1], help="processes that read; default: 0 1")
    parser.add_argument("--rounds", type=results.positive, default=5)
    parser.add_argument("--seconds", type=float, help="of each side in each round; default: 1, or 0.2 with --small")
    parser.add_argument("--out", default=str(results.FOLDER / "data.json"))
    parsed = parser.parse_args()
    samples = parsed.samples or (256 if parsed.small else 1024)
    if samples % parsed.batch_size:
        raise UserError(f"--samples {samples} is no multiple of --batch-size {parsed.batch_size}")
    results.write(parsed.out, [])  # what is broken off leaves no older file behind
    with tempfile.TemporaryDirectory() as folder:
        material = Material(Path(folder), samples, parsed.batch_size, parsed.small)
        rows = measure(material.sides(), samples, parsed.workers, parsed.rounds, parsed.seconds or (0.2 if parsed.small else 1.0))
        for row in rows:
            row["bytes_a_sample"] = material.bytes_a_sample(row["side"])
        results.write(parsed.out, rows, samples=samples, batch_size=parsed.batch_size, rounds=parsed.rounds,
                      pixels=material.codec.image_size, tokens=material.codec.spec.length)  # fmt: skip
    for row in rows:
        print(line(row))
    return 0


class Material:
    """The same rendered scenes in every form that a side reads."""

    def __init__(self, folder: Path, samples: int, batch_size: int, small: bool):
        self.folder, self.batch_size = folder, batch_size
        codec = recipe.load("emage/tokenizer").config["model"]["init_args"]["codec"]
        codec["init_args"].update(THIN | ({"image_size": 64} if small else {}))
        codec["init_args"]["quantizer"]["init_args"]["codes"] = CODES
        torch.manual_seed(0)
        self.codec = build(codec).eval()
        # One caption a picture: of several, training draws one.
        scenes = RenderedScenes(count=samples, image_size=self.codec.image_size, captions=1)
        write_source(scenes, folder / "shards", samples_per_shard=-(-samples // 4))
        source = self.ours(False, False).source("train")
        encode_tokens(self.codec, source, folder / "tokens")
        self.text = self.text_encoder([source.read_text(index).captions[0] for index in range(len(source))], small)
        encode_text(self.text, source, folder / "states")
        self.write_files()
        self.write_arrays()

    def text_encoder(self, captions: list[str], small: bool) -> BertTextEncoder:
        """Of MiniLM's size and with random weights; its vocabulary is the captions'."""
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = [*special, *sorted({word for caption in captions for word in caption.lower().split()})]
        folder = self.folder / "bert"
        config = transformers.BertConfig(vocab_size=len(words), **(SMALL_BERT if small else MINILM))
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        transformers.BertTokenizer(vocab={word: code for code, word in enumerate(words)}).save_pretrained(folder)
        return BertTextEncoder(str(folder))

    def write_files(self) -> None:
        """Every sample as a picture and a text."""
        (self.folder / "files").mkdir()
        for key, caption, images, _ in _rows(self.shards(0), self.count):
            Image.fromarray(images.permute(1, 2, 0).numpy()).save(self.folder / "files" / f"{key}.png")
            (self.folder / "files" / f"{key}.txt").write_text(caption)

    def write_arrays(self) -> None:
        """As tars of .npy members, as many of them as shards: tokens as small as in the cache, states as they are stored."""
        smallest, tars = np.min_scalar_type(self.codec.spec.size - 1), len(self.tars)
        for name, batches in (("arrays", self.cached(0)), ("state-arrays", self.cached_states(0))):
            (self.folder / name).mkdir()
            rows = _rows(batches, self.count)
            for tar in range(tars):
                with webdataset.TarWriter(str(self.folder / name / f"{tar:05d}.tar")) as writer:
                    for key, caption, tokens, states in itertools.islice(rows, -(-self.count // tars)):
                        members = {"__key__": key, "txt": caption, "tokens.npy": tokens.numpy().astype(smallest)}
                        if states is not None:
                            members["states.npy"] = states.numpy()
                        writer.write(members)

    @property
    def tars(self) -> list[str]:
        """The shards' paths, in order."""
        return sorted(map(str, (self.folder / "shards").glob("*.tar")))

    @property
    def count(self) -> int:
        """Samples."""
        return len(self.ours(False, False).source("train"))

    def bytes_a_sample(self, side: str) -> float:
        """On the disk."""
        shards, tokens, states = ("shards", ".tar"), ("tokens", ".tokens.npy"), ("states", ".safetensors")
        read = {
            "webdataset, arrays": [("arrays", ".tar")],
            "webdataset, states": [("state-arrays", ".tar")],
            "cached": [tokens],
            "cached, states": [tokens, states],
            "encoded anew, states": [tokens],
            "files": [("files", "")],
        }.get(side, [shards])
        return sum(path.stat().st_size for folder, end in read for path in (self.folder / folder).glob(f"*{end}")) / self.count

    def sides(self) -> dict[str, Side]:
        """By the names that the module's docstring explains; the first of each group is what the others must agree with."""
        return {
            "shards": Side("images", self.shards),
            "webdataset, images": Side("images", self.webdataset_images),
            "files": Side("images", self.files),
            "cached": Side("tokens", self.cached),
            "webdataset, arrays": Side("tokens", lambda workers: self.webdataset_arrays("arrays", workers)),
            "encoded anew": Side("tokens", self.encoded, exact=False),
            "cached, states": Side("states", self.cached_states),
            "webdataset, states": Side("states", lambda workers: self.webdataset_arrays("state-arrays", workers)),
            "encoded anew, states": Side("states", self.encoded_states, exact=False),
        }

    def ours(self, cached: bool, states: bool, workers: int = 0) -> CaptionedImages:
        """The package's own reader. cached: tokens instead of images. states: of a cache as well. workers: processes."""
        return CaptionedImages(
            train=str(self.folder / "shards"), image_size=self.codec.image_size, global_batch_size=self.batch_size, workers=workers,
            cache=str(self.folder / "tokens") if cached else None, text_cache=str(self.folder / "states") if states else None,
        )  # fmt: skip

    def shards(self, workers: int) -> Iterator[Samples]:
        """The side of this name, without end, read by so many processes; so are those below."""
        for batch in self.ours(False, False, workers).train_dataloader():
            yield Samples(batch.keys, batch.captions, batch.images)

    def cached(self, workers: int) -> Iterator[Samples]:
        """The side of this name."""
        for batch in self.ours(True, False, workers).train_dataloader():
            yield Samples(batch.keys, batch.captions, batch.tokens)

    def cached_states(self, workers: int) -> Iterator[Samples]:
        """The side "cached, states"."""
        for batch in self.ours(True, True, workers).train_dataloader():
            yield Samples(batch.keys, batch.captions, batch.tokens, _first_stream(batch.condition))

    @torch.no_grad()
    def encoded(self, workers: int) -> Iterator[Samples]:
        """The side "encoded anew"."""
        for keys, captions, images, _ in self.shards(workers):
            yield Samples(keys, captions, self.codec.encode(to_float(images)).tokens)

    @torch.no_grad()
    def encoded_states(self, workers: int) -> Iterator[Samples]:
        """The side "encoded anew, states"."""
        for keys, captions, tokens, _ in self.cached(workers):
            yield Samples(keys, captions, tokens, _first_stream(self.text(captions)))

    def webdataset_images(self, workers: int) -> Iterator[Samples]:
        """The side "webdataset, images"."""
        for keys, captions, images in self.webdataset(self.tars, "rgb8", ("png",), workers):
            yield Samples(keys, captions, images[0].permute(0, 3, 1, 2).contiguous())

    def webdataset_arrays(self, folder: str, workers: int) -> Iterator[Samples]:
        """The sides "webdataset, arrays" and "webdataset, states", by the folder that holds them."""
        members = ("tokens.npy",) if folder == "arrays" else ("tokens.npy", "states.npy")
        tars = sorted(map(str, (self.folder / folder).glob("*.tar")))
        for keys, captions, (tokens, *states) in self.webdataset(tars, None, members, workers):
            yield Samples(keys, captions, tokens, states[0] if states else None)

    def webdataset(self, tars: list[str], decoder: str | None, members: tuple[str, ...], workers: int) -> Iterator[Any]:
        """(keys, captions, arrays of each member), as webdataset's documentation has it: batches are made in the workers."""
        data = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).repeat()
        # Not the .json beside them, which these sides do not need.
        data = data.decode(*filter(None, [decoder]), only=["txt", *members]).to_tuple("__key__", "txt", *members)
        batches = data.batched(self.batch_size, collation_fn=_together)
        return iter(webdataset.WebLoader(batches, num_workers=workers, batch_size=None))

    def files(self, workers: int) -> Iterator[Samples]:
        """The side of this name."""
        data = Files(self.folder / "files")
        turns = (torch.randperm(len(data)).view(-1, self.batch_size).tolist() for _ in itertools.count())
        order = itertools.chain.from_iterable(turns)
        yield from DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=_collated)


class Files(Dataset):
    """One file a picture and one a caption."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, str, np.ndarray]:
        path = self.paths[index]
        with Image.open(path) as image:
            return path.stem, path.with_suffix(".txt").read_text(), np.asarray(image.convert("RGB"))


def measure(sides: dict[str, Side], count: int, workers: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row a side and number of workers. seconds: of each side in each round. UserError where sides of a group differ."""
    rows = []
    for number in workers:
        agree(sides, count, min(number, 1))
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                rates[name].append(rate(side.batches(number), seconds))
        for name, of_rounds in rates.items():
            row = {"side": name, "workers": number, "samples_per_second": median(of_rounds)}
            for own in OURS[sides[name].group]:
                if own in rates and own != name:
                    ratios = [a / b for a, b in zip(rates[own], of_rounds, strict=True)]
                    short = own.removesuffix(", states")
                    row |= {f"{short}_over_this": median(ratios), f"{short}_over_this_lowest": min(ratios)}
            rows.append(row)
    return rows


def rate(batches: Iterator[Samples], seconds: float) -> float:
    """Samples a second, after two batches."""
    next(batches), next(batches)
    start, samples = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds or not samples:
        samples += len(next(batches).keys)
    if hasattr(batches, "close"):
        batches.close()
    return samples / taken


def agree(sides: dict[str, Side], count: int, workers: int = 0) -> None:
    """UserError where a side does not give each sample of the first of its group once, with the same content. workers: 0 or 1;
    what several of a peer's give is ordered by the time that they take.
    """
    first: dict[str, tuple[str, dict[str, tuple[str, Tensor, Tensor | None]]]] = {}
    for name, side in sides.items():
        epoch = list(itertools.islice(_rows(side.batches(workers), count), count))
        keys = Counter(row[0] for row in epoch)
        samples = {key: (caption, content, states) for key, caption, content, states in epoch}
        other, expected = first.setdefault(side.group, (name, samples))
        if set(keys) != set(expected) or max(keys.values()) != 1:
            raise UserError(f"{name} gives other samples than {other}: {len(set(keys) ^ set(expected))} differ, "
                            f"{sum(n > 1 for n in keys.values())} come more than once")  # fmt: skip
        for key, (caption, content, states) in samples.items():
            if caption != expected[key][0]:
                raise UserError(f"{name} gives sample {key} another caption than {other}: {caption!r}, not {expected[key][0]!r}")
            if side.exact and (_hash(content) != _hash(expected[key][1]) or _hash(states) != _hash(expected[key][2])):
                raise UserError(f"{name} gives sample {key} another content than {other}")
        if not side.exact:
            _agree_closely(name, other, samples, expected)


def _agree_closely(name: str, other: str, samples: dict[str, Any], expected: dict[str, Any]) -> None:
    """What is computed anew is rounded otherwise in another batch: a code in a thousand, and a hundredth in states (float16)."""
    shares, distances = [], [0.0]
    for key, (_, tokens, states) in samples.items():
        _, expected_tokens, expected_states = expected[key]
        shares.append((tokens != expected_tokens).double().mean().item())
        if states is not None:
            distances.append((states.float() - expected_states.float()).abs().max().item())
    if (share := np.mean(shares)) > 1e-3:
        raise UserError(f"{name} gives other tokens than {other}: {share:.1%} of them")
    if max(distances) > 2e-2:
        raise UserError(f"{name} gives other states than {other}: {max(distances):.3f} apart")


def _rows(batches: Iterator[Samples], count: int) -> Iterator[tuple[str, str, Tensor, Tensor | None]]:
    """The first `count` samples: key, caption, content, and states without padding."""
    rows = ((keys[i], captions[i], contents[i], None if states is None else states[0][i][states[1][i]])
            for keys, captions, contents, states in batches for i in range(len(keys)))  # fmt: skip
    return itertools.islice(rows, count)


def _hash(tensor: Tensor | None) -> str:
    """Of values, type and shape; "" of none."""
    if tensor is None:
        return ""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes() + str((tensor.dtype, tensor.shape)).encode()).hexdigest()


def _first_stream(condition: Condition) -> tuple[Tensor, Tensor]:
    return condition.states[0], condition.masks[0]


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """As training needs them: (B, L, D) and (B, L)."""
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


def _together(rows: list[tuple[Any, ...]]) -> tuple[list[str], list[str], list[Any]]:
    """Samples of webdataset as one batch, in the worker that read them."""
    keys, captions, *members = zip(*rows, strict=True)
    first = np.stack(members[0])
    # Codes become int64 here, as in our workers, by NumPy: torch takes many times longer.
    first = first.astype(np.int64) if first.dtype == np.uint16 else first
    padded = [_padded([torch.from_numpy(x) for x in states]) for states in members[1:]]
    return list(keys), list(captions), [torch.from_numpy(first), *padded]


def _collated(rows: list[tuple[str, str, np.ndarray]]) -> Samples:
    keys, captions, images = zip(*rows, strict=True)
    return Samples(list(keys), list(captions), torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous())


if __name__ == "__main__":
    results.program(main)
