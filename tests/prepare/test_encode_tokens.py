"""Token caches: the round trip of the three kinds of tokens, and refusal of whatever does not belong together."""

import json
import logging

import numpy as np
import pytest
import torch
from torch import nn

from nar_t2i.data import CaptionedImages
from nar_t2i.data.reading import Choices, View, make_batch
from nar_t2i.data.shards import ShardSource
from nar_t2i.data.source import LostSample, SampleError
from nar_t2i.data.token_cache import CachedSource, TokenCache, pack, unpack
from nar_t2i.errors import UserError
from nar_t2i.hashing import weights_hash
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.types import Encoded, TokenCodec, TokenSpec
from tests.data.making_shards import encoded, hurt_members, pixels, write_shards, write_tar

KINDS = [
    TokenSpec((2, 2), "categorical", 300),
    TokenSpec((4,), "categorical", 7),
    TokenSpec((2, 2), "binary", 5),
    TokenSpec((4,), "continuous", 3),
]


class PooledCodec(TokenCodec):
    """Four tokens an image, from the mean of each quarter times a weight."""

    def __init__(self, spec: TokenSpec, weight: float = 1.0):
        super().__init__()
        self.spec, self.image_size = spec, 8
        self.weight = nn.Parameter(torch.tensor(weight))

    def encode(self, images):
        assert images.dtype == torch.float32 and -1 <= images.min() and images.max() <= 1
        means = nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).mean(1) * self.weight  # (B, 4)
        if self.spec.kind == "categorical":
            return Encoded(((means + 1) / 2 * self.spec.size).long().clamp(0, self.spec.size - 1), None)
        values = means[..., None] * torch.linspace(-2, 2, self.spec.size)
        return Encoded((values > 0).to(torch.uint8) if self.spec.kind == "binary" else values, None)


def direct(codec: PooledCodec, source: ShardSource, index: int) -> torch.Tensor:
    batch = make_batch([source.read(index)], torch.tensor([0]), View(8))
    with torch.no_grad():
        return codec.encode(batch.images.float() / 127.5 - 1).tokens[0]


@pytest.mark.parametrize("spec", KINDS, ids=lambda s: f"{s.kind}{s.size}")
@pytest.mark.parametrize("workers", [0, 2])
def test_round_trip(tmp_path, spec, workers):
    folder = str(write_shards(tmp_path / "shards", [5, 3, 4], captions=2))
    codec = PooledCodec(spec)
    encode_tokens(codec, ShardSource(folder), tmp_path / "cache", batch_size=3, workers=workers, float_dtype="float32")
    data = CaptionedImages(folder, 8, 4, cache=str(tmp_path / "cache"), scalars=["score"], workers=workers)
    assert data.token_spec == spec
    batches = iter(data.train_dataloader())
    source, plain = ShardSource(folder), iter(CaptionedImages(folder, 8, 4).train_dataloader())
    for _ in range(6):
        batch, same = next(batches), next(plain)
        assert batch.images is None and batch.tokens.dtype == spec.dtype
        assert batch.keys == same.keys and batch.captions == same.captions and torch.equal(batch.ids, same.ids)
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.tokens[row], direct(codec, source, int(key[1:])))
            assert batch.scalars["score"][row] == int(key[1:])


def test_stored_types_are_the_smallest(tmp_path):
    def stored(spec: TokenSpec) -> np.ndarray:
        return pack(np.zeros((3, spec.length, *spec.value_shape), np.int64), spec)

    assert stored(TokenSpec((4,), "categorical", 256)).dtype == np.uint8
    assert stored(TokenSpec((4,), "categorical", 257)).dtype == np.uint16
    assert stored(TokenSpec((4,), "categorical", 1 << 17)).dtype == np.uint32
    assert stored(TokenSpec((3,), "binary", 5)).shape == (3, 2)
    assert stored(TokenSpec((4,), "continuous", 2)).dtype == np.float16


@pytest.mark.parametrize("spec", KINDS, ids=lambda s: f"{s.kind}{s.size}")
def test_pack_and_unpack_are_inverse(spec):
    high = {"categorical": spec.size, "binary": 2, "continuous": 100}[spec.kind]
    values = np.random.default_rng(0).integers(0, high, (6, spec.length, *spec.value_shape))
    assert np.array_equal(unpack(pack(values, spec), spec).numpy(), values)


def test_floats_beyond_halves_are_refused():
    spec, values = TokenSpec((1,), "continuous", 2), np.array([[[7e4, 1.0]]], np.float32)
    assert pack(values, spec, "float32").max() == np.float32(7e4)
    with pytest.raises(UserError, match="7e.04 do not fit float16; encode with --float-dtype float32"):
        pack(values, spec)


