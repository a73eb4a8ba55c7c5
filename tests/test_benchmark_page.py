"""The page shows every number beside its command and machine, and nothing that is no result."""

import json

import pytest

from benchmarks import page, results
from nar_t2i.errors import UserError

ROWS = [
    {"system": "ours | a", "batch": 1, "p50_ms": 12.3456, "graph": True},
    {"system": "theirs <b>", "batch": 8, "p50_ms": 5678.9, "share": None},
]


def test_tables_and_plots(tmp_path):
    results.write(tmp_path / "decoding.json", ROWS, left_out=[])
    results.write(tmp_path / "bare.json", [{"name": "no measure"}])
    read = page.load(tmp_path)
    assert [result.name for result in read] == ["bare", "decoding"]
    text, html = page.markdown(read), page.html(read)
    for shown in ("12.35", "5,679", "system", results.commit(), results.describe_machine()["processor"]):
        assert shown in text and shown in html
    assert "ours \\| a" in text and "theirs &lt;b&gt;" in html and "theirs <b>" not in html
    assert "| system | batch | graph | p50 ms | share |" in text
    assert html.count("data:image/png;base64,") == 1 and "<script" not in html
    assert results.command() in text and text.count("## ") == 2


def test_what_is_no_result_is_told(tmp_path):
    with pytest.raises(UserError, match="make bench makes them"):
        page.load(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(UserError, match="other.json: no result of a benchmark, it has no command, machine"):
        page.load(tmp_path)


def test_the_committed_page_is_that_of_the_committed_results():
    read = page.load(results.FOLDER)
    assert (results.FOLDER / "README.md").read_text() == page.markdown(read)
