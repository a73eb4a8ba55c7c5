"""Train the network of scene features that travels with the package: `python data_prep/train_scene_features.py [folder]`.

Only to be run again after a change of the scenes or of the network; distances by other weights are other distances. Takes
about two minutes of one core, and prints how many of the answers are right on new scenes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nar_t2i.evaluation.scene_features import accuracy, train
from nar_t2i.folders import save_part

ASSETS = Path(__file__).resolve().parent.parent / "nar_t2i" / "assets" / "scene_features"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ASSETS, help="where to write; default: the package")
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = train(arguments.scenes, arguments.epochs, seed=arguments.seed)
    print(", ".join(f"{name} {share:.3f}" for name, share in accuracy(network).items()))
    save_part(network, arguments.folder, torch.float16)


if __name__ == "__main__":
    main()
