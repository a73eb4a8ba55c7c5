"""The data module: what batches hold, what is lost, and where a run goes on."""

import logging
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from nar_t2i.data import CaptionedImages
from nar_t2i.data.images import fit
from nar_t2i.data.opening import Weighted
from nar_t2i.data.shard_index import index_path
from nar_t2i.errors import UserError
from tests.data.making_shards import HURT, encoded, hurt_members, members, pixels, write_shards, write_tar


def take(data: CaptionedImages, count: int) -> list:
    batches = iter(data.train_dataloader())
    return [next(batches) for _ in range(count)]


def as_rank(data: CaptionedImages, rank: int, world: int) -> CaptionedImages:
    """The same data as another rank of another world sees it."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, fit_loop=loop)
    return data


def same(a, b) -> bool:
    tensors = all(torch.equal(x, y) for x, y in zip((a.ids, a.images), (b.ids, b.images)))
    scalars = a.scalars.keys() == b.scalars.keys() and all(torch.equal(a.scalars[k], b.scalars[k]) for k in a.scalars)
    return tensors and scalars and a.keys == b.keys and a.captions == b.captions


def test_a_batch_holds_what_was_stored(tmp_path):
    data = CaptionedImages(str(write_shards(tmp_path, [5, 5])), 8, 4, scalars=["score", "no"])
    batch = take(data, 3)[2]
    assert batch.ids.tolist() == [8, 9, 10, 11] and batch.images.dtype == torch.uint8 and batch.tokens is None
    for row, key in enumerate(batch.keys):
        number = int(key[1:])
        assert batch.captions[row] == f"caption {number}.0"
        assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), fit(pixels(number), 8).pixels)
        assert batch.scalars["score"][row] == number and torch.isnan(batch.scalars["no"][row])
        assert (batch.scalars["original_width"][row], batch.scalars["original_height"][row]) == (16, 12)


def test_what_a_sample_says_of_its_original_counts(tmp_path):
    write_tar(tmp_path / "0.tar", members("a", 0, original_width=4000, original_height=3000) + members("b", 1))
    batch = take(CaptionedImages(str(tmp_path), 8, 2), 1)[0]
    sizes = dict(zip(batch.keys, zip(batch.scalars["original_width"].tolist(), batch.scalars["original_height"].tolist())))
    assert sizes == {"a": (4000, 3000), "b": (16, 12)}


def test_an_epoch_is_every_sample_once(tmp_path):
    data = CaptionedImages(str(write_shards(tmp_path, [5, 7])), 8, 4)
    keys = [key for batch in take(data, 6) for key in batch.keys]
    assert sorted(keys[:12]) == sorted(keys[12:]) == [f"s{n:06d}" for n in range(12)] and keys[:12] != keys[12:]


@pytest.mark.parametrize("options", [{}, {"crop": "random", "flip": True, "flip_safe": True}])
def test_workers_change_nothing(tmp_path, options):
    folder = str(write_shards(tmp_path, [5, 7], captions=3))
    plain, workers = (take(CaptionedImages(folder, 8, 4, workers=w, **options), 7) for w in (0, 2))
    assert all(same(a, b) for a, b in zip(plain, workers))


@pytest.mark.parametrize("world,micro", [(1, 2), (2, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_change_nothing(tmp_path, world, micro):
    folder = str(write_shards(tmp_path, [5, 7], captions=3))
    one = take(CaptionedImages(folder, 8, 8, crop="random"), 2)
    ranks = [as_rank(CaptionedImages(folder, 8, 8, micro, crop="random"), r, world) for r in range(world)]
    steps = ranks[0].accumulation() * 2
    seen = [take(data, steps) for data in ranks]
    rows = [b for step in range(steps) for b in (seen[r][step] for r in range(world))]
    assert torch.equal(torch.cat([b.images for b in rows]), torch.cat([b.images for b in one]))
    assert [c for b in rows for c in b.captions] == [c for b in one for c in b.captions]


def test_choices_depend_on_the_seed(tmp_path):
    folder = str(write_shards(tmp_path, [32], captions=3))
    a, b = (take(CaptionedImages(folder, 8, 32, seed=s), 1)[0] for s in (0, 1))
    assert a.keys != b.keys


def test_every_caption_of_an_image_is_chosen(tmp_path):
    data = CaptionedImages(str(write_shards(tmp_path, [4], captions=3)), 8, 4)
    captions = [c for batch in take(data, 300) for c in batch.captions]
    counts = [captions.count(f"caption {n}.{c}") for n in range(4) for c in range(3)]
    assert sum(counts) == 1200
    assert max(abs(count - 100) for count in counts) < 5 * np.sqrt(300 * 1 / 3 * 2 / 3)


def test_random_crops_cover_the_image_and_flips_are_half(tmp_path):
    data = CaptionedImages(str(write_shards(tmp_path, [4])), 12, 4, crop="random", flip=True, flip_safe=True)
    batches = take(data, 100)
    left = torch.cat([b.scalars["crop_left"] for b in batches])
    assert left.min() >= 0 and left.max() <= 4 and abs(left.mean() - 2) < 5 * 4 / np.sqrt(12 * 400)
    plain = take(CaptionedImages(data._train, 12, 4, crop="random"), 100)
    flipped = [torch.equal(x.flip(-1), y) for a, b in zip(batches, plain) for x, y in zip(a.images, b.images)]
    assert abs(np.mean(flipped) - 0.5) < 5 * 0.5 / np.sqrt(400)


def test_flips_need_the_promise_that_captions_allow_them(tmp_path):
    with pytest.raises(UserError, match="flip_safe"):
        CaptionedImages(str(tmp_path), 8, 4, flip=True)


def test_sizes_that_do_not_divide(tmp_path):
    folder = str(write_shards(tmp_path, [4]))
    with pytest.raises(UserError, match="10 .* 4 × 1 ranks"):
        CaptionedImages(folder, 8, 10, 4).train_dataloader()
    with pytest.raises(UserError, match="10 .* 2 × 3 ranks"):
        CaptionedImages(folder, 8, 10, 2).accumulation(3)
    with pytest.raises(UserError, match="epoch_size 10"):
        CaptionedImages(folder, 8, 4, epoch_size=10)
    assert CaptionedImages(folder, 8, 24, 4).accumulation(3) == 2


# What is lost


def hurt(tmp_path, **options) -> CaptionedImages:
    write_tar(tmp_path / "0.tar", hurt_members())
    write_tar(tmp_path / "1.tar", [m for n in range(4, 16) for m in members(f"g{n}", n)])
    return CaptionedImages(str(tmp_path), 8, 4, validation=str(tmp_path), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_lost_samples_are_replaced_counted_and_named_once(tmp_path, workers, caplog):
    data = hurt(tmp_path, max_lost_share=0.5, workers=workers)
    with caplog.at_level(logging.WARNING):
        keys = [key for batch in take(data, 17) for key in batch.keys]  # four epochs of 17 indexed samples
    assert set(keys) == {f"g{n}" for n in range(16)} and len(keys) == 68
    assert {lost.key for lost in data.lost_samples} == HURT
    assert data._ledgers["train"].failed >= 4  # the broken JPEG, once an epoch
    for key in HURT:
        assert sum(record.getMessage().startswith(f"lost sample {key} ") for record in caplog.records) == 1


def test_replacements_are_the_same_with_workers(tmp_path):
    data = hurt(tmp_path, max_lost_share=0.5)
    again = CaptionedImages(str(tmp_path), 8, 4, max_lost_share=0.5, workers=2)
    assert all(same(a, b) for a, b in zip(take(data, 10), take(again, 10)))


def test_too_many_known_losses_stop_before_training(tmp_path):
    with pytest.raises(UserError, match=r"6 of 23 samples .* wordless"):
        hurt(tmp_path, max_lost_share=0.1).train_dataloader()


def test_a_shard_that_is_cut_off_counts_as_what_others_hold(tmp_path):
    write_shards(tmp_path, [20] * 4)
    for number in (1, 3):
        path = tmp_path / f"{number:05d}.tar"
        index_path(path).unlink()
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 4)
    with pytest.raises(UserError, match=r"2\d of 80 samples cannot be used"):
        CaptionedImages(str(tmp_path), 8, 4, max_lost_share=0.3).train_dataloader()


def test_what_a_damaged_shard_lost_before_the_damage_counts_once(tmp_path):
    for shard in range(4):
        told = [m for n in range(20) for m in (members(f"s{n}", n) if shard < 3 or n < 10 else [(f"s{n}.png", encoded(pixels(n)))])]
        write_tar(tmp_path / f"{shard}.tar", told)
    with open(tmp_path / "3.tar", "r+b") as file:
        file.truncate((tmp_path / "3.tar").stat().st_size - 10_240)
    source = CaptionedImages(str(tmp_path), 8, 4, max_lost_share=0.9).source("train")
    assert source.lost_count + len(source) in (80, 81)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_losses_stop_while_training(tmp_path, workers):
    jpeg = encoded(pixels(0, 64, 64), "JPEG")
    bad = [m for n in range(3) for m in [(f"bad{n}.jpg", jpeg[: 300 + n]), (f"bad{n}.txt", b"text")]]
    write_tar(tmp_path / "0.tar", bad + [m for n in range(9) for m in members(f"g{n}", n)])
    data = CaptionedImages(str(tmp_path), 8, 4, max_lost_share=0.1, workers=workers)
    with pytest.raises(UserError, match=r"max_lost_share = 0.1 .*bad"):
        take(data, 20)
    assert len(take(CaptionedImages(str(tmp_path), 8, 4, max_lost_share=0.5, workers=workers), 20)) == 20


def test_nothing_readable_is_an_error(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", b"junk"), ("a.txt", b"text")])
    with pytest.raises(UserError, match="a in 0.tar: does not decode"):
        take(CaptionedImages(str(tmp_path), 8, 1, max_lost_share=1.0), 1)


# Validation


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_every_sample_once(tmp_path, world, workers):
    folder = str(write_shards(tmp_path, [5, 8], captions=3))
    batches, counts = [], set()
    for rank in range(world):
        data = CaptionedImages(folder, 8, 12, 4, validation=folder, crop="random", workers=workers)
        loader = as_rank(data, rank, world).val_dataloader()
        found = list(loader)
        counts.add(len(found))
        assert len(found) == len(loader)
        batches += found
    rows = sorted((int(i), key, caption) for b in batches for i, key, caption in zip(b.ids, b.keys, b.captions))
    assert rows == [(n, f"s{n:06d}", f"caption {n}.0") for n in range(13)] and len(counts) == 1
    image = next(b.images[row] for b in batches for row, key in enumerate(b.keys) if key == "s000007")
    assert np.array_equal(image.permute(1, 2, 0).numpy(), fit(pixels(7), 8).pixels)


def test_validation_leaves_out_what_is_lost_and_says_so(tmp_path):
    data = hurt(tmp_path, max_lost_share=0.5)
    keys = [key for batch in data.val_dataloader() for key in batch.keys]
    assert sorted(keys) == sorted(f"g{n}" for n in range(16)) and {lost.key for lost in data.lost_samples} == HURT


def test_a_validation_batch_of_which_nothing_is_left_takes_the_next_sample(tmp_path):
    hurt(tmp_path)
    data = CaptionedImages(str(tmp_path), 8, 4, 1, validation=str(tmp_path), max_lost_share=0.5)
    keys = Counter(key for batch in data.val_dataloader() for key in batch.keys)
    assert set(keys) == {f"g{n}" for n in range(16)} and sorted(keys.values()) == [1] * 15 + [2]  # for the broken JPEG


def test_no_validation_is_allowed(tmp_path):
    assert CaptionedImages(str(write_shards(tmp_path, [4])), 8, 4).val_dataloader() == []


# Mixtures


def test_a_mixture_of_folders(tmp_path):
    a, b = write_shards(tmp_path / "a", [4]), write_shards(tmp_path / "b", [90], first=100)
    parts = [Weighted(str(a), 3.0), {"source": str(b), "weight": 1.0}]
    keys = [key for batch in take(CaptionedImages(parts, 8, 64), 16) for key in batch.keys]
    assert sum(key < "s000100" for key in keys) == 768
    again = take(CaptionedImages(parts, 8, 64), 1)[0]
    assert keys[:64] == again.keys and {k < "s000100" for k in again.keys} == {True, False}


def test_a_mixture_of_a_mixture_and_its_texts(tmp_path):
    a, b, c = (write_shards(tmp_path / n, [3, 2], first=f) for n, f in (("a", 0), ("b", 10), ("c", 20)))
    inner = [{"source": str(a)}, {"source": str(b)}]
    from nar_t2i.data.mixture import Mixture
    from nar_t2i.data.opening import open_source

    source = Mixture([open_source(inner), open_source(str(c))], [1, 1])
    keys = [source.read_text(i).key for i in range(15)]
    assert keys == [f"s{n:06d}" for f in (0, 10, 20) for n in range(f, f + 5)]
    shuffled = np.random.default_rng(0).permutation(15)
    assert source.read_texts(shuffled, np.zeros(15)).keys == [keys[i] for i in shuffled]
    assert len({source.block_name(n) for n in range(len(source.blocks))}) == 6


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0]])
def test_weights_must_be_positive(tmp_path, weights):
    folder = str(write_shards(tmp_path, [4]))
    with pytest.raises(UserError, match="positive weight"):
        take(CaptionedImages([Weighted(folder, w) for w in weights], 8, 4), 1)


# Resuming


def test_resume_from_a_count_without_a_trainer(tmp_path):
    folder = str(write_shards(tmp_path, [5, 7], captions=3))
    whole = take(CaptionedImages(folder, 8, 4), 9)
    data = CaptionedImages(folder, 8, 4)
    take(data, 4)
    assert data.state_dict()["samples"] == 16
    resumed = CaptionedImages(folder, 8, 4, workers=2)
    resumed.load_state_dict({"samples": 16})
    assert resumed.samples == 16
    assert all(same(a, b) for a, b in zip(take(resumed, 5), whole[4:]))


def test_a_resumed_run_is_told_of_other_data(tmp_path, caplog):
    folder = write_shards(tmp_path / "s", [5, 7])
    first = CaptionedImages(str(folder), 8, 4)
    take(first, 2)
    state = first.state_dict()

    def warnings(**options):
        data = CaptionedImages(str(folder), 8, 4, **options)
        data.load_state_dict(state)
        caplog.clear()
        take(data, 1)
        return [record.getMessage() for record in caplog.records if "was saved after 8 images" in record.getMessage()]

    assert warnings() == []
    moved = CaptionedImages(str(shutil.copytree(folder, tmp_path / "moved")), 8, 4)
    moved.load_state_dict(state)
    take(moved, 1)
    assert not caplog.records  # nor does another place make another order
    assert "data.init_args: seed, window changed" in warnings(seed=1, window=2)[0]
    write_shards(folder, [5, 7, 3])
    assert "data.init_args: train changed" in warnings()[0]


def test_mixtures_of_other_weights_have_another_order(tmp_path):
    folder = str(write_shards(tmp_path, [4]))
    orders = [CaptionedImages([Weighted(folder, 1.0), Weighted(folder, w)], 8, 4).state_dict()["order"] for w in (1.0, 1.0, 2.0)]
    doubled = CaptionedImages([Weighted(folder, 2.0), Weighted(folder, 2.0)], 8, 4).state_dict()["order"]
    assert doubled == orders[0] == orders[1] != orders[2]


def test_numbers_that_no_sample_has_are_told(tmp_path, caplog):
    folder = str(write_shards(tmp_path, [4]))
    take(CaptionedImages(folder, 8, 4, scalars=["score", "original_width"]), 1)
    assert not caplog.records
    take(CaptionedImages(folder, 8, 4, scalars=["scores"]), 1)
    assert "has scores (they have original_height, original_width, score)" in caplog.text


def test_a_count_that_another_global_batch_does_not_divide_is_refused(tmp_path):
    folder = str(write_shards(tmp_path, [5, 7]))
    data = CaptionedImages(folder, 8, 3)
    data.load_state_dict({"samples": 16})
    with pytest.raises(UserError, match="16"):
        take(data, 1)


class Recorder(lightning.LightningModule):
    """Remembers the ids it was trained on; two optimizers like a GAN, or one."""

    def __init__(self, optimizers: int):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[int] = []
        self.count, self.automatic_optimization = optimizers, optimizers == 1

    def training_step(self, batch, index):
        self.seen += batch.ids.tolist()
        lost = self.layer(batch.ids[:, None].float()).mean()
        if self.automatic_optimization:
            return lost
        self.manual_backward(lost)
        for optimizer in self.optimizers():
            optimizer.step()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.0) for _ in range(self.count)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizers,micro", [(1, 4), (2, 8)])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch_size", [None, 24])
def test_a_trainer_resumes_exactly(tmp_path, optimizers, micro, workers, epoch_size):
    folder = str(write_shards(tmp_path / "shards", [12, 8]))

    def fit_steps(steps: int, checkpoint=None):
        data = CaptionedImages(folder, 8, 8, micro, validation=folder, workers=workers, epoch_size=epoch_size)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps * optimizers,
            accumulate_grad_batches=8 // micro if optimizers == 1 else 1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            check_val_every_n_epoch=None,
            val_check_interval=4,
            default_root_dir=tmp_path,
        )
        model = Recorder(optimizers)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return model.seen, data.samples

    assert fit_steps(5) == (list(range(40)), 40)
    assert fit_steps(9, tmp_path / "run.ckpt") == (list(range(40, 72)), 72)


def test_workers_leave_signals_to_their_rank(tmp_path):
    """Slurm's `scancel` reaches them, too, and their rank has a batch to finish."""
    data = CaptionedImages(str(write_shards(tmp_path, [64])), 8, 4, workers=1)
    before = set(multiprocessing.active_children())
    batches = iter(data.train_dataloader())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert len([next(batches) for _ in range(12)]) == 12 and worker.is_alive()
