"""Write the scene prompts that travel with the package: `python data_prep/make_scene_prompts.py [folder]`.

The same code always writes the same bytes, so this is only to be run again after a change of the scenes, the captions
or the categories. Takes a few seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nar_t2i.evaluation.prompt_generator import generate
from nar_t2i.evaluation.scene_prompts import save

ASSETS = Path(__file__).resolve().parent.parent / "nar_t2i" / "assets" / "prompts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ASSETS, help="where to write; default: the package")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for which in ("seen", "held_out"):
        prompts = generate(which)
        save(prompts, folder / f"{which}.jsonl")
        print(f"{folder / f'{which}.jsonl'}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
