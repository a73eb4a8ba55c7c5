"""The command: what a recipe resolves to, what a run leaves behind, and how a process ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nar_t2i.cli import main
from tests.cli.running import ROOT, fit, metrics


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys\nfrom nar_t2i.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("fit", "validate", "test", "predict", "generate", "evaluate", "report", "quickstart"):
        assert re.search(rf"^\s+{command}\b", result.stdout, re.M)


LEAVING = """
import atexit, threading, time, torch
from nar_t2i.cli import leave

def work():
    x = torch.randn(200, 200)
    while True:
        x @ x

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
atexit.register(print, "registered")
time.sleep(0.3)
leave(3)
"""


def test_workers_that_heed_no_signal_are_ended_with_their_process():
    code = (
        "import multiprocessing, signal, time\nfrom nar_t2i.cli import leave\n\n"
        "def wait(begun):\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    begun.set()\n    time.sleep(100)\n\n"
        "multiprocessing.set_start_method('fork')\nbegun = multiprocessing.Event()\n"
        "multiprocessing.Process(target=wait, args=(begun,), daemon=True).start()\nbegun.wait()\nleave(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 3


@pytest.mark.parametrize("ending", ["leave(3)", "raise SystemExit(3)"])
def test_threads_that_want_pythons_lock_do_not_abort_a_process_that_leaves(ending):
    code = LEAVING.replace("leave(3)", ending)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "registered\n"
    if ending == "leave(3)":
        assert result.returncode == 3
    elif sys.version_info < (3, 14):  # from then on such threads wait instead
        assert result.returncode < 0  # the control: what Python does by itself


def test_help_of_a_verb(capsys):
    assert main(["fit", "--help"]) == 0
    assert "--ckpt_path" in capsys.readouterr().out


def test_python_m_is_the_same_command(folder):
    result = subprocess.run(
        [sys.executable, "-m", "nar_t2i", "fit", "--config", "toy.yaml", "--trainer.max_stepz", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2
    message = "command line: key trainer.max_stepz: unknown key; did you mean 'max_steps'?"
    assert result.stderr == f"nar-t2i: error: {message}\n"


def test_fit_fills_the_run_folder(folder):
    assert fit() == 0
    run = folder / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["beta1"] == 0.9  # with defaults
    assert config["trainer"]["use_distributed_sampler"] is False
    assert json.loads((run / "versions.json").read_text())["packages"]["torch"]
    assert [int(row["step"]) for row in metrics(folder)] == [0, 1, 2, 3, 4, 5]
    assert (run / "checkpoints/last.ckpt").resolve().name == "step-00000006.ckpt"


def test_printed_configuration_is_a_recipe_that_resolves_to_itself(folder, capsys):
    assert fit("--print_config", "--trainer.max_steps=3") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["trainer"]["max_steps"] == 3
    (folder / "again.yaml").write_text(printed)
    assert fit("--print_config", recipe="again.yaml") == 0
    assert capsys.readouterr().out == printed
    assert not (folder / "run").exists()


def test_overrides_may_stand_anywhere_and_sweeps_write_none(folder, capsys):
    line = [
        "fit",
        "--trainer.max_steps",
        "4",
        "--config=toy.yaml",
        "--print_config",
        "--trainer.max_time=None",
        "--model.init_args.optimizer.learning_rate=1e-3",
    ]
    assert main(line) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["trainer"]["max_steps"], config["trainer"]["max_time"]) == (4, None)
    assert config["model"]["init_args"]["optimizer"]["learning_rate"] == 1e-3


def test_run_folder_is_named_after_the_recipe_by_default(folder, capsys):
    assert fit("--print_config", recipe="base.yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out)["run_dir"] == "runs/base"


def test_lightning_does_not_advertise(folder, capfd):
    subprocess.run(
        [sys.executable, "-m", "nar_t2i", "fit", "--config", "toy.yaml"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    text = "".join(capfd.readouterr())
    assert not re.search(r"💡|litlogger|litmodels|num_workers|LeafSpec|TPU|weights_only", text)


def test_generate_evaluate_report_and_quickstart_are_dispatched(monkeypatch):
    seen = []
    stand_in = type("Module", (), {"main": staticmethod(lambda namespace: seen.append(namespace))})
    monkeypatch.setattr("nar_t2i.cli.importlib.import_module", lambda name: seen.append(name) or stand_in)
    assert main(["generate", "--prompt", "a", "--prompt", "b", "--guidance-scale=2", "--film", "gif"]) == 0
    assert main(["evaluate", "m", "--out", "o.json", "--batch-size", "8"]) == 0
    assert main(["report", "runs/a", "runs/b"]) == 0
    assert main(["quickstart", "--shortened"]) == 0
    generate, evaluate, report, quickstart = seen[1::2]
    assert seen[::2] == ["nar_t2i.generate", "nar_t2i.evaluate", "nar_t2i.evaluation.report", "nar_t2i.quickstart"]
    assert (generate.prompt, generate.steps, generate.guidance_scale, generate.film) == (["a", "b"], None, 2.0, "gif")
    assert generate.negative_prompt is None and generate.model is None and generate.seed == 0
    assert (evaluate.model, evaluate.batch_size, evaluate.weights, evaluate.seed) == ("m", 8, None, None)
    assert report.runs == ["runs/a", "runs/b"]
    assert quickstart.shortened and not quickstart.shuffled_captions and quickstart.out == "runs/quickstart"


def test_a_tilde_is_the_user_s_folder(folder, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert fit("--run_dir=~/a run", "--trainer.max_steps=2") == 0
    assert (
        (folder / "home/a run/checkpoints/last.ckpt").exists()
        and (folder / "home/a run/metrics.csv").exists()
        and not Path("~").exists()
    )
    Path("in_recipe.yaml").write_text("extends: base.yaml\nrun_dir: ~/other\n")
    assert fit("--trainer.max_steps=2", recipe="in_recipe.yaml") == 0 and (folder / "home/other/checkpoints").is_dir()
    assert main(["generate", "--prompt", "a", "--steps=1", "--out=~/pictures"]) == 0
    assert (folder / "home/pictures/sheet.png").exists() and not Path("~").exists()
