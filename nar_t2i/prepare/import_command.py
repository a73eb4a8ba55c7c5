"""What the import commands share: arguments, and a vocabulary on request."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from nar_t2i.data.shards import ShardSource
from nar_t2i.prepare.command import add_shard_range, at_least, run
from nar_t2i.prepare.importing import Options, Summary
from nar_t2i.prepare.sentencepiece import captions_of, train_sentencepiece

VOCABULARY = "vocabulary.model"


def add_import_options(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("out", help="folder for the shards")
    arguments.add_argument("--samples-per-shard", type=at_least(1), default=1000, help="default: 1000")
    arguments.add_argument("--max-size", type=at_least(1), help="shrink larger images to this shorter side, in pixels")
    arguments.add_argument("--workers", type=at_least(1), default=4, help="threads that read images; default: 4")
    add_shard_range(arguments)
    arguments.add_argument(
        "--vocab-size", type=at_least(1), metavar="N", help=f"also train a SentencePiece model of N pieces: OUT/{VOCABULARY}"
    )


def run_import(parsed: argparse.Namespace, work: Callable[[Options], Summary | None]) -> int:
    """Import with the parsed options, then train the vocabulary that was asked for. Returns the exit status."""

    def both() -> str:
        summary = work(Options(parsed.samples_per_shard, parsed.max_size, parsed.workers, parsed.shard_range))
        if summary is None:
            return f"{parsed.out}: these shards are done; others are not yet"
        if parsed.vocab_size is None:
            return str(summary)
        path = Path(parsed.out) / VOCABULARY
        size = train_sentencepiece(captions_of(ShardSource(parsed.out)), path, parsed.vocab_size)
        return f"{summary}\n{path}: {size} pieces"

    return run(both)
