"""Local shards: nothing is lost silently, nothing is executed, nothing is written where a name says."""

import errno
import logging
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from nar_t2i.data import shards
from nar_t2i.data.opening import Weighted, open_source
from nar_t2i.data.shard_index import encode_index, index_path, open_index, scan_tar
from nar_t2i.data.shards import ShardSource
from nar_t2i.data.source import SampleError
from nar_t2i.errors import UserError
from nar_t2i.prepare import indices, sentencepiece, text, tokens
from tests.data.making_shards import HURT, encoded, hurt_members, members, pixels, write_shards, write_tar
from tests.tiny_pipeline import tiny_pipeline


def test_written_shards_read_back(tmp_path):
    source = ShardSource(str(write_shards(tmp_path / "s", [3, 4], captions=2)))
    assert len(source) == 7 and list(source.blocks) == [3, 4] and not source.lost
    for index in (0, 2, 3, 6):
        sample = source.read(index)
        assert sample.key == f"s{index:06d}" and sample.captions == [f"caption {index}.0", f"caption {index}.1"]
        assert np.array_equal(sample.image, pixels(index))
        assert sample.scalars["score"] == index


def test_the_index_of_the_writer_is_that_of_a_scan(tmp_path):
    folder = write_shards(tmp_path, [5], captions=2)
    written = index_path(folder / "00000.tar").read_bytes()
    rows, losses = scan_tar(folder / "00000.tar")
    assert encode_index(rows, losses, (folder / "00000.tar").stat().st_size) == written


def test_many_texts_at_once_equal_one_by_one(tmp_path):
    source = ShardSource(str(write_shards(tmp_path, [3, 4, 2], captions=3)))
    indices, pick = np.array([8, 0, 3, 3, 5]), np.array([0.0, 0.5, 0.99, 0.34, 0.2])
    texts = source.read_texts(indices, pick)
    assert texts.keys == [source.read_text(i).key for i in indices]
    assert texts.captions == [source.read_text(i).captions[int(p * 3)] for i, p in zip(indices, pick)]
    assert texts.scalars["score"].tolist() == indices.tolist()


def test_caption_forms(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [
            *members("list", 0, "first", captions=["one", " two\nlines ", "", 3]),
            *members("text", 1, "from the text", caption="from the json"),
            ("json.png", encoded(pixels(2))),
            ("json.json", b'{"caption": "\\u65e5\\u672c \\ud83d\\ude00"}'),
        ],
    )
    source = ShardSource(str(tmp_path))
    captions = {(s := source.read_text(i)).key: s.captions for i in range(3)}
    assert captions == {"list": ["one", "two lines"], "text": ["from the text"], "json": ["日本 😀"]}


def test_hurt_samples_are_named_with_reasons(tmp_path):
    write_tar(tmp_path / "0.tar", hurt_members())
    source = ShardSource(str(tmp_path))
    found = {source.read_text(i).key for i in range(len(source))}
    lost = {loss.key: loss.reason for loss in source.lost}
    for index in range(len(source)):
        try:
            source.read(index)
        except SampleError as error:
            lost[error.lost.key] = error.lost.reason
            found.remove(error.lost.key)
    assert found == {"g0", "g1", "g2", "g3"} and set(lost) == HURT
    assert "0 bytes" in lost["empty"] and "UTF-8" in lost["latin"] and "decode" in lost["broken"]


@pytest.mark.parametrize("where", ["in an image", "in a header", "between members"])
def test_a_truncated_tar_is_accounted_for(tmp_path, where):
    whole = write_tar(tmp_path / "whole.tar", [m for i in range(6) for m in members(f"k{i}", i)])
    rows, _ = scan_tar(whole)
    offset = rows[3].offset
    cut = {"in an image": offset + 20, "in a header": offset - 100, "between members": offset - 512}
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "0.tar").write_bytes(whole.read_bytes()[: cut[where]])
    source = ShardSource(str(tmp_path / "cut"))
    assert [source.read(i).key for i in range(len(source))] == ["k0", "k1", "k2"]
    assert any("cut off" in loss.reason for loss in source.lost)
    assert not scan_tar(whole)[1]


