"""Train the network of scene features that travels with the package: `python data_prep/train_scene_features.py [folder]`.

Only to be run again after a change of the scenes or of the network; distances by other weights are other distances. Takes
about two minutes of one core, and prints how many of the answers are right on new scenes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nar_t2i.evaluation.scene_features import accuracy, train
from nar_t2i.folders import save_part
from nar_t2i.prepare.command import at_least, parser, run

ASSETS = Path(__file__).resolve().parent.parent / "nar_t2i" / "assets" / "scene_features"


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("folder", nargs="?", type=Path, default=ASSETS, help="where to write; default: the package")
    arguments.add_argument("--scenes", type=at_least(64), default=24_000, help="default: 24,000")
    arguments.add_argument("--epochs", type=at_least(1), default=6, help="default: 6")
    arguments.add_argument("--seed", type=int, default=0)
    parsed = arguments.parse_args()
    return run(lambda: write(parsed.folder, parsed.scenes, parsed.epochs, parsed.seed))


def write(folder: Path, scenes: int, epochs: int, seed: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    network = train(scenes, epochs, seed=seed)
    save_part(network, folder, torch.float16)
    return ", ".join(f"{name} {share:.3f}" for name, share in accuracy(network).items())


if __name__ == "__main__":
    sys.exit(main())
