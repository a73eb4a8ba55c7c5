"""One table of runs, evaluations and suites: what stands in it, and that numbers of other protocols are marked."""

import csv
import json

import pytest

from nar_t2i.cli import main
from nar_t2i.evaluation.side_by_side import differing, read_entries
from tests.evaluation.test_report import METRICS, scores


def evaluation(path, value=3.25, kinds=("model",), seed=0, **protocol):
    numbers = {"value": value, "deviation": 0.5, "features": "scene", "samples": 40, "real_samples": 40, "protocol": {"k": 3}}
    told = {"seed": seed, "data": {"samples": 40, "source": "shards"}, "real": {"which": "same"},
            "features": {"scene": {"weights_hash": "0"}, "clip": {"sha256": "1"}}, **protocol}  # fmt: skip
    captions = {"value": 6.3, "features": "clip", "samples": 40, "protocol": {}}  # of pictures and captions, with no real ones
    result = {"scene_frechet": numbers, "clip_score": captions, "decoding": {"steps": 8, "precision": "fp32"},
              "scene_accuracy": {"seen": scores(value / 10), "shuffled": scores(0.01)}}  # fmt: skip
    path.write_text(json.dumps({"kind": "evaluation", "protocol": told, "results": dict.fromkeys(kinds, result)}))
    return path


def rows(path):
    with open(path, newline="") as file:
        return {(row["entry"], row["measure"]): row for row in csv.DictReader(file)}