def test_damage_in_the_middle_is_accounted_for(tmp_path):
    tar = write_tar(tmp_path / "0.tar", [m for i in range(6) for m in members(f"k{i}", i)])
    rows, _ = scan_tar(tar)
    data = bytearray(tar.read_bytes())
    data[rows[3].offset - 512 : rows[3].offset] = b"\x07" * 512  # the header of k3's image
    tar.write_bytes(data)
    rows, losses = scan_tar(tar)
    assert [row.key for row in rows] == ["k0", "k1", "k2"] and "damaged" in losses[-1].reason


@pytest.mark.parametrize("change", [lambda d: d[:-700], lambda d: d + bytes(512)])
def test_a_tar_that_is_not_the_indexed_one_is_refused(tmp_path, change):
    folder = write_shards(tmp_path, [4])
    tar = folder / "00000.tar"
    tar.write_bytes(change(tar.read_bytes()))
    with pytest.raises(UserError, match="truncated or was replaced"):
        ShardSource(str(folder))
    index_path(tar).unlink()
    ShardSource(str(folder))


def test_a_tar_of_the_same_size_that_was_written_again_is_refused(tmp_path, caplog):
    """Tars are padded, so that another caption, or another order, leaves the size as it was."""
    first, second = members("a", 0, "a red square"), members("b", 1, "a green square")
    tar = write_tar(tmp_path / "0.tar", first + second)
    ShardSource(str(tmp_path))
    size, past = tar.stat().st_size, index_path(tar).stat().st_mtime_ns
    for changed in (members("a", 0, "a blue square") + second, second + first):
        write_tar(tar, changed)
        os.utime(index_path(tar), ns=(past - 10**9, past - 10**9))
        with pytest.raises(UserError, match="holds other samples than 0.index.safetensors says"):
            ShardSource(str(tmp_path))
    assert tar.stat().st_size == size
    write_tar(tar, first + second)  # as it was, and only newer, as copies are
    os.utime(index_path(tar), ns=(past - 10**9, past - 10**9))
    for scans in (1, 0):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert ShardSource(str(tmp_path)).read_text(0).captions == ["a red square"]
        assert sum("newer than its index" in record.getMessage() for record in caplog.records) == scans


def test_where_nothing_can_be_written_a_newer_tar_is_compared_once(tmp_path, monkeypatch, caplog):
    folder = write_shards(tmp_path, [2, 2, 2])
    for tar in folder.glob("*.tar"):
        open_index(tar)
        os.utime(tar, ns=(2**62, 2**62))
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with caplog.at_level(logging.INFO):
        source = ShardSource(str(folder))
        for index in (0, 2, 4, 0, 2, 4):
            assert source.read_text(index).captions
    assert sum("newer than its index" in record.getMessage() for record in caplog.records) == 3


def test_a_broken_index_is_refused(tmp_path):
    folder = write_shards(tmp_path, [4])
    path = index_path(folder / "00000.tar")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="not a readable shard index"):
        ShardSource(str(folder))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/nar_t2i_pickle_was_loaded",)


def test_pickles_and_unknown_members_are_never_opened(tmp_path):
    evil = [(f"k0.{suffix}", pickle.dumps(Bomb())) for suffix in ("pyd", "pkl", "pth", "pickle", "cls", "npy")]
    write_tar(tmp_path / "0.tar", [*evil, *members("k0", 0)])
    source = ShardSource(str(tmp_path))
    assert source.read(0).captions == ["caption 0"]
    assert not os.path.exists("/tmp/nar_t2i_pickle_was_loaded")


def test_member_names_never_become_paths(tmp_path):
    inner = tmp_path / "deep" / "shards"
    names = ["../../evil", "/tmp/nar_t2i_evil", "..", "a/../../b", "C:\\evil"]
    write_tar(inner / "0.tar", [m for i, name in enumerate(names) for m in members(name, i)])
    source = ShardSource(str(inner))
    assert len(source) == 4  # ".." has no stem before its first dot and shares the key "" with its text
    for index in range(len(source)):
        source.read(index)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["0.index.safetensors", "0.tar"]
    assert not os.path.exists("/tmp/nar_t2i_evil.png")