@pytest.fixture
def cached(tmp_path):
    """A folder of shards and its cache."""
    folder = write_shards(tmp_path / "shards", [5, 3])
    encode_tokens(PooledCodec(KINDS[0]), ShardSource(str(folder)), tmp_path / "cache")
    return folder, tmp_path / "cache"


def test_mismatches_are_refused_by_name(cached, tmp_path):
    folder, cache = cached
    opened = TokenCache(str(cache))
    opened.check(ShardSource(str(folder)), KINDS[0], weights_hash(PooledCodec(KINDS[0])))
    with pytest.raises(UserError, match="hash"):
        opened.check(codec_hash=weights_hash(PooledCodec(KINDS[0], 1.5)))
    with pytest.raises(UserError, match="300.* size=7"):
        opened.check(spec=KINDS[1])
    other = write_shards(tmp_path / "other", [5, 3], first=1)
    with pytest.raises(UserError, match="another shard 00000"):
        CaptionedImages(str(other), 8, 4, cache=str(cache)).train_dataloader()
    longer = write_shards(tmp_path / "longer", [5, 3, 1])
    with pytest.raises(UserError, match="covers 2 shards, .* has 3"):
        CaptionedImages(str(longer), 8, 4, cache=str(cache)).train_dataloader()


def test_the_data_module_refuses_another_codec(cached):
    folder, cache = map(str, cached)
    for options in ({"cache": cache}, {"validation": folder, "validation_cache": cache}):
        data = CaptionedImages(folder, 8, 4, **options)
        data.check_codec(PooledCodec(KINDS[0]))
        with pytest.raises(UserError, match="other weights give other tokens"):
            data.check_codec(PooledCodec(KINDS[0], 1.5))
    parts = CaptionedImages([{"source": folder, "cache": cache}] * 2, 8, 4)
    with pytest.raises(UserError, match="size=7"):
        parts.check_codec(PooledCodec(KINDS[1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_caches_are_refused(cached, workers):
    folder, cache = cached
    path = cache / "00001.tokens.npy"
    np.save(path, np.load(path)[:2])
    with pytest.raises(UserError, match="2 rows instead of 3") as raised:
        list(zip(range(3), CaptionedImages(str(folder), 8, 4, cache=str(cache), workers=workers).train_dataloader()))
    assert "Traceback" not in str(raised.value)
    (cache / "cache.json").unlink()
    with pytest.raises(UserError, match="cache.json is missing"):
        TokenCache(str(cache))


def test_damaged_arrays_are_encoded_anew(cached):
    folder, cache = cached
    kept = {path.name: path.read_bytes() for path in cache.glob("*.npy")}
    (cache / "00000.conditions.npy").unlink()
    np.save(cache / "00001.tokens.npy", np.load(cache / "00001.tokens.npy")[:2])
    encode_tokens(PooledCodec(KINDS[0]), ShardSource(str(folder)), cache)
    assert {path.name: path.read_bytes() for path in cache.glob("*.npy")} == kept


@pytest.mark.parametrize("bad", [2, 5])
def test_a_batch_without_a_readable_image_holds_no_others_tokens(tmp_path, bad):
    """The last of a shard, alone in its batch: neither the next shard's first image nor the first of all stands in for it."""
    source, codec = ShardSource(str(write_shards(tmp_path / "shards", [3, 3]))), PooledCodec(KINDS[0])
    read = source.read

    def reading(index):
        if index == bad:
            raise SampleError(LostSample(f"k{index}", "shard", "hurt"))
        return read(index)

    expected = encode_tokens(codec, source, tmp_path / "whole", batch_size=2) and TokenCache(str(tmp_path / "whole"))
    source.read = reading
    encode_tokens(codec, source, tmp_path / "cache", batch_size=2)
    found = TokenCache(str(tmp_path / "cache"))
    assert list(found.lost) == [bad]
    others = np.array([index for index in range(6) if index != bad])
    assert torch.equal(found.tokens(others), expected.tokens(others)) and not found.tokens(np.array([bad])).any()


def test_encoding_resumes_by_shard_and_refuses_another_codec(cached):
    folder, cache = cached
    (cache / "cache.json").unlink()
    (cache / "00001.tokens.json").unlink()  # as if it was killed before the second shard was whole
    kept = (cache / "00000.tokens.npy").stat().st_mtime_ns
    (cache / "00001.tokens.npy").write_bytes(b"half")
    with pytest.raises(UserError, match="differ in codec"):
        encode_tokens(PooledCodec(KINDS[0], 2.0), ShardSource(str(folder)), cache)
    encode_tokens(PooledCodec(KINDS[0]), ShardSource(str(folder)), cache)
    assert (cache / "00000.tokens.npy").stat().st_mtime_ns == kept
    assert len(np.load(cache / "00001.tokens.npy")) == 3


def test_images_that_do_not_decode_have_no_tokens_and_are_reported(tmp_path, caplog):
    write_tar(tmp_path / "s" / "0.tar", hurt_members())
    source = ShardSource(str(tmp_path / "s"))
    encode_tokens(PooledCodec(KINDS[0]), source, tmp_path / "cache", batch_size=2)
    cached = CachedSource(source, TokenCache(str(tmp_path / "cache")))
    assert [cached.read(i).key for i in range(len(cached))] == ["g0", "g1", "g2", "g3"]
    for index, original in enumerate(i for i in range(5) if source.read_text(i).key != "broken"):
        middle = np.array([0.5]), np.array([False])
        (found,) = cached.read_tokens(np.array([index]), np.array([0.0]), *middle).tokens
        assert torch.equal(found, direct(PooledCodec(KINDS[0]), source, original))
    data = CaptionedImages(str(tmp_path / "s"), 8, 4, cache=str(tmp_path / "cache"), max_lost_share=0.9)
    with caplog.at_level(logging.WARNING):
        keys = next(iter(data.train_dataloader())).keys
    assert sorted(keys) == ["g0", "g1", "g2", "g3"] and "broken" in {lost.key for lost in data.lost_samples}


def test_a_codec_that_breaks_its_spec_is_refused(tmp_path):
    folder = str(write_shards(tmp_path / "shards", [3]))
    codec = PooledCodec(KINDS[0])
    codec.spec = TokenSpec((2, 2), "categorical", 2)
    codec.encode = lambda images: Encoded(torch.full((len(images), 4), 2), None)
    with pytest.raises(UserError, match="do not agree"):
        encode_tokens(codec, ShardSource(folder), tmp_path / "cache")


def test_a_mixture_of_cached_parts(tmp_path):
    parts = []
    for name, first in (("a", 0), ("b", 50)):
        folder = str(write_shards(tmp_path / name, [4, 2], first=first))
        encode_tokens(PooledCodec(KINDS[0]), ShardSource(folder), tmp_path / f"{name}.cache")
        parts.append({"source": folder, "cache": str(tmp_path / f"{name}.cache"), "weight": 1.0 + first})
    data = CaptionedImages(parts, 8, 8)
    batches = [b for b, _ in zip(data.train_dataloader(), range(20))]
    assert data.token_spec == KINDS[0]
    sources = {0: ShardSource(parts[0]["source"]), 50: ShardSource(parts[1]["source"])}
    for batch in batches:
        for key, tokens in zip(batch.keys, batch.tokens):
            first = 0 if int(key[1:]) < 50 else 50
            assert torch.equal(tokens, direct(PooledCodec(KINDS[0]), sources[first], int(key[1:]) - first))
    with pytest.raises(UserError, match="differ in what their images are"):
        CaptionedImages([parts[0], {"source": parts[1]["source"]}], 8, 8).train_dataloader()
    with pytest.raises(UserError, match="one cache a part"):
        CaptionedImages(parts, 8, 8, cache=parts[0]["cache"]).train_dataloader()


def test_the_manifest_says_what_made_it(cached):
    manifest = json.loads((cached[1] / "cache.json").read_text())
    assert manifest["codec"] == weights_hash(PooledCodec(KINDS[0])) and "8 px" in manifest["preprocessing"]
    assert [(b["name"], b["length"], b["lost"]) for b in manifest["blocks"]] == [("00000", 5, {}), ("00001", 3, {})]


class ErringCodec(PooledCodec):
    """With an error for each token, told by its code."""

    def encode(self, images):
        tokens = super().encode(images).tokens
        return Encoded(tokens, tokens.float() / 7)


@pytest.fixture
def wide(tmp_path):
    """Shards of images twice as wide as high."""
    members = [
        member
        for number in range(6)
        for member in ((f"s{number}.png", encoded(pixels(number, 16, 32))), (f"s{number}.txt", b"a caption"))
    ]
    write_tar(tmp_path / "wide" / "0.tar", members)
    return str(tmp_path / "wide")


def test_several_crops_and_mirrored_images(wide, tmp_path):
    codec, source = ErringCodec(KINDS[0]), ShardSource(wide)
    encode_tokens(codec, source, tmp_path / "cache", batch_size=4, crops=3, flips=True, errors=True)
    opened = TokenCache(str(tmp_path / "cache"))
    assert np.load(tmp_path / "cache/0.tokens.npy").shape == (36, 4)
    for index in range(6):
        for crop, place in enumerate((0.0, 0.5, 1.0)):
            for flip in (False, True):
                look = Choices.fixed(1, place, flip)
                batch = make_batch([source.read(index)], torch.tensor([0]), View(8), look)
                expected = codec.encode(batch.images.float() / 127.5 - 1)
                view = opened.view(np.array([(crop + 0.5) / 3]), np.array([flip]))
                assert torch.equal(opened.tokens(np.array([index]), view), expected.tokens)
                assert np.allclose(opened.rows("errors", np.array([index]), view), expected.error, rtol=1e-3)
                assert opened.rows("conditions", np.array([index]), view).tolist() == [
                    [32, 16, 0, 8 - 4 * crop if flip else 4 * crop]
                ]
    looks = {tuple(opened.tokens(np.array([0]), view)[0].tolist()) for view in range(6)}
    assert len(looks) == 6


def test_a_run_takes_each_view_as_often_and_validation_the_one_in_the_middle(wide, tmp_path):
    encode_tokens(ErringCodec(KINDS[0]), ShardSource(wide), tmp_path / "cache", crops=3, flips=True, errors=True)
    cache, opened = str(tmp_path / "cache"), TokenCache(str(tmp_path / "cache"))
    data = CaptionedImages(
        wide, 8, 6, cache=cache, validation=wide, validation_cache=cache, crop="random", flip=True, flip_safe=True
    )
    taken = np.zeros(6, dtype=int)
    for batch, _ in zip(data.train_dataloader(), range(100)):
        assert torch.allclose(batch.errors, batch.tokens / 7, rtol=1e-3)
        for key, tokens, left in zip(batch.keys, batch.tokens, batch.scalars["crop_left"]):
            views = torch.stack([opened.tokens(np.array([int(key[1:])]), view)[0] for view in range(6)])
            (view,) = np.flatnonzero((views == tokens).all(1))
            assert left == (8 - 4 * (view // 2) if view % 2 else 4 * (view // 2))
            taken[view] += 1
    assert abs(taken - 100).max() < 40
    (batch,) = data.val_dataloader()
    assert batch.scalars["crop_left"].tolist() == [4] * 6
    expected = [opened.tokens(np.array([i]), 2)[0] for i in range(6)]
    assert torch.equal(batch.tokens, torch.stack(expected))
    one, other = (next(iter(CaptionedImages(wide, 8, 6, cache=cache, crop="random", flip=True, flip_safe=True).train_dataloader()))
                  for _ in range(2))  # fmt: skip
    assert torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize(("options", "message"), [
    ({"crop": "random"}, "crop: random needs several crops, .* encode with --crops 3"),
    ({"flip": True, "flip_safe": True}, "flip: true needs mirrored images, .* encode with --flip-safe"),
])  # fmt: skip
def test_views_that_a_cache_does_not_hold_are_refused(cached, options, message):
    folder, cache = map(str, cached)
    with pytest.raises(UserError, match=message):
        CaptionedImages(folder, 8, 4, cache=cache, **options).train_dataloader()


def test_what_cannot_be_encoded_is_one_error(wide, tmp_path):
    with pytest.raises(UserError, match="--crops: must be odd, so that one is the middle, not 2"):
        encode_tokens(PooledCodec(KINDS[0]), ShardSource(wide), tmp_path / "cache", crops=2)
    with pytest.raises(UserError, match="--errors: this tokenizer has no quantisation errors"):
        encode_tokens(PooledCodec(KINDS[0]), ShardSource(wide), tmp_path / "cache", errors=True)
    encode_tokens(PooledCodec(KINDS[0]), ShardSource(wide), tmp_path / "cache")
    with pytest.raises(UserError, match="differ in crops, errors"):
        encode_tokens(ErringCodec(KINDS[0]), ShardSource(wide), tmp_path / "cache", crops=3, errors=True)


def test_cached_and_drawn_images_tell_the_same_conditions(wide, tmp_path):
    encode_tokens(PooledCodec(KINDS[0]), ShardSource(wide), tmp_path / "cache")
    cached, plain = (next(iter(CaptionedImages(wide, 8, 6, **options).train_dataloader()))
                     for options in ({"cache": str(tmp_path / "cache")}, {}))  # fmt: skip
    assert cached.keys == plain.keys and cached.scalars.keys() == plain.scalars.keys()
    assert all(torch.equal(cached.scalars[name], plain.scalars[name]) for name in plain.scalars)
