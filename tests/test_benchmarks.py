"""Benchmarks run in small, and report what they are for."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    return subprocess.run([sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def test_decoding_of_emage_and_its_twin(tmp_path):
    done = run("decoding.py", "--small", "--batch", 2, "--repeats", 2, "--twin-repeats", 1, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["matrix_rate"] > 1e8 and found["copy_rate"] > 1e7
    parts = {part["part"]: part for part in found["parts"]}
    parallel, twin = parts["emage/346m-256"], parts["emage/ar-346m-256"]
    length = 64  # tokens of the small geometry
    assert (parallel["passes"], twin["passes"]) == (16, length) and parallel["parameters"] == twin["parameters"]
    for part in found["parts"]:
        assert 0 < part["p50_ms"] <= part["p95_ms"]
    for part in (parallel, twin):
        assert 0 < part["share_of_roofline"] < 1 and part["floor_ms"] == max(part["compute_floor_ms"], part["memory_floor_ms"])
    # Every pass of the parallel model computes all tokens, each of the twin's one.
    assert 10 < parallel["compute_floor_ms"] / twin["compute_floor_ms"] < 20


def test_the_full_size_needs_a_gpu(tmp_path):
    import torch

    if not torch.cuda.is_available():
        done = run("decoding.py", "--out", tmp_path / "found.json")
        assert done.returncode != 0 and "--small runs anywhere" in done.stderr
