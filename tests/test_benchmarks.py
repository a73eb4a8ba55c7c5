"""Benchmarks run in small, and report what they are for."""

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nar_t2i.errors import UserError
from nar_t2i.generate import shipped_model
from nar_t2i.inference import Particles
from nar_t2i.networks import PrefixDecoder
from nar_t2i.pipeline import TextToImage
from nar_t2i.schedules import Guidance

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_decoding_of_emage_and_its_twin(tmp_path):
    done = run("decoding.py", "--small", "--batch", 2, "--repeats", 2, "--twin-repeats", 1, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["commit"] and found["versions"]["torch"] and found["left_out"] == []
    rows = {row["system"]: row for row in found["rows"]}
    parallel, twin = rows["emage/346m-256"], rows["emage/ar-346m-256"]
    length = 64  # tokens of the small geometry
    assert (parallel["passes"], twin["passes"]) == (16, length) and parallel["parameters"] == twin["parameters"]
    for row in found["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
    for row in (parallel, twin):
        assert row["matrix_tflops"] > 1e-4 and row["copy_gb_s"] > 0.01
        assert 0 < row["share_of_roofline"] < 1 and row["floor_ms"] == max(row["compute_floor_ms"], row["memory_floor_ms"])
    # Every pass of the parallel model computes all tokens, each of the twin's one.
    assert 10 < parallel["compute_floor_ms"] / twin["compute_floor_ms"] < 20


def test_operations_of_a_long_sequence_follow_from_short_ones():
    from benchmarks import decoding

    bench = decoding.Bench(decoding.Given(100, 1000), small=True, compile=False, dtype=torch.bfloat16)
    model = decoding.recipe.load(decoding.TWIN).config["model"]["init_args"]
    for length in (8, 20, 33):
        bench.spec = decoding.TokenSpec((1, length), "categorical", bench.spec.size)
        assert bench.operations(model, causal=True) == bench.counted(model, bench.spec)


def test_floors_of_a_machine_that_is_not_at_hand():
    done = run("decoding.py", "--floors", 100, 1000, "--batch", 1)
    assert done.returncode == 0, done.stderr
    parallel, twin, ratio = done.stdout.splitlines()
    # 16 passes of some 240M parameters over 1,024 tokens and two rows, and 1,024 passes over those that are read in each.
    assert 130 < float(re.search(r" floor_ms ([\d.]+)", parallel)[1]) < 180 and "passes" not in ratio
    assert 400 < float(re.search(r" floor_ms ([\d.]+)", twin)[1]) < 480


def test_peers_side_by_side(tmp_path):
    settings = ["--small", "--geometry", "tiny", "--batch", 1, "--repeats", 2, "--twin-repeats", 1]
    done = run("peers.py", *settings, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) >= {"command", "machine", "versions", "commit", "rows"} and found["versions"]["diffusers"]
    rows = {(row["system"], row["dtype"]): row for row in found["rows"]}
    theirs, ours, llama = "diffusers' aMUSEd", "our U-ViT, the same weights", "Hugging Face generate, Llama"
    assert set(rows) == {(s, d) for s in (theirs, ours, llama, "emage/346m-256", "emage/ar-346m-256") for d in ("fp32", "bf16")}
    for row in found["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["cold_ms"] > 0 and 0 < row["share_of_roofline"] < 1
    for dtype, most in (("fp32", 1e-4), ("bf16", 0.03)):
        mine, peer = rows[ours, dtype], rows[theirs, dtype]
        assert mine["passes"] == peer["passes"] == 12 and mine["floor_ms"] == peer["floor_ms"]
        assert mine["times_diffusers"] == peer["p50_ms"] / mine["p50_ms"] and 0 < mine["logits_differ"] < most
    assert rows[ours, "fp32"]["equal_tokens"] == 1
    # As large as each other, to 2%, and a pass a token.
    twin = rows["emage/ar-346m-256", "fp32"]
    assert (
        abs(rows[llama, "fp32"]["parameters"] / twin["parameters"] - 1) < 0.02 and rows[llama, "fp32"]["passes"] == twin["passes"]
    )


def test_a_chain_of_matrices(tmp_path):
    done = run("matvec.py", "--small", "--repeats", 3, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["matrices"] == 13 and 0 < row["differ"] < 0.02 and 0 < row["share_of_bandwidth"] < 1
    from benchmarks import matvec
    from benchmarks.timing import Budget, Roofline, Run

    chain = matvec.Chain(16, 1)
    x = torch.randn(matvec.ROWS, 16)
    other = Run(Roofline(torch.device("cpu")), Budget(1), str(tmp_path / "other.json"))
    other.add("other", lambda: matvec.rows(other, chain, {}, lambda: chain(x), 1.1 * chain(x).double(), 2))
    assert other.rows == [] and "differs by 0.09" in other.failed[0]


def test_peers_that_differ_are_not_reported(tmp_path):
    """What differs is told, the run ends with an error, and no row is written, where a weight of one side differs, or a setting
    of its decoder; others have their turn."""
    from benchmarks import peers
    from benchmarks.amused import Amused
    from benchmarks.timing import Budget, Roofline

    device = torch.device("cpu")
    amused = Amused("tiny", device)
    run = peers.Run(Roofline(device), Budget(1), str(tmp_path / "found.json"))

    def measure():
        run.add("tiny", lambda: peers.rows([peers.Pair(run, amused, "tiny", 1, "fp32")], 1))

    right = amused.inference.choice_temperature
    amused.inference.choice_temperature = 0.5 * right
    measure()
    assert "of the tokens differ" in run.failed[0]
    amused.inference.choice_temperature = right
    weight = amused.network.layers[0].mlp.out.weight
    kept = weight.clone()
    weight.mul_(1.01)
    measure()
    found = json.loads((tmp_path / "found.json").read_text())
    assert "the logits differ" in run.failed[1] and found["rows"] == [] and found["failed"] == run.failed
    weight.copy_(kept)
    measure()
    assert len(run.rows) == 2 and len(run.failed) == 2 and run.finish() == 1
    run.budget.end = 0
    measure()
    assert len(run.rows) == 2 and json.loads((tmp_path / "found.json").read_text())["left_out"] == ["tiny"]


@pytest.mark.parametrize("broken", ["choice", "attention", "MLP", None])
def test_in_bf16_nothing_is_timed_of_peers_that_differ(tmp_path, broken):
    """Where the tokens of 12 passes go apart by rounding, fp32 says whether the two are the same function."""
    from benchmarks import peers
    from benchmarks.amused import Amused
    from benchmarks.timing import Budget, Roofline

    amused = Amused("tiny", torch.device("cpu"))
    run = peers.Run(Roofline(torch.device("cpu")), Budget(2), str(tmp_path / "found.json"))
    layer = amused.network.layers[1]
    if broken == "choice":
        amused.inference.choice_temperature = 0.0
    elif broken == "attention":
        layer.cross_attention.out.weight.zero_()
    elif broken == "MLP":
        layer.mlp.out.weight.mul_(1.5)
    pair = peers.Pair(run, amused, "tiny", 1, "bf16")
    if broken in ("attention", "MLP"):
        with pytest.raises(UserError, match="the logits differ"):
            pair.logits()
    else:
        assert 0 < pair.logits()["logits_differ"] < peers.LOGITS["bf16"] / 2
    peers.add_amused(run, amused, "tiny", [1], ["bf16"], 2, False)
    assert len(run.rows) == (0 if broken else 2) and len(run.failed) == bool(broken)
    assert not broken or "whether both agree: " in run.failed[0]


def test_calls_are_made_in_turns_and_what_goes_before_them_is_not_timed(monkeypatch):
    from benchmarks.timing import Clock

    told = []
    monkeypatch.setattr(Clock, "once", lambda self, run: [told.append("begins"), run(), told.append("ends")])
    runs = {name: lambda name=name: told.append(name) for name in "ab"}
    warm = Clock(torch.device("cpu")).warm(runs, 3, before=lambda name: told.append(f"before {name}"))
    assert told == ["before a", "begins", "a", "ends", "before b", "begins", "b", "ends"] * 3
    assert [len(calls) for calls in warm.values()] == [3, 3]


def test_on_a_cpu_the_precisions_of_peers_take_turns(tmp_path, monkeypatch):
    from benchmarks import peers
    from benchmarks.amused import Amused
    from benchmarks.timing import Budget, Roofline

    amused, called = Amused("tiny", torch.device("cpu")), []
    for side in ("theirs", "ours"):
        run = getattr(amused, side)
        monkeypatch.setattr(amused, side, lambda *a, run=run, side=side: called.append((side, amused.dtype)) or run(*a))
    run = peers.Run(Roofline(torch.device("cpu")), Budget(2), str(tmp_path / "found.json"))
    peers.add_amused(run, amused, "tiny", [1], ["bf16", "fp32"], 2, False)
    assert not run.failed and [row["dtype"] for row in run.rows] == ["bf16", "bf16", "fp32", "fp32"]
    a_round = [(side, dtype) for dtype in (torch.bfloat16, torch.float32) for side in ("theirs", "ours")]
    assert called[-8:] == a_round * 2
    for row, other in zip(run.rows[:2], run.rows[2:], strict=True):
        assert row["times_fp32"] == other["p50_ms"] / row["p50_ms"]


def test_on_a_cpu_the_precisions_of_the_parallel_network_take_turns(tmp_path, monkeypatch):
    from benchmarks import decoding, peers
    from benchmarks.timing import DTYPES, Budget, Roofline

    called = []
    plain = decoding.Decoder.plain
    monkeypatch.setattr(decoding.Decoder, "plain", lambda self: called.append(next(self.network.parameters()).dtype) or plain(self))
    run = peers.Run(Roofline(torch.device("cpu")), Budget(2), str(tmp_path / "found.json"))
    benches = [decoding.Bench(run.roofline, True, False, dtype) for dtype in DTYPES.values()]
    run.add("both", lambda: peers.in_turns(benches, 1, 3))
    assert not run.failed and called == [torch.float32, torch.bfloat16] * 3
    in_fp32, in_bf16 = run.rows
    assert in_bf16["times_fp32"] == in_fp32["p50_ms"] / in_bf16["p50_ms"] and in_bf16["passes"] == 16


def test_medians_ranks_and_memory_that_is_held():
    from benchmarks.timing import Call, summary

    def of(count, peak=None, **more):
        return summary(Call(9.0, 1.0, peak), [Call(float(n), 1.0, peak) for n in range(1, count + 1)], **more)

    assert [of(n)["p50_ms"] for n in (1, 2, 6, 20, 100)] == [1, 1.5, 3.5, 10.5, 50.5]
    assert [of(n)["p95_ms"] for n in (1, 2, 6, 20, 100)] == [1, 2, 6, 19, 95]
    assert of(3)["cpu_p50_ms"] == 1 and "peak_mib" not in of(3)
    assert of(3, 700.0, others_mib=100.0)["peak_mib"] == 600
    assert of(3, 700.0, held_mib=3500.0)["peak_mib"] == 3500  # a replayed graph's own memory is no new one


def test_what_was_measured_before_a_failure_or_the_end_of_the_time_is_kept(tmp_path):
    from benchmarks import timing

    run = timing.Run(timing.Roofline(torch.device("cpu")), timing.Budget(1), str(tmp_path / "found.json"))

    def rows():
        yield {"system": "a", "p50_ms": 1.0}
        assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 1  # before the next one is measured
        yield {"system": "b", "p50_ms": 2.0} if run.budget.allows("b", 3600) else {"system": "c"}
        raise torch.OutOfMemoryError("too little\nmemory")

    run.add("one", rows)
    run.add("another", lambda: [{"system": "d"}])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["system"] for row in found["rows"]] == ["a", "c", "d"] and found["left_out"] == ["b"]
    assert found["failed"] == ["one: too little memory"] and run.finish() == 1


def test_the_gpu_script_ends_within_ten_minutes():
    """Its limits on the time, and each part begins nothing more before its own is reached."""
    text = (ROOT / "benchmarks/gpu.sh").read_text()
    kill = int(re.search(r"--kill-after=(\d+)", text)[1])
    limits = re.findall(r"^measure (\d+) ", text, re.M)
    parts = re.findall(r"^measure (\d+) .*--minutes ([\d.]+)", text, re.M)
    assert len(limits) == 8 and len(parts) == 7  # step_time.py has but one part
    assert sum(int(limit) + kill for limit in limits) < 600
    assert all(60 * float(minutes) < int(limit) - 20 for limit, minutes in parts)


@pytest.mark.parametrize("script", ["decoding.py", "peers.py", "matvec.py"])
def test_the_full_size_needs_a_gpu(script, tmp_path):
    if not torch.cuda.is_available():
        done = run(script, "--out", tmp_path / "found.json")
        assert done.returncode == 2 and done.stderr == f"{script}: error: the full size needs a CUDA GPU; --small runs anywhere\n"


def test_what_a_network_of_prefixes_knows(tmp_path):
    shipped = TextToImage.from_pretrained(shipped_model())
    torch.manual_seed(0)
    network = PrefixDecoder(shipped.tokenizer.spec, shipped.text.widths, width=16, depth=1, heads=2, grid_convolution=True).eval()
    TextToImage(shipped.tokenizer, shipped.text, shipped.null, network, Particles(2), Guidance(1.5)).save_pretrained(
        tmp_path / "model"
    )
    done = run("prefix_stages.py", tmp_path / "model", "--scenes", 4, "--prompts", 1, "--drawings", 2, "--change", "candidates=2")
    assert done.returncode == 0, done.stderr
    nats = re.findall(r"stage of (\d+): ([\d.]+) nats apart(?:, ([\d.]+) together)?", done.stdout)
    assert [int(size) for size, *_ in nats] == [1, 3, 4, 8, 16, 32] and nats[-1][2] == ""
    code = math.log(shipped.tokenizer.spec.size)  # each of these, before training
    assert float(nats[-1][1]) == pytest.approx(31 * code, rel=1e-3) and float(nats[2][2]) == pytest.approx(3 * code, rel=1e-2)
    assert re.search(r"right: [\d.]+ of 6; .*\nof 2 drawings of 3 prompts: each right in ", done.stdout)
    refused = run("prefix_stages.py", shipped_model())
    assert refused.returncode == 2 and refused.stderr.endswith(f"error: {shipped_model()}: TwoWayDecoder has no order in stages\n")


def test_the_distance_of_spoilt_scenes(tmp_path):
    done = run("scene_frechet.py", "--count", 60, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert " python benchmarks/scene_frechet.py --count 60 --out " in found["command"] and found["count"] == 60
    distances = {row["pictures"]: row["scene_frechet"] for row in found["rows"]}
    assert dict(re.findall(r"\| (.+) \| ([\d.]+) \|", done.stdout)) == {name: f"{d:.3g}" for name, d in distances.items()}
    assert len(distances) == 15
    assert distances["other real scenes"] < distances["noise of 15 levels"] < distances["noise of 30 levels"]


SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_help(name, monkeypatch, capsys):
    script = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name}.py [-h]") and script.__doc__.strip() in shown


def test_the_model_in_the_package_is_not_overwritten_with_itself(monkeypatch, tmp_path):
    from benchmarks import ship_model

    monkeypatch.setattr(ship_model, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="is where it would be written"):
        ship_model.ship(str(tmp_path))
    done = run("ship_model.py")
    assert done.returncode == 2 and "FOLDER --sheet is required" in done.stderr


def test_a_command_is_written_down_as_a_shell_reads_it(monkeypatch):
    from benchmarks import results

    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/few_passes.py"), "--only", "twin, 64 passes", "--sets", "seen"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert results.command() == "OMP_NUM_THREADS=3 python benchmarks/few_passes.py --only 'twin, 64 passes' --sets seen"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert results.command() == "python benchmarks/few_passes.py --only 'twin, 64 passes' --sets seen"


def test_rows_are_printed_as_the_page_shows_numbers():
    from benchmarks import timing

    assert timing.line({"side": "shards", "rate": 12345.6, "share": 0.123456, "calls": 2048}) == (
        "side shards, rate 12,346, share 0.1235, calls 2048"
    )
