"""The benchmark of training runs in small, counts what is needed, and reports nothing where losses differ."""

import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks import scaling, step_time, training
from benchmarks.results import ROOT
from benchmarks.small import SMALL_BERT
from nar_t2i.errors import UserError


def test_rows_and_their_ratios(tmp_path):
    line = [sys.executable, ROOT / "benchmarks/training.py", "--small", "--no-compile", "--micro-batch", "4", "--steps", "2",
            "--out", tmp_path / "training.json"]  # fmt: skip
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "training.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["everything", "nothing", "head at all slots", "unfused optimizer", "fp32"]
    assert rows["everything"]["over_everything"] == 1 and rows["nothing"]["over_everything"] != 1
    assert found["left_out"] == [] and found["parameters"] > 1e6 and found["recipe"] == "emage/346m-256, in small"
    for row in rows.values():
        rate = found["bf16_matrix_rate" if row["precision"] == "bf16-mixed" else "fp32_matrix_rate"]
        work = 3 * found["forward_flops_an_image"] * row["images_per_second"]  # the same for a head that reads all slots
        assert row["utilisation"] == pytest.approx(work / rate) and 0 < row["utilisation"] < 1


def test_operations_are_the_formulas_and_skipped_slots_are_none(tmp_path):
    size = 64
    bench = training.Bench(tmp_path, torch.device("cpu"), small=True, steps=1)
    counted = bench.forward_operations(size) / size
    formula = scaling.forward_operations(training.SMALL, 2, 64, 8192, training.WORDS + 2, SMALL_BERT)
    assert counted == pytest.approx(formula, rel=0.05)  # the share of hidden slots is drawn
    head = 2 * 2 * 64 * training.SMALL["width"] * 8192
    assert counted < formula + (1 - 2 / math.pi) * head - 0.2 * head  # far from those with a head at all slots


def test_every_means_can_be_told_by_its_loss():
    expected = [9.0, 8.95, 8.9]
    training.check_learned(expected)
    training.check_losses("rounded", [9.0, 8.951, 8.899], expected)
    for found in ([9.0, 9.0, 9.0], [9.0, 8.9, 8.8], [9.0, 8.95, math.nan]):  # no update, twice the update, no number
        with pytest.raises(UserError, match="other losses"):
            training.check_losses("other", found, expected)
    with pytest.raises(UserError, match="does not fall"):
        training.check_learned([9.0, 9.0, 9.0])


def test_rows_that_do_not_agree_are_no_result(tmp_path, monkeypatch):
    """An update of another size in the first row alone."""
    inner = training.random_generator

    def generator(*arguments, **means):
        module = inner(*arguments, **means)
        if means["masked_head"]:
            module.optimizer_config.learning_rate *= 4
        return module

    out = tmp_path / "training.json"
    out.write_text('{"rows": ["of an earlier run"]}')
    monkeypatch.setattr(training, "random_generator", generator)
    line = ["training.py", "--small", "--no-compile", "--micro-batch", "4", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(UserError, match="takes other losses than the first"):
        training.main()
    found = json.loads(out.read_text())
    assert found["rows"] == [] and "takes other losses" in found["failed"][0]


def test_the_full_size_needs_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, ROOT / "benchmarks/training.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0 and "--small runs anywhere" in done.stderr


def test_on_a_gpu_graphs_are_a_row_of_their_own():
    names = list(training.variants(cuda=True, compiles=True))
    assert names[-1] == "with graphs" and "without compile" in names
    assert all(sum(means[key] != training.EVERYTHING[key] for key in means) == 1
               for name, means in training.variants(True, True).items() if name not in ("everything", "nothing"))  # fmt: skip


def test_the_scaling_document_holds_the_tables_of_the_model():
    assert scaling.tables() in (ROOT / "docs/scaling.md").read_text()
    one_node, many = (scaling.predict(gpus, "ddp", 346_000_000, 1e12, 1024) for gpus in (8, 64))
    assert one_node["without overlap"] > many["without overlap"] and many["work_ms"] == pytest.approx(one_node["work_ms"] / 8)
    assert scaling.wire({"allreduce": 100.0}, 4, scaling.RING) == 150 and not scaling.payload(10, 1, "ddp", True)


def test_the_time_of_a_step_is_divided_into_kinds_of_work(tmp_path):
    line = [sys.executable, ROOT / "benchmarks/step_time.py", "--small", "--no-compile", "--micro-batch", "4", "--steps", "2",
            "--out", tmp_path / "step.json"]  # fmt: skip
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "step.json").read_text())
    parts = [row for row in found["rows"] if "kernel" not in row]
    assert [row["part"] for row in parts] == [*step_time.KINDS, step_time.OTHERS, step_time.IDLE, step_time.WAITS]
    assert sum(row["ms"] for row in parts[:-1]) == pytest.approx(found["step_ms"], rel=0.05)
    work = {row["part"]: row["calls"] for row in parts}
    assert work["matrix products"] > 40 and work["attention"] >= 2 and work["fused by the compiler"] == 0


def test_kernels_side_by_side_count_once_and_gaps_are_seen():
    spans = [
        step_time.Span(name, start, end)
        for name, start, end in (
            ("ampere_bf16_gemm_128x64", 0, 4000),
            ("flash_fwd_kernel", 3000, 5000),
            ("multi_tensor_apply_kernel", 7000, 8000),
            ("triton_poi_fused_gelu", 8000, 8500),
        )
    ]
    assert step_time.busy(spans) == 6500
    table = step_time.table(spans, [step_time.Span("cudaStreamSynchronize", 0, 600)], 10_000, 2)
    rows = {row["part"]: row for row in table if "kernel" not in row}
    assert rows["matrix products"]["ms"] == 2 and rows["attention"]["ms"] == 1
    assert rows["optimizer, average, clipping"]["calls"] == 0.5 and rows["fused by the compiler"]["ms"] == 0.25
    assert rows["nothing runs"] == {"part": "nothing runs", "ms": 1.75, "share": 0.35, "calls": 0}
    assert rows["host waits"]["ms"] == pytest.approx(0.3) and rows["others"]["ms"] == 0
