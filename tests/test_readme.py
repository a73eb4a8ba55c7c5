"""The README is executed: its commands in their order in a copy of the checkout, its Python, its files.

`make test` is left out, `make quickstart` runs at the scale "tiny", and `nar-t2i fit` takes two steps. What the README
assumes of the reader (images with captions, a file of prompts) is made here, small.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nar_t2i.evaluation.scene_prompts import CATEGORIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
# Lines that stand for something else here. The Makefile has tests of its own.
INSTEAD = {"make test": ":", "make quickstart": "nar-t2i quickstart", "source .venv/bin/activate": ":"}
SHORTENED = "--trainer.max_steps 2 --trainer.log_every_n_steps 1 --model.init_args.optimizer.warmup_steps 1"
COMMAND = f"""#!/bin/sh
if [ "$1" = fit ]; then set -- "$@" {SHORTENED}; fi
exec "{sys.executable}" -W ignore -m nar_t2i "$@"
"""


def blocks(*languages: str) -> list[tuple[str, str]]:
    return [(language, text) for language, text in BLOCK.findall(README) if language in languages]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands use, with the reader's own files in `my/`."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("nar_t2i", "recipes", "data_prep"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, text in (("nar-t2i", COMMAND), ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (folder / "my/images").mkdir(parents=True)
    colors = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 220)}
    for number in range(24):
        name, color = list(colors.items())[number % 3]
        pixels = np.full((70 + number, 80, 3), 230, np.uint8)
        pixels[20:50, 20:50] = color
        Image.fromarray(pixels).save(folder / f"my/images/{number:02d}.png")
        (folder / f"my/images/{number:02d}.txt").write_text(f"a {name} square\nphoto {number} of something {name}\n")
    ((_, prompts),) = blocks("json")
    (folder / "my/prompts.jsonl").write_text(prompts)
    for _, text in blocks("yaml"):
        name = re.match(r"# (\S+\.yaml)\n", text).group(1)
        (folder / name).write_text(text)
    return folder


def execute(checkout: Path, script: str, *command: str) -> str:
    environment = {
        **os.environ, "PATH": f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(checkout),
        "NAR_T2I_QUICKSTART_SCALE": "tiny",
    }  # fmt: skip
    done = subprocess.run([*command, script], cwd=checkout, env=environment, capture_output=True, text=True, timeout=400)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{script}\n{output[-3000:]}"
    assert "Traceback" not in output
    return output


@pytest.mark.slow
def test_the_commands_run_in_their_order(checkout: Path) -> None:
    ran = []
    for language, text in blocks("bash", "python"):
        if language == "python":
            execute(checkout, text, sys.executable, "-W", "ignore", "-c")
            continue
        lines = [INSTEAD.get(line, line) for line in text.splitlines()]
        execute(checkout, "\n".join(lines), "bash", "-euo", "pipefail", "-c")
        ran += lines
    assert len(ran) > 8
    # What the text promises.
    metrics = json.loads((checkout / "runs/quickstart/metrics.json").read_text())
    assert 0 < metrics["tokenizer"]["codebook_use"] <= 1 and metrics["generator"]["decoder_passes"] == 16
    for path in ("report.html", "generator/model/config.json", "generator/config.yaml", "tokenizer/metrics.csv"):
        assert (checkout / "runs/quickstart" / path).is_file(), path
    assert (checkout / "runs/linear/report.html").is_file()
    for name in ("0000-two-red-stars-above-a-blue-square", "0001-three-green-circles"):
        assert (checkout / f"generated/{name}.png").is_file() and (checkout / f"generated/{name}.film.png").is_file()
    assert (checkout / "generated/mine/0003-a-pink-square.png").is_file()
    assert (checkout / "star.png").is_file()
    scores = json.loads((checkout / "runs/my-scores.json").read_text())
    assert scores["results"]["model"]["scene_accuracy"]["prompts"]["count"] == {"single_object": 1}
    assert (checkout / "runs/my-generator/model/config.json").is_file()


def test_the_two_commands_come_first() -> None:
    assert blocks("bash")[0][1] == "make quickstart\nmake test\n"


def test_own_data_takes_three_commands_the_same_as_in_its_guide() -> None:
    (own,) = (text for _, text in blocks("bash") if "from_folder" in text)
    assert len(re.findall(r"^(?:python|nar-t2i) ", own, re.M)) == 3
    assert own in (ROOT / "docs/own-data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_and_named_files_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    folder = (ROOT / name).parent
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (folder / link).exists()]
    code = re.findall(r"`((?:nar_t2i|recipes|data_prep|tests|docs)/[\w./-]+\.(?:py|yaml|md))`", text)
    missing += [path for path in code if not (ROOT / path).exists()]
    assert missing == []


def test_the_table_names_every_strategy() -> None:
    """Each public class of the four folders of choices has its file in the README."""
    for folder in ("tokenizers", "text", "networks", "learning", "inference"):
        init = (ROOT / "nar_t2i" / folder / "__init__.py").read_text()
        modules = set(re.findall(rf"from nar_t2i\.{folder}\.(\w+) import", init)) - {"null", "quantizers"}
        for module in modules:
            assert f"`nar_t2i/{folder}/{module}.py`" in README, f"{folder}/{module}.py is missing in the table"


def results(name: str) -> dict:
    return json.loads((ROOT / "docs/results" / name).read_text(encoding="utf-8"))


def rows_of(name: str, **keys: object) -> list[dict]:
    return [row for row in results(f"bench/{name}.json")["rows"] if all(row.get(key) == value for key, value in keys.items())]


def rounded(value: float, digits: int) -> str:
    """Halves up."""
    return f"{math.floor(value * 10**digits + 0.5 + 1e-9) / 10**digits:,.{digits}f}"


@pytest.mark.parametrize("metrics", ["docs/results/quickstart/metrics.json", "docs/results/shipped/metrics.json"])
def test_the_tables_of_scores_are_those_of_the_results(metrics: str) -> None:
    accuracy = json.loads((ROOT / metrics).read_text())["generator"]["scene_accuracy"]
    for which in ("seen", "held_out", "shuffled"):
        values = [rounded(accuracy[which][category], 2) for category in (*CATEGORIES, "overall")]
        assert f"| {which.replace('_', ' ')} | {' | '.join(values)} |" in README


def test_the_tables_of_times_are_those_of_the_results() -> None:
    def ms(system: str, batch: int, launched: str, name: str = "peers-size", dtype: str = "bf16") -> str:
        (row,) = rows_of(name, system=system, batch=batch, launched=launched, dtype=dtype)
        return f"{rounded(row['p50_ms'], 0)} ms"

    parallel, graph = "emage/346m-256", "as a graph"
    for name, system in (
        ("with the text encoder", f"{parallel}, from the text"),
        ("with the text encoder and the image decoder", f"{parallel}, from the text to the image"),
    ):
        assert f"| {name} | {ms(system, 1, graph)} | {ms(system, 16, graph)} | |" in README
    shares = [rounded(100 * rows_of("peers-size", system=parallel, batch=batch, launched=graph)[0]["share_of_roofline"], 0)
              for batch in (1, 16)]  # fmt: skip
    times = " | ".join(ms(parallel, batch, graph) for batch in (1, 16))
    assert f"| 16 passes, as a CUDA graph | {times} | {shares[0]}%; {shares[1]}% at 16 images |" in README
    assert f"as a CUDA graph | {ms('emage/ar-346m-256', 1, graph)} | not measured |" in README
    assert f"compiled | {ms('Hugging Face generate, Llama', 1, 'compiled')} | not measured |" in README
    theirs, ours = (rows_of("peers-256", launched="plainly", dtype="bf16")[number]["system"] for number in (0, 1))
    for batch in (1, 8):
        both = [
            rows_of("peers-256", system=ours, batch=batch, launched=way, dtype="bf16")[0] for way in (graph, f"compiled, {graph}")
        ]
        times = [rounded(row["times_diffusers"], 0 if batch == 1 else 1) for row in both]
        assert (
            f"| {batch} | {ms(theirs, batch, 'plainly', 'peers-256')} | {rounded(both[0]['p50_ms'], 0)} ms as a CUDA graph, "
            f"{rounded(both[1]['p50_ms'], 0)} ms also compiled | {times[0]}, {times[1]} |"
        ) in README
    (row,) = rows_of("peers-256", system=ours, batch=64, launched="plainly", dtype="bf16")
    assert f"| {rounded(row['p50_ms'], 0)} ms, launched plainly | {rounded(row['times_diffusers'], 1)} |" in README


@pytest.mark.parametrize(("name", "batch", "label"), [
    ("peers-cpu", 1, "AMD EPYC, narrow network"), ("peers-cpu", 8, ""),
    ("peers-cpu-amx", 1, "Intel Xeon with matrix instructions, narrow network"), ("peers-cpu-amx", 8, ""),
    ("peers-cpu-wide", 1, "the same, two layers as wide as aMUSEd's"),
])  # fmt: skip
def test_the_table_of_a_cpu_is_that_of_the_results(name: str, batch: int, label: str) -> None:
    ours = {row["dtype"]: row for row in rows_of(name, batch=batch) if "times_diffusers" in row}
    values = [ours["fp32"]["times_diffusers"], ours["bf16"]["times_diffusers"], ours["bf16"]["times_fp32"]]
    assert f"| {label} | {batch} | {' | '.join(rounded(value, 1) for value in values)} |".replace("|  |", "| |") in README


def test_what_it_says_of_training_and_of_few_passes_are_the_results() -> None:
    rows = {row["row"]: row for row in results("bench/training.json")["rows"]}
    largest = rows["everything, largest micro-batch"]
    assert (
        f"at {rounded(largest['images_per_second'], 0)} images a second at the largest micro-batch, {largest['micro_batch']}"
        in README
    )
    assert f"That is {rounded(100 * largest['utilisation'], 1)}% of what" in README
    few = {row["entry"]: row for row in results("few-passes/few-passes.json")["rows"]}
    shipped = few["shipped, 6 passes, of 32"]
    assert f"is right on {rounded(shipped['seen'], 2)} of the seen prompts and {rounded(shipped['held_out'], 2)} of the" in README
    half, masked = few["prefixes, 6 passes"], few["long, 6 passes, one"]
    apart, behind = rounded(half["deficit"], 3), rounded(masked["deficit"], 3)
    said = f"these two are {apart} apart, and masked training, decoded in six passes, is {behind} behind"
    assert said in README


def test_the_distances_of_spoilt_scenes_are_those_of_the_results() -> None:
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    distances = {row["pictures"]: row["scene_frechet"] for row in results("scene-frechet.json")["rows"]}
    blurred, noise = ([f"{value:.3g}" for name, value in distances.items() if name.startswith(kind)] for kind in ("blur", "noise"))
    assert f"| blurred by a Gaussian of 0.5, 1, 2 px | {', '.join(blurred)} |" in text
    assert f"| noise of 5, 15, 30 levels | {noise[0]}, {noise[1]}.0, {noise[2]} |" in text
    for name in ("other real scenes", "colour channels exchanged"):
        assert f"| {name} | {distances[name]:.3g} |" in text
