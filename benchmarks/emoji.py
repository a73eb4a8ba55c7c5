"""Emoji models side by side: is a picture nearer to its own emoji than to all others?

    python benchmarks/emoji.py scratch=runs/emoji/scratch/model minilm=runs/emoji/minilm/model --out docs/results/emoji

For each model: retrieval (`nar_t2i.evaluation.retrieval`) of pictures drawn from names seen in training, from held-out
ones and from names never heard; beside what its tokenizer's reconstructions reach, and what pictures of other names do.
Writes metrics.json and a grid of real, reconstructed and drawn pictures. All emoji of the machine are the gallery.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks import results
from nar_t2i.errors import UserError
from nar_t2i.evaluation.retrieval import FeatureNetwork, retrieve, train_features
from nar_t2i.files import write_json
from nar_t2i.hardware import describe_machine
from nar_t2i.pictures import contact_sheet
from nar_t2i.pipeline import TextToImage
from nar_t2i.pixels import to_float, to_uint8
from nar_t2i.prepare.emoji import Emoji, EmojiPictures, read_emoji, split_emoji
from nar_t2i.types import TokenCodec

SHOWN = {"train": 8, "held_out": 8, "unseen": 4}  # names on the grid, of each split, evenly spread


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", default="docs/results/emoji")
    parser.add_argument("--seen", type=results.positive, default=500, help="names seen in training that are drawn; default: 500")
    parser.add_argument("--feature-steps", type=results.positive, default=1500)
    parsed = parser.parse_args()
    models = dict(model.split("=", 1) for model in parsed.models)
    emoji = read_emoji()
    splits: dict[str, list[Emoji]] = split_emoji(emoji)
    splits["train"] = spread(splits["train"], parsed.seen)
    pipelines = {name: TextToImage.from_pretrained(folder) for name, folder in models.items()}
    size = next(iter(pipelines.values())).tokenizer.image_size
    if any(t2i.tokenizer.image_size != size for t2i in pipelines.values()):
        raise UserError("models that draw at different sizes do not compare")
    gallery = pictures(emoji, size)
    network = train_features(gallery, parsed.feature_steps)
    number = {e.text: i for i, e in enumerate(emoji)}
    own = {name: [number[e.text] for e in part] for name, part in splits.items()}
    metrics: dict[str, Any] = {
        "command": results.command(), "machine": describe_machine(), "size": size, "gallery": len(emoji),
        "feature_steps": parsed.feature_steps, "models": {},
    }  # fmt: skip
    rows = {}
    for name, t2i in pipelines.items():
        metrics["models"][name], rows[name] = score(t2i, splits, own, gallery, network)
        print(name, metrics["models"][name], flush=True)
    out = Path(parsed.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", metrics)
    grid(splits, own, gallery, rows).save(out / "grid.png")
    return 0


def score(
    t2i: TextToImage, splits: dict[str, list[Emoji]], own: dict[str, list[int]], gallery: Tensor, network: FeatureNetwork
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metrics of one model by split, and its pictures, (n, 3, size, size) uint8: those drawn for each split, and under
    "SPLIT reconstructed" what its tokenizer makes of the emoji themselves. Name i is drawn with seed i. own: the place in the
    gallery of each emoji of a split. network: what pictures are compared by.
    """
    metrics: dict[str, Any] = {}
    drawn: dict[str, Tensor] = {}
    for split, part in splits.items():
        drawn[split] = t2i.sample([e.name for e in part]).images
        metrics[split] = retrieve(network, drawn[split], gallery, own[split])._asdict()
        metrics[split]["shuffled"] = retrieve(network, drawn[split], gallery, own[split][1:] + own[split][:1])._asdict()
        kept = reconstructed(t2i.tokenizer, gallery[own[split]])
        metrics[split]["reconstructed"] = retrieve(network, kept, gallery, own[split])._asdict()
        drawn[f"{split} reconstructed"] = kept
    return metrics, drawn


@torch.no_grad()
def reconstructed(codec: TokenCodec, images: Tensor) -> Tensor:
    """(n, 3, size, size) uint8 images as the tokenizer gives them back."""
    return torch.cat([to_uint8(codec.decode(codec.encode(to_float(part)).tokens)) for part in images.split(64)])


def pictures(emoji: list[Emoji], size: int) -> Tensor:
    """(n, 3, size, size) uint8."""
    source = EmojiPictures(emoji, size)
    return torch.stack([torch.tensor(source.read(i).image).permute(2, 0, 1) for i in tqdm(range(len(emoji)), desc="emoji")])


def spread(part: list[Emoji], count: int) -> list[Emoji]:
    """`count` of them, evenly spread."""
    return part if count >= len(part) else [part[i * len(part) // count] for i in range(count)]


def grid(
    splits: dict[str, list[Emoji]], own: dict[str, list[int]], gallery: Tensor, rows: dict[str, dict[str, Tensor]]
) -> Image.Image:
    """A row a name: the emoji, its reconstruction by the first model's tokenizer, and what each model drew. own and rows: as
    `score` takes and gives them, of each model."""
    images, captions = [], []
    first = next(iter(rows.values()))
    for split, count in SHOWN.items():
        for emoji in spread(splits[split], count):
            at = splits[split].index(emoji)
            cells = [("", gallery[own[split][at]]), ("reconstructed", first[f"{split} reconstructed"][at])]
            cells += [(name, drawn[split][at]) for name, drawn in rows.items()]
            images += [Image.fromarray(image.permute(1, 2, 0).numpy()) for _, image in cells]
            captions += [f"{split}: {emoji.name}", *(name for name, _ in cells[1:])]
    return contact_sheet(images, captions, columns=2 + len(rows), side=128)


if __name__ == "__main__":
    results.program(main)
