"""Importers: what is kept, what is dropped and why, and what a kill leaves behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from PIL import Image

from nar_t2i.data.images import decode_image
from nar_t2i.data.shards import ShardSource
from nar_t2i.errors import UserError
from nar_t2i.prepare import coco, folder, importing, table
from nar_t2i.prepare.folder import import_folder
from nar_t2i.prepare.importing import Options
from tests.data.making_shards import encoded, pixels

ROOT = Path(__file__).resolve().parents[2]


def images(root: Path, count: int = 7) -> Path:
    """`im0.png` … with captions, in two folders."""
    (root / "inner").mkdir(parents=True)
    for n in range(count):
        path = root / ("inner" if n % 2 else "") / f"im{n}.png"
        path.write_bytes(encoded(pixels(n)))
        path.with_suffix(".txt").write_text(f"caption {n}\n\nanother {n}\n")
    return root


def stored(out: Path) -> dict[str, list[str]]:
    """Captions by the number of the image that they lie beside."""
    source = ShardSource(str(out))
    numbers = {pixels(n).tobytes(): n for n in range(50)}
    samples = [source.read(i) for i in range(len(source))]
    return {numbers[s.image.tobytes()]: s.captions for s in samples}


def test_a_folder(tmp_path):
    summary = import_folder(images(tmp_path / "in"), tmp_path / "out", Options(samples_per_shard=3))
    assert stored(tmp_path / "out") == {n: [f"caption {n}", f"another {n}"] for n in range(7)}
    assert (summary.kept, summary.dropped, summary.shards) == (7, [], 3)
    assert ShardSource(str(tmp_path / "out")).read_bytes(0) == encoded(pixels(0))
    assert ShardSource(str(tmp_path / "out")).read_text(0).scalars["original_width"] == 16


def test_what_is_dropped_is_told(tmp_path, capsys):
    root = images(tmp_path / "in", 3)
    bad = {
        "zero": (b"", b"text", "image empty file (0 bytes)"),
        "cut": (encoded(pixels(0, 64, 64), "JPEG")[:400], b"text", "image does not decode"),
        "silent": (encoded(pixels(0)), None, "no caption file"),
        "blank": (encoded(pixels(0)), b" \n\n", "empty caption"),
        "latin": (encoded(pixels(0)), "Café".encode("latin-1"), "caption is not UTF-8"),
        "lonely": (None, b"text", "caption without an image"),
    }
    for name, (image, text, _) in bad.items():
        if image is not None:
            (root / f"{name}.jpg").write_bytes(image)
        if text is not None:
            (root / f"{name}.txt").write_bytes(text)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"")
    assert folder.main([str(root), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["kept"] == 3 and "kept 3 samples" in printed and "dropped 6" in printed
    reasons = {Path(name).stem: reason for name, reason in summary["dropped"]}
    assert set(reasons) == set(bad)
    for name, (*_, reason) in bad.items():
        assert reasons[name].startswith(reason)
    assert not ShardSource(str(tmp_path / "out")).lost


def test_a_vocabulary_on_request(tmp_path, capsys):
    root = images(tmp_path / "in")
    assert folder.main([str(root), str(tmp_path / "out"), "--vocab-size", "300"]) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "vocabulary.model"))
    assert model.decode(model.encode("caption 3")) == "caption 3" and "pieces" in capsys.readouterr().out


def test_nothing_to_keep_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="nothing to import"):
        import_folder(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.png").write_bytes(b"junk")
    (tmp_path / "in" / "a.txt").write_text("text")
    with pytest.raises(UserError, match="not one of 1"):
        import_folder(tmp_path / "in", tmp_path / "out")


def test_other_formats_become_png_and_large_images_shrink(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for name, form, size in (("a.bmp", "BMP", (12, 16)), ("b.jpg", "JPEG", (64, 96)), ("c.png", "PNG", (200, 40))):
        (root / name).write_bytes(encoded(pixels(1, *size), form))
        (root / name).with_suffix(".txt").write_text(name)
    import_folder(root, tmp_path / "out", Options(max_size=32))
    source = ShardSource(str(tmp_path / "out"))
    assert [source.read(i).image.shape for i in range(3)] == [(12, 16, 3), (32, 48, 3), (160, 32, 3)]
    assert np.array_equal(source.read(0).image, pixels(1))
    assert source.read_bytes(1)[:2] == b"\xff\xd8"
    assert source.read(2).scalars["original_height"] == 200


def test_the_name_does_not_decide_the_format(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encoded(pixels(4), "PNG"))
    (tmp_path / "in" / "a.txt").write_text("a")
    import_folder(tmp_path / "in", tmp_path / "out")
    assert list(stored(tmp_path / "out")) == [4]


def test_the_same_input_gives_the_same_bytes_and_another_is_refused(tmp_path):
    root = images(tmp_path / "in")
    for out in ("a", "b"):
        import_folder(root, tmp_path / out, Options(3, workers=1 if out == "a" else 4))
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    with pytest.raises(UserError, match="samples_per_shard differ"):
        import_folder(root, tmp_path / "a", Options(4))
    (root / "im0.txt").write_text("changed")
    with pytest.raises(UserError, match="items differ"):
        import_folder(root, tmp_path / "a", Options(3))


def test_a_folder_of_strange_shards_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="unknown origin"):
        import_folder(images(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == b"mine"


def test_a_damaged_shard_is_written_again(tmp_path):
    root = images(tmp_path / "in")
    import_folder(root, tmp_path / "out", Options(3))
    whole = (tmp_path / "out" / "00001.tar").read_bytes()
    (tmp_path / "out" / "00001.tar").write_bytes(whole[:2000])
    kept = (tmp_path / "out" / "00000.tar").stat().st_mtime_ns
    import_folder(root, tmp_path / "out", Options(3))
    assert (tmp_path / "out" / "00001.tar").read_bytes() == whole
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == kept


def test_a_killed_import_leaves_no_half_shard_and_goes_on(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    large = encoded(pixels(0, 250, 250))
    for n in range(60):
        (root / f"im{n:03d}.png").write_bytes(large)
        (root / f"im{n:03d}.txt").write_text(f"caption {n}")
    script = str(ROOT / "data_prep" / "from_folder.py")
    command = [sys.executable, script, str(root), str(out), "--samples-per-shard", "12", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in out.glob(".00001.tar.*.tmp")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    finished = sorted(out.glob("*.tar"))
    assert 1 <= len(finished) < 5
    assert all(not ShardSource(str(tar)).lost and len(ShardSource(str(tar))) == 12 for tar in finished)
    kept = finished[0].stat().st_mtime_ns
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "kept 60 samples in 5 shards" in done.stdout
    assert finished[0].stat().st_mtime_ns == kept and not list(out.glob(".*tmp"))
    source = ShardSource(str(out))
    assert [source.read_text(i).captions for i in range(60)] == [[f"caption {n}"] for n in range(60)]


def coco_file(path: Path, root: Path) -> Path:
    names = {30: "im0.png", 10: "inner/im1.png", 20: "gone.png", 40: "../secret.png", 50: "im2.png"}
    captions = [(30, "zero a"), (10, "one"), (30, "zero b"), (20, "gone"), (40, "secret"), (99, "nobody's")]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in names.items()],
        "annotations": [{"image_id": i, "caption": c, "id": n} for n, (i, c) in enumerate(captions)],
    }
    (root.parent / "secret.png").write_bytes(encoded(pixels(9)))
    path.write_text(json.dumps(content))
    return path


def test_coco(tmp_path):
    root = images(tmp_path / "in", 3)
    summary = coco.import_coco(coco_file(tmp_path / "c.json", root), root, tmp_path / "out")
    assert stored(tmp_path / "out") == {0: ["zero a", "zero b"], 1: ["one"]}
    assert {d.name: d.reason for d in summary.dropped} == {
        "gone.png": "image file is missing",
        "../secret.png": "file_name leads out of the image folder",
        "im2.png": "no caption",
        "image id 99": "caption without an image",
    }


def test_coco_entries_that_lack_something_cost_a_picture(tmp_path, capsys):
    root, path = images(tmp_path / "in", 2), tmp_path / "c.json"
    entries = [{"id": 1, "file_name": "im0.png"}, {"id": 2}]
    told = [{"image_id": 1, "caption": "one"}, {"image_id": 1}, {"image_id": 2, "caption": "two"}]
    path.write_text(json.dumps({"images": entries, "annotations": told}))
    summary = coco.import_coco(path, root, tmp_path / "out")
    assert stored(tmp_path / "out") == {0: ["one"]}
    assert {d.name: d.reason for d in summary.dropped} == {"image id 2": "image without a file_name"}
    path.write_text(json.dumps({"images": entries, "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}))
    assert coco.main([str(path), str(root), str(tmp_path / "boxes")]) == 2
    assert "its annotations are no captions (COCO's are in captions_*.json)" in capsys.readouterr().err


def test_file_names_that_no_file_can_have_cost_a_picture(tmp_path):
    root = images(tmp_path / "in", 1)
    names = {1: "im0.png", 2: "nul\0.png", 3: "half\ud800.png"}
    entries = [{"id": number, "file_name": name} for number, name in names.items()]
    told = [{"image_id": number, "caption": "a caption"} for number in names]
    (tmp_path / "c.json").write_text(json.dumps({"images": entries, "annotations": told}))
    summary = coco.import_coco(tmp_path / "c.json", root, tmp_path / "out")
    assert stored(tmp_path / "out") == {0: ["a caption"]} and len(summary.dropped) == 2
    (root / "t.csv").write_bytes(b"path,caption\nim0.png,good\nnul\0.png,bad\n")
    summary = table.import_table(root / "t.csv", tmp_path / "table")
    assert stored(tmp_path / "table") == {0: ["good"]} and len(summary.dropped) == 1


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"images": [{}], "annotations": []}',
        '{"images": []}',
        '{"images": [{"id": 1, "file_name": "a"}, {"id": "2", "file_name": "b"}], "annotations": []}',
    ],
)
def test_broken_coco_files_are_one_clear_error(tmp_path, content, capsys):
    (tmp_path / "c.json").write_text(content)
    assert coco.main([str(tmp_path / "c.json"), str(tmp_path), str(tmp_path / "out")]) == 2
    assert "not COCO captions" in capsys.readouterr().err


ROWS = [
    ("im0.png", "zero, with comma"),
    ("inner/im1.png", "one"),
    ("im0.png", "zero\tagain"),
    ("none.png", "x"),
    ("im2.png", ""),
]


def write_table(path: Path) -> Path:
    if path.suffix == ".parquet":
        columns = {"file": [r[0] for r in ROWS], "text": [r[1] for r in ROWS], "more": list(range(len(ROWS)))}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerows([("more", "file", "text"), *((1, *row) for row in ROWS)])
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, suffix, capsys):
    root = images(tmp_path / "in", 3)
    path = write_table(tmp_path / f"t.{suffix}")
    options = ["--root", str(root), "--path-column", "file", "--caption-column", "text"]
    assert table.main([str(path), str(tmp_path / "out"), *options]) == 0
    assert stored(tmp_path / "out") == {0: ["zero, with comma", "zero again"], 1: ["one"]}
    dropped = json.loads((tmp_path / "out" / "summary.json").read_text())["dropped"]
    assert dropped == [["none.png", "image file is missing"], ["im2.png", "empty caption"]]
    assert table.main([str(path), str(tmp_path / "other"), *options[:2]]) == 2
    assert "no column path, caption; it has" in capsys.readouterr().err


def test_a_row_that_is_not_utf8_costs_a_row(tmp_path):
    root = images(tmp_path / "in", 2)
    (root / "t.csv").write_bytes(b"path,caption\nim0.png,Caf\xe9\ninner/im1.png,good\n")
    summary = table.import_table(root / "t.csv", tmp_path / "out")
    assert stored(tmp_path / "out") == {1: ["good"]} and summary.dropped == [("im0.png", "caption is not UTF-8")]


@pytest.mark.parametrize("name,content", [("t.xlsx", b"x"), ("t.parquet", b"x"), ("none.csv", None)])
def test_other_tables_are_one_clear_error(tmp_path, name, content, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert table.main([str(tmp_path / name), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_names_need_not_be_text(tmp_path):
    root = images(tmp_path / "in", 1)
    strange = os.fsencode(root) + b"/caf\xe9"
    for suffix, content in ((b".png", encoded(pixels(1))), (b".txt", b"coffee")):
        with open(strange + suffix, "wb") as file:
            file.write(content)
    with open(os.fsencode(root) + b"/lost\xe9.png", "wb") as file:
        file.write(b"")
    script = [sys.executable, str(ROOT / "data_prep/from_folder.py"), str(root), str(tmp_path / "out")]
    strict = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(script, capture_output=True, text=True, env=strict)
    assert done.returncode == 0 and "lost\\udce9.png: no caption file" in done.stdout, done.stderr
    assert stored(tmp_path / "out") == {0: ["caption 0", "another 0"], 1: ["coffee"]}


def test_linked_folders_are_searched_once(tmp_path):
    root, other = images(tmp_path / "in", 1), tmp_path / "other"
    other.mkdir()
    (other / "im9.png").write_bytes(encoded(pixels(9)))
    (other / "im9.txt").write_text("linked")
    (root / "link").symlink_to(other)
    (other / "circle").symlink_to(root)
    import_folder(root, tmp_path / "out")
    assert stored(tmp_path / "out") == {0: ["caption 0", "another 0"], 9: ["linked"]}


def test_pictures_of_several_pictures_keep_their_bytes(tmp_path):
    """As many phones write them."""
    (tmp_path / "in").mkdir()
    image = Image.fromarray(pixels(0, 64, 64))
    image.save(tmp_path / "in/a.jpg", "MPO", save_all=True, append_images=[image])
    (tmp_path / "in/a.txt").write_text("noise")
    import_folder(tmp_path / "in", tmp_path / "out")
    assert ShardSource(str(tmp_path / "out")).read_bytes(0) == (tmp_path / "in/a.jpg").read_bytes()


def test_rotated_images_keep_their_bytes_and_read_upright(tmp_path):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(pixels(3), "PNG", exif=exif.tobytes())
    (tmp_path / "in" / "a.png").write_bytes(data)
    (tmp_path / "in" / "a.txt").write_text("a")
    import_folder(tmp_path / "in", tmp_path / "out")
    source = ShardSource(str(tmp_path / "out"))
    assert source.read_bytes(0) == data and np.array_equal(source.read(0).image, decode_image(data))
    assert source.read(0).scalars["original_width"] == 12


def test_a_coco_caption_of_none_is_none_and_linked_images_are_read(tmp_path):
    root = images(tmp_path / "store", 2)
    (tmp_path / "links").mkdir()
    for number in range(2):
        (tmp_path / f"links/im{number}.png").symlink_to(root / f"im{number}.png")
    entries = [{"id": number, "file_name": f"im{number}.png"} for number in range(2)]
    told = [{"image_id": 0, "caption": None}, {"image_id": 0, "caption": "told"}, {"image_id": 1, "caption": None}]
    (tmp_path / "c.json").write_text(json.dumps({"images": entries, "annotations": told}))
    summary = coco.import_coco(tmp_path / "c.json", tmp_path / "links", tmp_path / "out")
    assert stored(tmp_path / "out") == {0: ["told"]}
    assert [(dropped.name, dropped.reason) for dropped in summary.dropped] == [("im1.png", "empty caption")]


def test_rows_with_other_fields_than_the_table_are_told(tmp_path):
    root = images(tmp_path / "in", 5)
    rows = [
        "path,caption",
        "im0.png,good",
        "inner/im1.png,a cat, on a mat",
        'im2.png,"a cat, on a mat"',
        "inner/im3.png",
        "",
        'im4.png,"a "cat" sits"',
    ]
    (root / "t.csv").write_text("\n".join(rows))
    summary = table.import_table(root / "t.csv", tmp_path / "out")
    assert stored(tmp_path / "out") == {0: ["good"], 2: ["a cat, on a mat"]}
    told = {dropped.name: dropped.reason for dropped in summary.dropped}
    assert told.keys() == {"line 3", "line 5", "line 7"} and "row has other fields than the table: 3, not 2" in told["line 3"]
    (root / "u.csv").write_text('path,caption\nim0.png,good\nim1.png,"never closed\nim2.png,fine\n')
    with pytest.raises(UserError, match="u.csv: a quote that is opened in line 3 or later is never closed"):
        table.find_items(root / "u.csv")


def test_quotes_in_a_tsv_take_no_rows(tmp_path):
    root = images(tmp_path / "in", 4)
    rows = [
        "path\tcaption",
        'im0.png\t"Star Wars poster',
        "inner/im1.png\ta cat",
        'im2.png\tsays hi"',
        'inner/im3.png\t"the ""best"" one"',
    ]
    (root / "t.tsv").write_text("\n".join(rows))
    summary = table.import_table(root / "t.tsv", tmp_path / "out")
    assert stored(tmp_path / "out") == {0: ['"Star Wars poster'], 1: ["a cat"], 2: ['says hi"'], 3: ['the "best" one']}
    assert not summary.dropped


def test_a_quoted_caption_of_a_tsv_may_have_lines_and_an_open_quote_in_a_large_csv_is_told(tmp_path, monkeypatch):
    root = images(tmp_path / "in", 3)
    (root / "t.tsv").write_text('path\tcaption\nim0.png\t"first line\nsecond line"\ninner/im1.png\t"Star Wars\n\nim2.png\tlast')
    table.import_table(root / "t.tsv", tmp_path / "out")
    assert stored(tmp_path / "out") == {0: ["first line second line"], 1: ['"Star Wars'], 2: ["last"]}
    monkeypatch.setattr(csv, "field_size_limit", lambda limit, inner=csv.field_size_limit: inner(100))
    (root / "u.csv").write_text('path,caption\nim0.png,"never closed\n' + "im2.png,fine\n" * 100)
    with pytest.raises(UserError, match="u.csv: a quote that is opened in line 2 or later is never closed"):
        table.find_items(root / "u.csv")


def test_captions_that_no_reader_would_take_are_dropped(tmp_path):
    root = images(tmp_path / "in", 1)
    (root / "im0.txt").write_text("word " * 60_000)
    (root / "._im0.txt").write_bytes(b"\x00\x05\x16")  # as one system leaves it on the disks of others
    with pytest.raises(UserError, match="captions are longer than 131072 bytes"):
        folder.import_folder(root, tmp_path / "out")
    assert [item.name for item in folder.find_items(root)] == ["im0.png"]


def test_of_two_imports_at_once_one_is_refused(tmp_path, monkeypatch):
    """Whichever comes first: here the other one, between looking and writing."""
    first, second = images(tmp_path / "first", 2), images(tmp_path / "second", 3)
    inner = importing.write_new

    def raced(path, value):
        monkeypatch.setattr(importing, "write_new", inner)
        import_folder(second, tmp_path / "out")
        return inner(path, value)

    monkeypatch.setattr(importing, "write_new", raced)
    with pytest.raises(UserError, match="holds shards from another input"):
        import_folder(first, tmp_path / "out")
    assert len(stored(tmp_path / "out")) == 3 and not list((tmp_path / "out").glob(".*"))


def test_a_picture_that_was_changed_since_is_noticed_whatever_its_size(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for n in range(4):
        Image.new("RGB", (8, 8), "red").save(root / f"{n}.bmp")
        (root / f"{n}.txt").write_text(f"caption {n}")
    import_folder(root, tmp_path / "out", Options(2))
    (tmp_path / "out/00001.tar").unlink()
    Image.new("RGB", (8, 8), "blue").save(root / "3.bmp")
    with pytest.raises(UserError, match="3.bmp was changed after"):
        import_folder(root, tmp_path / "out", Options(2))
    os.utime(root / "3.bmp", (1, 1))
    assert import_folder(root, tmp_path / "out", Options(2)).kept == 4


def test_pictures_from_the_future_are_the_same_the_second_time(tmp_path):
    root = images(tmp_path / "in", 4)
    os.utime(root / "im0.png", (2**32, 2**32))
    assert [import_folder(root, tmp_path / "out", Options(2)).kept for _ in range(2)] == [4, 4]


def test_coco_images_of_one_id_are_told(tmp_path):
    entry = {"id": 1, "file_name": "a.png"}
    content = {"images": [entry, entry, {"id": 1, "file_name": "b.png"}], "annotations": [{"image_id": 1, "caption": "one"}]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="image id 1 is that of a.png and of b.png"):
        coco.find_items(tmp_path / "c.json", tmp_path)
    content["images"].pop()
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert [item.name for item in coco.find_items(tmp_path / "c.json", tmp_path)] == ["a.png"]


def test_odd_files_cost_a_picture_and_are_told(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for name in ("good.jfif", "upper.JPEG", "linked.png", "folder.png", "pipe.png", "waits.png", "phone.heic"):
        (root / name).write_bytes(encoded(pixels(1), "JPEG"))
        (root / name).with_suffix(".TXT" if name == "upper.JPEG" else ".txt").write_text("a caption")
    (root / "alone.txt").write_text("a caption")
    for name in ("linked.txt", "folder.txt", "pipe.txt", "waits.png"):
        (root / name).unlink()
    os.symlink("linked.txt", root / "linked.txt")
    (root / "folder.txt").mkdir()
    os.mkfifo(root / "pipe.txt")
    os.mkfifo(root / "waits.png")
    summary = import_folder(root, tmp_path / "out")
    assert summary.kept == 2 and {dropped.name: dropped.reason for dropped in summary.dropped} == {
        "alone.txt": "caption without an image",
        "folder.png": "no caption file",
        "linked.png": "caption cannot be read: Too many levels of symbolic links",
        "phone.heic": ".heic is not read; convert it to JPEG, PNG or WebP",
        "pipe.png": "caption cannot be read: it is no regular file",
        "waits.png": "image file cannot be read: it is no regular file",
    }


def test_a_shard_that_cannot_be_finished_leaves_nothing(tmp_path):
    from tests.full_disk import files_of_at_most

    with files_of_at_most(4000), pytest.raises(OSError):
        import_folder(images(tmp_path / "in", 40), tmp_path / "out", Options(40))
    assert not [path for path in (tmp_path / "out").iterdir() if ".tar" in path.name]


def test_tables_with_a_column_twice_or_in_utf_16(tmp_path):
    twice = pyarrow.table([["a"], ["b"], ["c"]], names=["path", "caption", "caption"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    (tmp_path / "twice.csv").write_text("path,caption,caption\na,b,c\n")
    (tmp_path / "wide.csv").write_text("path,caption\na,b\n", encoding="utf-16")
    for name, words in (
        ("twice.parquet", "several columns caption"),
        ("twice.csv", "several columns caption"),
        ("wide.csv", "is in UTF-16"),
    ):
        with pytest.raises(UserError, match=words):
            table.find_items(tmp_path / name)
