"""The captions of a source → a SentencePiece model for the text encoder that is trained from scratch.

    train_sentencepiece.py SHARDS OUT.model --vocab-size 8000

Byte-pair encoding of lower-case text, as the encoder reads it, with byte fallback: any Unicode text survives. The same captions
always give the same model.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from nar_t2i.data.opening import open_source
from nar_t2i.data.source import SampleError, Source
from nar_t2i.errors import UserError
from nar_t2i.files import whole_file
from nar_t2i.prepare.command import add_shards, at_least, parser, run

SPECIAL = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
MAX_CAPTIONS = 2_000_000  # more captions no longer change the vocabulary, only the time


def captions_of(source: Source, limit: int = MAX_CAPTIONS) -> Iterator[str]:
    """All captions of a source, or of evenly spaced samples of it where there are more than `limit`."""
    stride = max(1, -(-len(source) // limit))
    for index in range(0, len(source), stride):
        try:
            yield from source.read_text(index).captions
        except SampleError:
            continue  # reading for training counts and reports it


def train_sentencepiece(captions: Iterable[str], path: str | Path, vocab_size: int = 8000) -> int:
    """Train a model and write it to `path`; returns its vocabulary's size, smaller than asked where text is scarce.

    Raises UserError when there is no text, or the vocabulary cannot hold the bytes and characters.
    """
    model, problems = io.BytesIO(), []

    def kept() -> Iterator[str]:
        """The captions, as ScratchTextEncoder reads them; SentencePiece would tell a problem of theirs, and Ctrl-C, as one of
        its own.
        """
        try:
            yield from (caption.lower() for caption in captions)
        except BaseException as problem:
            problems.append(problem)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=kept(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",  # whole words, where unigram's pruning splits "two" into letters on small vocabularies
            byte_fallback=True,
            character_coverage=0.9999,
            hard_vocab_limit=False,
            num_threads=4,  # fixed: sums are grouped by thread
            max_sentence_length=1 << 14,
            minloglevel=2,
            **SPECIAL,
        )
    except (RuntimeError, OSError) as error:
        if problems and not isinstance(problems[0], GeneratorExit):
            raise problems[0] from None
        raise UserError(f"no SentencePiece model of {vocab_size} pieces fits this text: {error}") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__)
    add_shards(arguments)
    arguments.add_argument("out", help="the model file to write")
    arguments.add_argument("--vocab-size", type=at_least(1), default=8000, help="at most; default: 8000")
    parsed = arguments.parse_args(argv)

    def work() -> str:
        size = train_sentencepiece(
            captions_of(open_source(parsed.shards, index_folder=parsed.index_folder)), parsed.out, parsed.vocab_size
        )
        return f"{parsed.out}: {size} pieces"

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
