"""Foreign shards → their indices, which a training run would make when it begins, one shard after the other.

    index_shards.py SHARDS --workers 8
    index_shards.py SHARDS --index-folder indices      # where the shards' folder is read-only; for ShardSource's index_folder

Shards that have an index are left as they are. Run the same command again after an interruption.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nar_t2i.data.shard_index import index_path, open_index
from nar_t2i.data.shards import find_tars
from nar_t2i.errors import UserError
from nar_t2i.hardware import usable_cores
from nar_t2i.prepare.command import add_shard_range, add_shards, at_least, parser, run, shard_range


def index_shards(shards: str, index_folder: str | Path | None = None, workers: int = 1, chosen: str = "0:") -> tuple[int, int]:
    """Make the indices that are missing; returns how many samples the chosen shards have, and how many of them were lost.

    index_folder: where they are to stand; none: beside the tars. workers: processes. chosen: shards to do (see `shard_range`).
    Raises UserError where a shard is not readable, or an index cannot be written.
    """
    tars = find_tars(shards)
    own = shard_range(chosen, len(tars))
    kept = lost = 0
    with ProcessPoolExecutor(workers) as pool:
        try:
            counted = pool.map(_count, [tars[shard] for shard in own], [index_path(tars[shard], index_folder) for shard in own])
            for samples, losses in tqdm(counted, total=len(own), desc="indices", unit="shard", mininterval=0.5):
                kept, lost = kept + samples, lost + losses
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return kept, lost


def _count(tar: Path, path: Path) -> tuple[int, int]:
    index = open_index(tar, path)
    if index.in_memory:
        raise UserError(f"{path} cannot be written; name another folder for the indices with --index-folder")
    return len(index), len(index.lost)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_shards(arguments)
    arguments.add_argument(
        "--workers", type=at_least(1), default=usable_cores(), help="processes; default: as many as there are cores"
    )
    add_shard_range(arguments)
    parsed = arguments.parse_args(argv)

    def work() -> str:
        kept, lost = index_shards(parsed.shards, parsed.index_folder, parsed.workers, parsed.shard_range)
        return f"{parsed.shards}: {kept} samples; {lost} cannot be used"

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
