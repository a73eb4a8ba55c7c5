"""Any source of images → shards, as PNG: rendered scenes, or a copy of a mixture."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nar_t2i.data.source import Sample, SampleError, Source
from nar_t2i.errors import UserError
from nar_t2i.files import read_json, write_json
from nar_t2i.prepare.command import shard_range
from nar_t2i.prepare.importing import Dropped, Summary, claim_folder, encode_png
from nar_t2i.prepare.shards import ShardFile, is_finished


def write_source(
    source: Source, folder: str | Path, samples_per_shard: int = 1000, workers: int = 0, shards: str = "0:"
) -> Summary | None:
    """Write every sample of a source into shards; finished shards are kept, so it can be interrupted.

    workers: processes that read and encode. shards: those to write (see `shard_range`). Returns None while others are to
    be written. Raises UserError when the folder holds shards of another source.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    identities = [source.identity(block) for block in range(len(source.blocks))]
    claim_folder(folder, {"source": identities, "samples_per_shard": samples_per_shard})
    chunks = [range(s, min(s + samples_per_shard, len(source))) for s in range(0, len(source), samples_per_shard)]
    chosen = shard_range(shards, len(chunks))
    missing = [shard for shard in chosen if not is_finished(folder / f"{shard:05d}.tar")]
    todo = [index for shard in missing for index in chunks[shard]]
    encoded = iter(DataLoader(_Encoding(source), batch_size=None, sampler=todo, num_workers=workers))
    total = sum(len(chunks[shard]) for shard in chosen)
    with tqdm(total=total, initial=total - len(todo), desc=f"→ {folder}", unit="image") as bar:
        for shard in missing:
            _write_shard(folder, shard, islice(encoded, len(chunks[shard])), bar)
    if not all(is_finished(folder / f"{shard:05d}.tar") for shard in range(len(chunks))):
        return None
    records = [read_json(folder / f"{shard:05d}.dropped.json") for shard in range(len(chunks))]
    dropped = [Dropped(*entry) for record in records for entry in record]
    if len(dropped) == len(source):
        raise UserError(f"{source.name} has no readable samples")
    summary = Summary(len(source) - len(dropped), dropped, len(chunks))
    summary.write(folder)
    return summary


class _Encoding(Dataset):
    """Samples of a source with their PNG bytes, or why there are none."""

    def __init__(self, source: Source):
        self._source = source

    def __getitem__(self, index: int) -> tuple[Sample, bytes] | Dropped:
        try:
            sample = self._source.read(index)
        except SampleError as error:
            return Dropped(error.lost.key, error.lost.reason)
        height, width = sample.image.shape[:2]
        sample.scalars = {"original_width": float(width), "original_height": float(height), **sample.scalars}
        data, sample.image = encode_png(sample.image), None
        return sample, data


def _write_shard(folder: Path, shard: int, entries: Iterable[tuple[Sample, bytes] | Dropped], bar: tqdm) -> None:
    dropped = []
    with ShardFile(folder / f"{shard:05d}.tar") as file:
        for row, entry in enumerate(entries):
            if isinstance(entry, Dropped):
                dropped.append(entry)
            else:
                sample, data = entry
                file.add(f"{shard:05d}{row:06d}", data, "png", sample.captions, sample.scalars, sample.key)
            bar.update()
        write_json(folder / f"{shard:05d}.dropped.json", dropped)  # before the tar appears, so that it always has one