def test_everything_stands_in_one_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation(tmp_path / "one.json", kinds=("ema", "raw"))
    (tmp_path / "suite.json").write_text(
        json.dumps({"kind": "suite", "suite": "dpg", "scores": {"overall": 71.5}, "about": "percent"})
    )
    for folder in ("a/run/generator", "b/run"):  # a quickstart's and a run's
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.csv").write_text("step,epoch,loss\n1,0,2.0\n5,0,1.5\n")
    (tmp_path / "a/run/metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "out").mkdir()
    interval = [0.5, 0.4, 0.6]
    row = {"name": "halton", "seen": interval, "held_out": interval, "passes": 16, "steps": 100, "strategy": {}}
    (tmp_path / "out/comparison.json").write_text(json.dumps({"rows": [row]}))
    assert main(["report", "one.json", "suite.json", "a/run", "b/run", "out"]) == 0
    found = rows(tmp_path / "side-by-side.csv")
    assert {entry for entry, _ in found} == {"one (ema)", "one (raw)", "suite", "run", "run (b)", "halton"}
    assert (
        found["one (raw)", "scene_frechet"]["value"] == "3.25" and found["one (raw)", "scene_frechet: deviation"]["value"] == "0.5"
    )
    assert found["suite", "dpg: overall"]["value"] == "71.5" and found["run (b)", "last: loss"]["value"] == "1.5"
    assert found["run", "tokenizer: psnr"]["value"] == "27.43"
    seen = found["halton", "scene accuracy, seen: overall"]
    assert (seen["value"], seen["low"], seen["high"]) == ("0.5", "0.4", "0.6")
    page = (tmp_path / "side-by-side.html").read_text()
    assert "&quot;precision&quot;: &quot;fp32&quot;" in page  # how pictures were drawn
    assert page.count("<h2>") >= 2 and (tmp_path / "a/run/report.html").is_file() and (tmp_path / "b/run/metrics.json").is_file()


def test_numbers_by_other_protocols_are_marked_and_say_in_what(tmp_path):
    other = {"source": "others", "samples": 30}
    paths = [
        evaluation(tmp_path / "a.json"),
        evaluation(tmp_path / "b.json", 2.0),
        evaluation(tmp_path / "c.json", 2.0, seed=1, data=other),
    ]
    weights = {"scene": {"weights_hash": "9"}, "clip": {"sha256": "1"}}
    paths.append(evaluation(tmp_path / "d.json", features=weights))
    paths.append(
        evaluation(tmp_path / "e.json", features={"scene": {"weights_hash": "0"}, "clip": {"sha256": "2"}})
    )  # of another metric
    entries = [entry for path in paths for entry in read_entries(path)]
    found = differing(entries)
    assert found["scene_frechet"] == {"c": ["data.samples", "data.source", "seed"], "d": ["features.weights_hash"]}
    assert found["scene accuracy, seen: overall"] == {"c": ["seed"]} and "steps" not in found
    moved = [
        evaluation(tmp_path / f"{name}.json", data={"samples": 40, "source": name, "hash": value})
        for name, value in (("h0", 0), ("i0", 0), ("j1", 1))
    ]
    assert differing([entry for path in moved for entry in read_entries(path)])["scene_frechet"] == {"j1": ["data.hash"]}
    named = [{"scene": {"sha256": value, "file": f"{name}.pt"}, "clip": {}} for name, value in (("a", "1"), ("b", "1"), ("c", "2"))]
    renamed = [evaluation(tmp_path / f"{name}.json", features=of) for name, of in zip(("n1", "n2", "n3"), named)]
    assert differing([entry for path in renamed for entry in read_entries(path)])["scene_frechet"] == {"n3": ["features.sha256"]}
    real = [
        evaluation(tmp_path / f"{name}.json", real=what)
        for name, what in (("r1", None), ("r2", {"which": "all"}), ("r3", {"which": "same"}))
    ]
    of_real = differing([entry for path in real for entry in read_entries(path)])
    assert set(of_real["scene_frechet"]) == {"r2", "r3"} and "clip_score" not in of_real
    suites = [
        {"kind": "suite", "suite": "geneval", "scores": {"overall": 0.5}, "counts": {"images": count}} for count in (40, 2212)
    ]
    for name, content in zip("fg", suites):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    row = {"name": "halton", "seen": [0.5, 0.4, 0.6], "held_out": [0.5, 0.4, 0.6], "passes": 16, "steps": 100, "strategy": {}}
    (tmp_path / "ablation").mkdir()
    comparison = {"rows": [row], "prompts": {which: {"colors": 167} for which in ("seen", "held_out")}}
    (tmp_path / "ablation/comparison.json").write_text(json.dumps(comparison))
    of_other_counts = differing(
        [entry for name in ("a.json", "ablation", "f.json", "g.json") for entry in read_entries(tmp_path / name)]
    )
    assert of_other_counts["geneval: overall"] == {"g": ["counts.images"]}
    assert "prompts.colors" in of_other_counts["scene accuracy, seen: overall"]["halton"]
    for taken in ("table.csv", "a.json"):
        before = (tmp_path / "a.json").read_bytes()
        assert main(["report", *map(str, paths), "--out", str(tmp_path / taken)]) == 2 and not (tmp_path / "table.csv").exists()
        assert (tmp_path / "a.json").read_bytes() == before
    assert main(["report", *map(str, paths), "--out", str(tmp_path / "new/table.html")]) == 0
    text = (tmp_path / "new/table.html").read_text()
    assert text.count("†</td>") == 6 and "data.samples, data.source, seed" in text
    assert rows(tmp_path / "new/table.csv")["d", "scene_frechet"]["other_protocol"] == "features.weights_hash"


@pytest.mark.parametrize("content, said", [
    ("[]", "neither an evaluation nor a suite's scores"), ('{"kind": "else"}', "neither an evaluation"), ("{", "not JSON"),
    ('{"kind": "evaluation", "results": {}}', "key results: holds nothing"),
])  # fmt: skip
def test_a_file_of_another_kind_is_named(tmp_path, capsys, content, said):
    (tmp_path / "file.json").write_text(content)
    assert main(["report", str(tmp_path / "file.json")]) == 2
    error = capsys.readouterr().err
    assert "file.json" in error and said in error and error.count("\n") == 1


def test_a_single_run_has_no_table_and_an_ablation_takes_no_name(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.csv").write_text("step,epoch,loss\n1,0,2.0\n")
    assert main(["report", str(tmp_path / "run")]) == 0 and not (tmp_path / "side-by-side.html").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/comparison.json").write_text("{}")
    assert main(["report", str(tmp_path / "out"), "--out", "x.html"]) == 2
    assert "--out: the comparison of ablations is written into the first" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), str(tmp_path / "nothing")]) == 2
    assert "nothing: does not exist" in capsys.readouterr().err