def test_links_in_a_tar_are_not_followed(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("k0.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        image = encoded(pixels(0))
        info = tarfile.TarInfo("k0.png")
        info.size = len(image)
        tar.addfile(info, io.BytesIO(image))
    source = ShardSource(str(tmp_path))
    assert len(source) == 0 and source.lost[0].reason == "no caption"


def test_a_folder_that_cannot_be_written_keeps_its_index_in_memory(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", members("k0", 0))

    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr("nar_t2i.data.shard_index.whole_file", refuse)
    source = ShardSource(str(tmp_path))
    assert source.read(0).key == "k0" and not index_path(tmp_path / "0.tar").exists()
    assert pickle.loads(pickle.dumps(source)).read(0).key == "k0"


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("nar_t2i.data.shards.OPEN_SHARDS", 2)
    source = ShardSource(str(write_shards(tmp_path, [2] * 6)))
    for index in [*range(12), 0, 11, 5]:
        assert np.array_equal(source.read(index).image, pixels(index))
    assert len(source._open) == 2


def test_a_source_travels_to_a_spawned_process(tmp_path):
    source = ShardSource(str(write_shards(tmp_path, [3])))
    source.read(0)
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(source))
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'source.pickle')!r}, 'rb')).read(2).key)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "s000002", done.stderr


def test_patterns(tmp_path):
    folder = write_shards(tmp_path, [1, 2, 3])
    assert list(ShardSource(f"{folder}/0000{{0,2}}.tar").blocks) == [1, 3]
    assert list(ShardSource(f"{folder}/0000[12].tar").blocks) == [2, 3]
    assert list(ShardSource(f"{folder}/00001.tar").blocks) == [2]
    for wrong in (f"{folder}/{{00000..00005}}.tar", f"{folder}/none", f"{folder}/*.tgz"):
        with pytest.raises(UserError):
            ShardSource(wrong)


def test_a_file_that_is_no_tar_is_one_clear_error(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match="not an uncompressed tar"):
        ShardSource(str(tmp_path))


def test_identity_follows_content(tmp_path):
    a = open_index(write_shards(tmp_path / "a", [3]) / "00000.tar").identity
    b = open_index(write_shards(tmp_path / "b", [3]) / "00000.tar").identity
    c = open_index(write_shards(tmp_path / "c", [3], first=1) / "00000.tar").identity
    assert a == b != c


@pytest.mark.parametrize(
    "fields, reason",
    [('{"caption": "a", "size": ' + 400 * "9" + "}", "broken .json"), (100_000 * "[" + 100_000 * "]", "broken .json")],
)
def test_json_that_python_cannot_hold_costs_a_sample(tmp_path, fields, reason):
    path = write_tar(
        tmp_path / "00000.tar",
        [("a.png", encoded(pixels(0))), ("a.json", fields.encode()), ("b.png", encoded(pixels(1))), ("b.txt", b"b")],
    )
    source = ShardSource(str(path.parent))
    assert len(source) == 1 and [loss.reason.startswith(reason) for loss in source.lost] == [True]


def test_a_pattern_without_its_brace_is_one_clear_error():
    with pytest.raises(UserError, match="is no pattern of shards"):
        ShardSource("data/{00..09.tar")


def test_names_with_more_dots_are_told_unless_they_stand_beside_an_image(tmp_path):
    dotted = [
        ("IMG_2020.01.02.png", encoded(pixels(1))),
        ("IMG_2020.01.02.txt", b"a caption"),
        ("IMG_2020.03.04.png", encoded(pixels(2))),
    ]
    write_tar(tmp_path / "0.tar", [*members("good", 0), ("good.mask.png", encoded(pixels(3))), *dotted])
    source = ShardSource(str(tmp_path))
    assert len(source) == 1
    assert [(loss.key, "first dot" in loss.reason) for loss in source.lost] == [
        ("IMG_2020.01.02.png", True),
        ("IMG_2020.03.04.png", True),
    ]


