"""The data module: captioned images from shards, mixtures, caches, streams or a renderer, as batches."""

from __future__ import annotations

import logging
import signal
from functools import partial
from typing import Any, Literal

import lightning
import torch
from torch.utils.data import DataLoader

from nar_t2i.data.lost import LostLedger
from nar_t2i.data.opening import Weighted, is_remote, open_source
from nar_t2i.data.order import GlobalBatchSampler, accumulation_steps, validation_batches
from nar_t2i.data.reading import BatchReader, CountedLoader, View
from nar_t2i.data.source import LostSample, Source
from nar_t2i.data.stream import StreamReader, StreamShare
from nar_t2i.data.token_cache import CONDITIONS
from nar_t2i.errors import UserError
from nar_t2i.hashing import weights_hash
from nar_t2i.types import TextEncoder, TokenCodec, TokenSpec

log = logging.getLogger(__name__)

MINIMUM_TRIED = 1000  # samples to read before the share of lost ones means anything


class CaptionedImages(lightning.LightningDataModule):
    """Captioned images for training and validation.

    Training is an endless order that is a pure function of (seed, epoch): global batch s holds the same samples on any
    number of ranks, and the state is the number of samples consumed. Validation is every sample once, with its first
    caption and a centre crop. The module shards by itself: give the trainer `use_distributed_sampler=False`.

    Args:
        train: shards (folder, file or pattern), URLs (`https://…`, `pipe:…`, streamed), a weighted list, or a source.
        validation: the same, or none. Not streamed.
        image_size: pixels a side.
        global_batch_size: images an optimizer step, over all ranks and accumulated micro-batches.
        micro_batch_size: images that a rank takes at once; none means the whole share of the rank.
        cache: folder of training tokens, which replace the images; for a mixture, name it in each part.
        validation_cache: the same for validation.
        text_cache: folder of the training captions' states, which replace the text encoder's work; for a mixture, name it
            in each part.
        validation_text_cache: the same for validation.
        crop: where the longer side is cropped in training.
        flip: mirror half of the training images; needs `flip_safe`.
        flip_safe: the recipe's promise that no caption says left or right, and no image shows text.
        scalars: numeric JSON fields of the samples that batches carry, such as an aesthetic score.
        workers: processes that read; 0 reads in the training process.
        seed: of the order and of every random choice.
        window: shards (blocks) that are shuffled together.
        max_lost_share: of the samples, how many may be unreadable before the run ends with an error.
        epoch_size: training images that the trainer calls an epoch; none means one endless epoch.
    """

    def __init__(
        self,
        train: str | list[Weighted] | Source,
        image_size: int,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        validation: str | list[Weighted] | Source | None = None,
        cache: str | None = None,
        validation_cache: str | None = None,
        text_cache: str | None = None,
        validation_text_cache: str | None = None,
        crop: Literal["centre", "random"] = "centre",
        flip: bool = False,
        flip_safe: bool = False,
        scalars: list[str] | None = None,
        workers: int = 0,
        seed: int = 0,
        window: int = 32,
        max_lost_share: float = 0.01,
        epoch_size: int | None = None,
    ):
        super().__init__()
        if flip and not flip_safe:
            raise UserError("flip: true needs flip_safe: true: mirrored images contradict captions with left or right")
        if isinstance(train, str) and is_remote(train) and (cache is not None or text_cache is not None):
            raise UserError(f"cache, text_cache: {train} is streamed, and what is streamed has no cache")
        if workers < 0:
            raise UserError(f"workers must be at least 0, not {workers}")
        if epoch_size is not None and (epoch_size < 1 or epoch_size % global_batch_size):
            raise UserError(f"epoch_size {epoch_size} is no positive multiple of global_batch_size {global_batch_size}")
        self.image_size, self.global_batch_size = image_size, global_batch_size
        self._micro_batch_size, self._epoch_size = micro_batch_size, epoch_size
        self._train, self._validation = train, validation
        self._cache, self._validation_cache = cache, validation_cache
        self._text_cache, self._validation_text_cache = text_cache, validation_text_cache
        names = tuple(scalars or ())
        self._view = View(image_size, seed, True, random_crop=crop == "random", random_flip=flip, scalars=names)
        self._plain_view = View(image_size, seed, scalars=names)
        self._workers, self._seed, self._window, self._max_lost_share = workers, seed, window, max_lost_share
        self._sources: dict[str, Source] = {}
        self._ledgers: dict[str, LostLedger] = {}
        self._loader: CountedLoader | None = None
        self._fingerprint = ""  # of the training source
        self._began_with: dict[str, Any] | None = None  # what a resumed run's order followed from
        # Samples consumed when the current pass began, and Lightning's count of micro-batches then; None before the
        # pass begins, since Lightning restores its count after this module's.
        self._begun: tuple[int, int | None] = (0, None)

    # What the run needs to know

    @property
    def world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def micro_batch_size(self, world: int | None = None) -> int:
        """Images that each of `world` ranks takes at once."""
        if self._micro_batch_size is not None:
            return self._micro_batch_size
        accumulation_steps(self.global_batch_size, 1, world or self.world)
        return self.global_batch_size // (world or self.world)

    def accumulation(self, world: int | None = None) -> int:
        """Micro-batches that each of `world` ranks takes for one optimizer step. UserError when it does not divide."""
        world = world or self.world
        return accumulation_steps(self.global_batch_size, self.micro_batch_size(world), world)

    @property
    def token_spec(self) -> TokenSpec | None:
        """What the cached tokens are; None when batches hold images."""
        return None if self.streams else self.source("train").token_spec

    def check_size(self, codec: TokenCodec) -> None:
        """Raise a UserError where images are of another size than the codec's, with a cache, too: sizes and crops are told in
        its pixels.
        """
        if codec.image_size != self.image_size:
            raise UserError(f"data.init_args.image_size {self.image_size}: the tokenizer is one of {codec.image_size} px")

    def check_codec(self, codec: TokenCodec) -> None:
        """Raise a UserError that says what differs where this codec is of another size, or cached tokens were made by another
        one.
        """
        self.check_size(codec)
        for split in self._splits():
            self.source(split).check_tokens(codec.spec, weights_hash(codec))

    def check_errors(self) -> None:
        """Raise a UserError that names the cache where cached tokens come without their quantisation errors."""
        for split in self._splits():
            self.source(split).check_errors()

    def check_text(self, text: TextEncoder) -> None:
        """Raise a UserError where cached states were made by another text encoder than this one, or by one that learns."""
        for split in self._splits():
            source = self.source(split)
            if not source.has_states:
                continue
            if any(p.requires_grad for p in text.parameters()):
                raise UserError("data.init_args.text_cache: the text encoder is trained, so that its states change; set its "
                                "trainable to none, or train without the text cache")  # fmt: skip
            source.check_text(text.fingerprint())

    def _splits(self) -> tuple[Literal["train", "validation"], ...]:
        """Those that are read from an opened source."""
        train = () if self.streams else ("train",)
        return (*train, "validation") if self._validation is not None else train

    @property
    def lost_samples(self) -> list[LostSample]:
        """Every sample that was found unusable so far."""
        return [lost for ledger in self._ledgers.values() for lost in ledger.lost_samples]

    @property
    def samples(self) -> int:
        """Training samples consumed: whole global batches that the trainer has finished."""
        samples, processed = self._begun
        if processed is None:
            return samples
        done = (self._processed() - processed) * self.micro_batch_size() * self.world
        return samples + done - done % self.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "order": self._order_told()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resume_at(state_dict["samples"])
        self._began_with = state_dict.get("order")

    def _order_told(self) -> dict[str, Any]:
        """What the order of training samples follows from."""
        if self.streams:
            return {"train": self._train, "seed": self._seed}
        self._fingerprint = self._fingerprint or self.source("train").fingerprint()
        return {"train": self._fingerprint, "seed": self._seed, "window": self._window}

    def _tell_other_order(self) -> None:
        now, before = self._order_told(), self._began_with
        changed = [] if before is None else [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed and self.rank == 0:
            log.warning(
                "data.init_args: %s changed since this run was saved after %d images; where that gives another order, some "
                "images come twice until its next epoch, and others not at all",
                ", ".join(changed),
                self.samples,
            )
        self._began_with = None

    def resume_at(self, samples: int) -> None:
        """Begin the next pass after so many consumed samples."""
        self._begun = (samples, None)

    # Loaders

    def source(self, split: Literal["train", "validation"]) -> Source:
        """The source of a split, opened once."""
        if split not in self._sources:
            if split == "train":
                source = open_source(self._train, self._cache, self._text_cache)
            else:
                source = open_source(self._validation, self._validation_cache, self._validation_text_cache)
            view = self._view if split == "train" else self._plain_view
            source.check_views(view.random_crop, view.random_flip)
            ledger = LostLedger(self._max_lost_share, min(MINIMUM_TRIED, len(source)))
            ledger.note_unindexed(source.lost, source.lost_count, len(source) + source.lost_count)
            self._tell_absent(source)
            self._sources[split], self._ledgers[split] = source, ledger
        return self._sources[split]

    def _tell_absent(self, source: Source) -> None:
        known = source.scalar_names
        absent = [] if known is None else [name for name in self._view.scalars if name not in known and name not in CONDITIONS]
        if absent:
            log.warning(
                "data.init_args.scalars: no sample of %s has %s (they have %s), so that what a network takes for absent ones "
                "is all it is told",
                source.name,
                ", ".join(absent),
                ", ".join(sorted(known)) or "none",
            )

    def train_dataloader(self) -> CountedLoader:
        self.accumulation()  # sizes that do not divide are told before anything is read
        if self.streams:
            ledger = self._ledgers.setdefault("train", LostLedger(self._max_lost_share, MINIMUM_TRIED))
        else:
            self.source("train")
            ledger = self._ledgers["train"]
        self._tell_other_order()
        length = None if self._epoch_size is None else self._epoch_size // (self.micro_batch_size() * self.world)
        samples = self.samples
        self._loader = CountedLoader(self._train_reads, ledger, length)
        self.resume_at(samples)
        return self._loader

    def val_dataloader(self) -> CountedLoader | list:
        if self._validation is None:
            return []  # Lightning's way to say that there is none
        source = self.source("validation")
        batches = validation_batches(len(source), self.micro_batch_size(), self.rank, self.world)
        reader = BatchReader(source, self._plain_view, order=None)
        return CountedLoader(partial(self._data_loader, reader, batches), self._ledgers["validation"], len(batches))

    test_dataloader = val_dataloader

    def _train_reads(self) -> DataLoader:
        start = self.samples
        self._begun = (start, self._processed())
        micro, rank, world = self.micro_batch_size(), self.rank, self.world
        if self.streams:
            share = StreamShare(rank, world, max(1, self._workers), start)
            reader = StreamReader(self._train, self._view, micro, share)
            return DataLoader(
                reader,
                batch_size=None,
                num_workers=self._workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_leave_signals,
            )
        source = self.source("train")
        sampler = GlobalBatchSampler(self.global_batch_size, micro, rank, world, start)
        return self._data_loader(BatchReader(source, self._view, source.order(self._seed, self._window)), sampler)

    def _data_loader(self, reader: BatchReader, batches: Any) -> DataLoader:
        return DataLoader(
            reader,
            batch_sampler=batches,
            collate_fn=_as_read,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals,
        )

    @property
    def streams(self) -> bool:
        """Whether training reads shards from elsewhere, as they come."""
        return isinstance(self._train, str) and is_remote(self._train)

    def _processed(self) -> int:
        """Micro-batches that this rank has finished.

        Lightning's own count: what a loader handed over includes batches that were fetched ahead, and `global_step`
        counts every optimizer of a GAN.
        """
        if self.trainer is not None:
            return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return 0 if self._loader is None else self._loader.yielded


def _leave_signals(worker: int) -> None:
    """Slurm signals a job's workers, too. What follows from it is for their rank to say, which still has a batch to finish;
    they end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _as_read(read: Any) -> Any:
    return read  # the reader returns whole batches
