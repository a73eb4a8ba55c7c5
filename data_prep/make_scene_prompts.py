"""Write the scene prompts that travel with the package: `python data_prep/make_scene_prompts.py [folder]`.

The same code always writes the same bytes, so this is only to be run again after a change of the scenes, the captions
or the categories. Takes a few seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nar_t2i.evaluation.prompt_generator import generate
from nar_t2i.evaluation.scene_prompts import save
from nar_t2i.prepare.command import parser, run

ASSETS = Path(__file__).resolve().parent.parent / "nar_t2i" / "assets" / "prompts"


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("folder", nargs="?", type=Path, default=ASSETS, help="where to write; default: the package")
    folder = arguments.parse_args().folder
    return run(lambda: write(folder))


def write(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    for which in ("seen", "held_out"):
        prompts = generate(which)
        save(prompts, folder / f"{which}.jsonl")
        told.append(f"{folder / f'{which}.jsonl'}: {len(prompts)} prompts")
    return "\n".join(told)


if __name__ == "__main__":
    sys.exit(main())