def test_a_byte_order_mark_is_no_caption_and_an_empty_list_hides_none(tmp_path):
    marked = [("a.png", encoded(pixels(0))), ("a.txt", "\ufeffa cat".encode())]
    listed = [("b.png", encoded(pixels(1))), ("b.txt", b"a dog"), ("b.json", b'{"captions": []}')]
    write_tar(tmp_path / "0.tar", [*marked, *listed])
    source = ShardSource(str(tmp_path))
    assert [source.read_text(i).captions for i in range(2)] == [["a cat"], ["a dog"]]


def strip(folder):
    for path in folder.glob("*.index.safetensors"):
        path.unlink()


def test_ranks_index_foreign_shards_from_different_places(tmp_path, monkeypatch, caplog):
    folder = write_shards(tmp_path, [1] * 4)
    strip(folder)
    made = []
    inner = shards.open_index

    def noted(tar, path, compared):
        if not path.exists():
            made.append(tar.stem)
            if tar.stem == "00002":
                inner(folder / "00000.tar")  # as another rank does meanwhile
        return inner(tar, path, compared)

    monkeypatch.setattr(shards, "open_index", noted)
    monkeypatch.setattr(
        shards,
        "dist",
        SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2),
    )
    assert len(ShardSource(str(folder))) == 4 and made == ["00002", "00003", "00001"]
    assert "4 of 4 shards" in caplog.text and "index_shards.py" in caplog.text
    caplog.clear()
    assert len(ShardSource(str(folder))) == 4 and not caplog.records


def test_indices_may_stand_in_a_folder_of_their_own(tmp_path, capsys, monkeypatch):
    folders = [write_shards(tmp_path / name, [2, 3], first=first) for name, first in (("a", 0), ("b", 5))]  # of the same names
    for folder in folders:
        strip(folder)
        folder.chmod(0o555)
    both = f"{tmp_path}/{{a,b}}/*.tar"
    assert indices.main([both, "--index-folder", str(tmp_path / "i"), "--workers", "2"]) == 0
    assert "10 samples; 0 cannot be used" in capsys.readouterr().out
    monkeypatch.setattr("nar_t2i.data.shard_index.scan_tar", None)  # would be an error now
    source = ShardSource(both, index_folder=str(tmp_path / "i"))
    assert [source.read_text(i).key for i in range(10)] == [f"s{n:06d}" for n in range(10)]
    assert len(open_source([Weighted(str(folder)) for folder in folders], index_folder=str(tmp_path / "i"))) == 10
    assert not list(folders[0].glob("*.safetensors"))
    assert ShardSource(str(folders[1]), index_folder=str(tmp_path / "i")).read_text(0).key == "s000005"
    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "model")
    for command, given in (
        (tokens, [str(tmp_path / "model"), str(tmp_path / "tokens")]),
        (text, [str(tmp_path / "model"), str(tmp_path / "text")]),
        (sentencepiece, [str(tmp_path / "words.model"), "--vocab-size", "280"]),
    ):
        assert command.main([both, *given, "--index-folder", str(tmp_path / "i")]) == 0
    assert not list(folders[0].glob("*.safetensors"))


def test_an_index_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    folder = write_shards(tmp_path, [2])

    def full(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("nar_t2i.data.shard_index.open_map", full)
    with pytest.raises(UserError, match="00000.index.safetensors cannot be opened: Too many open files"):
        ShardSource(str(folder))


@pytest.mark.parametrize("name", ["key_bytes", "caption_bytes", "caption_rows", "images", "scalars"])
def test_an_index_whose_arrays_do_not_fit_is_one_clear_error(tmp_path, name):
    path = index_path(write_shards(tmp_path, [3]) / "00000.tar")
    with safe_open(path, "numpy") as file:
        arrays, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for damaged in ({key: value for key, value in arrays.items() if key != name}, {**arrays, name: arrays[name][:-1]}):
        path.write_bytes(save(damaged, metadata))
        with pytest.raises(UserError, match="is not a readable shard index"):
            open_index(tmp_path / "00000.tar")


def test_a_process_may_open_more_files_than_usual(tmp_path):
    code = """if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        from nar_t2i.files import allow_open_files
        allow_open_files()
        files = [open(sys.executable) for _ in range(200)]
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
