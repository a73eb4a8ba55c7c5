"""Rendered scenes → shards.

    render_scenes.py runs/scenes/train --count 20000

Scenes can also be drawn as they are read (`nar_t2i.data.captions.RenderedScenes`); shards are for inspecting them, for
token caches, and for trying out the path that real data takes. Run the same command again after an interruption.
"""

from __future__ import annotations

import sys

from nar_t2i.data.captions import RenderedScenes
from nar_t2i.prepare.command import add_shard_range, at_least, parser, run
from nar_t2i.prepare.rendering import write_source


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("out", help="folder for the shards")
    arguments.add_argument("--split", choices=["train", "validation", "all"], default="train")
    arguments.add_argument("--count", type=at_least(1), default=20_000, help="scenes; default: 20000")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--image-size", type=at_least(1), default=64, help="pixels a side; default: 64")
    arguments.add_argument("--captions", type=at_least(1), default=2, help="wordings of each scene; default: 2")
    arguments.add_argument("--samples-per-shard", type=at_least(1), default=1000, help="default: 1000")
    arguments.add_argument("--workers", type=at_least(0), default=0, help="processes that draw; default: 0")
    add_shard_range(arguments)
    parsed = arguments.parse_args(argv)
    source = RenderedScenes(parsed.split, parsed.count, parsed.seed, parsed.image_size, parsed.captions)

    def work() -> str:
        summary = write_source(source, parsed.out, parsed.samples_per_shard, parsed.workers, parsed.shard_range)
        return f"{parsed.out}: these shards are done; others are not yet" if summary is None else str(summary)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
