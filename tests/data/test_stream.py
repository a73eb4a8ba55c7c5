"""Remote shards, over a real HTTP server and a real pipe."""

import functools
import http.server
import os
import pickle
import shutil
import threading

import pytest
import torch

from nar_t2i.data import CaptionedImages
from nar_t2i.data.reading import View
from nar_t2i.data.shard_index import scan_tar
from nar_t2i.data.stream import StreamReader, StreamShare
from nar_t2i.errors import UserError
from tests.data.making_shards import HURT, hurt_members, members, write_shards, write_tar


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A web server of `tmp_path`; the value is its address."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_address[1]}"
    served.shutdown()
    thread.join()


def take(data: CaptionedImages, count: int) -> list:
    batches = iter(data.train_dataloader())
    return [next(batches) for _ in range(count)]


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http through curl")


@needs_curl
@pytest.mark.parametrize("workers", [0, 2])
def test_http(tmp_path, server, workers):
    write_shards(tmp_path, [6, 6, 6, 6], captions=2)
    data = CaptionedImages(server + "/{00000..00003}.tar", 8, 4, workers=workers)
    batches = take(data, 12)
    assert torch.cat([b.ids for b in batches]).tolist() == list(range(48))
    assert all(b.images.shape == (4, 3, 8, 8) for b in batches)
    keys = [key for b in batches[:6] for key in b.keys]
    assert sorted(keys) == [f"s{n:06d}" for n in range(24)] and keys != sorted(keys)
    captions = {c for b in batches for c in b.captions}
    assert len(captions) > 24 and not data.lost_samples


def test_a_pipe_equals_its_files(tmp_path):
    write_shards(tmp_path, [6, 6])
    batches = take(CaptionedImages(f"pipe:cat {tmp_path}/{{00000,00001}}.tar", 8, 4), 6)
    assert sorted({key for b in batches for key in b.keys}) == [f"s{n:06d}" for n in range(12)]
    again = take(CaptionedImages(f"pipe:cat {tmp_path}/{{00000,00001}}.tar", 8, 4), 6)
    assert [b.keys for b in batches] == [b.keys for b in again]


def test_ranks_and_workers_share_the_shards(tmp_path):
    write_shards(tmp_path, [4] * 4)
    urls = f"pipe:cat {tmp_path}/{{00000..00003}}.tar"
    seen = []
    for rank in range(2):
        reader = StreamReader(urls, View(8), 4, StreamShare(rank, 2, 2))
        loader = torch.utils.data.DataLoader(reader, batch_size=None, num_workers=2)
        seen += [read.batch for read, _ in zip(loader, range(2))]
    assert sorted(key for b in seen for key in b.keys) == [f"s{n:06d}" for n in range(16)]
    assert [b.ids[0].item() for b in seen] == [0, 8, 4, 12]


def test_fewer_shards_than_readers_is_one_clear_error(tmp_path):
    write_shards(tmp_path, [4, 4])
    data = CaptionedImages(f"pipe:cat {tmp_path}/{{00000,00001}}.tar", 8, 4, workers=3)
    with pytest.raises(UserError, match="2 shards .* 1 ranks × 3 workers"):
        take(data, 1)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/nar_t2i_streamed_pickle_was_loaded",)


def test_hurt_samples_are_counted_and_pickles_are_not_loaded(tmp_path):
    evil = [(f"g0.{suffix}", pickle.dumps(Bomb())) for suffix in ("pyd", "pkl", "pth")]
    write_tar(tmp_path / "0.tar", evil + hurt_members())
    data = CaptionedImages(f"pipe:cat {tmp_path}/0.tar", 8, 4, max_lost_share=0.9)
    keys = {key for batch in take(data, 6) for key in batch.keys}
    assert keys == {"g0", "g1", "g2", "g3"} and {lost.key for lost in data.lost_samples} == HURT
    assert not os.path.exists("/tmp/nar_t2i_streamed_pickle_was_loaded")


@pytest.mark.parametrize("where", ["in an image", "between members", "nowhere"])
def test_truncated_shards_are_counted(tmp_path, where):
    whole = write_tar(tmp_path / "whole.tar", [m for n in range(8) for m in members(f"k{n}", n)]).read_bytes()
    offset = scan_tar(tmp_path / "whole.tar")[0][4].offset
    end = {"in an image": offset + 20, "between members": offset - 512, "nowhere": len(whole)}[where]
    write_tar(tmp_path / "good.tar", [m for n in range(8) for m in members(f"g{n}", n)])
    (tmp_path / "cut.tar").write_bytes(whole[:end])
    data = CaptionedImages(f"pipe:cat {tmp_path}/{{good,cut}}.tar", 8, 4, max_lost_share=0.9)
    keys = {key for batch in take(data, 10) for key in batch.keys}
    assert keys == {f"g{n}" for n in range(8)} | {f"k{n}" for n in range(8 if where == "nowhere" else 4)}
    assert bool([lost for lost in data.lost_samples if "cut.tar" in lost.shard]) == (where != "nowhere")


def test_a_command_that_fails_is_counted(tmp_path):
    write_shards(tmp_path, [4, 4])
    data = CaptionedImages(f"pipe:cat {tmp_path}/{{00000,00001,00009}}.tar 2>/dev/null", 8, 4, max_lost_share=0.9)
    take(data, 6)
    assert any("00009.tar" in lost.shard for lost in data.lost_samples)
    with pytest.raises(UserError, match="no readable sample"):
        take(CaptionedImages(f"pipe:cat {tmp_path}/none.tar 2>/dev/null", 8, 4), 1)


@needs_curl
def test_a_missing_url_is_counted(tmp_path, server):
    with pytest.raises(UserError, match="no readable sample"):
        take(CaptionedImages(server + "/none.tar", 8, 4), 1)


@pytest.mark.parametrize("url", ["s3://bucket/0.tar", "gs://bucket/0.tar", "hf://x/0.tar"])
def test_other_schemes_ask_for_a_command(url):
    with pytest.raises(UserError, match="pipe:"):
        take(CaptionedImages(url, 8, 4), 1)


@pytest.mark.parametrize("url", ["pipe:cat {0..3.tar", "pipe:awk '{print' 0.tar"])
def test_braces_that_are_not_closed_are_one_clear_error(url):
    with pytest.raises(UserError, match="is no pattern of shards"):
        take(CaptionedImages(url, 8, 4), 1)


def test_streams_are_not_mixed_cached_or_validated_on(tmp_path):
    folder = str(write_shards(tmp_path, [4]))
    with pytest.raises(UserError, match="only be streamed"):
        CaptionedImages(folder, 8, 4, validation="http://h/0.tar").val_dataloader()
    with pytest.raises(UserError, match="only be streamed"):
        CaptionedImages([{"source": "http://h/0.tar"}], 8, 4).train_dataloader()


def test_ids_go_on_after_a_resume(tmp_path):
    write_shards(tmp_path, [6, 6])
    data = CaptionedImages(f"pipe:cat {tmp_path}/{{00000,00001}}.tar", 8, 4)
    data.resume_at(40)
    assert take(data, 2)[1].ids.tolist() == [44, 45, 46, 47]
