"""The real W&B client, and its sweep agent, against a server on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nar_t2i.recipe import shipped
from tests.cluster.ranks import ROOT
from tests.cluster.wandb_server import Server

HERE = Path(__file__).parent
PICTURES = ["--model.init_args.tokenizer.init_args.image_size=48", "--data.init_args.image_size=48",
            "--data.init_args.train.init_args.image_size=48", "--data.init_args.validation.init_args.image_size=48"]  # fmt: skip
USR1 = json.dumps([{"class_path": "tests.cluster.faults.SignalAt", "init_args": {"step": 4, "rank": 0, "name": "SIGUSR1"}}])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copyfile(HERE / "tiny.yaml", tmp_path / "tiny.yaml")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where no key is
    return tmp_path


def call(folder, *line, **environment):
    python = str(Path(sys.executable).parent)  # which `wandb` and a sweep's interpreter are looked for in
    environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   **environment}  # fmt: skip
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def fit(folder, *overrides, verb="fit", **environment):
    line = [sys.executable, "-m", "nar_t2i", verb, "--config", "tiny.yaml", "--wandb.project=test", *overrides]
    return call(folder, *line, **environment)


def steps(run):
    return [row["trainer/global_step"] for row in run["history"] if "loss" in row]


def test_a_run_that_goes_on_is_one_run_that_holds_the_whole_recipe(folder):
    with Server() as server:
        first = fit(folder, f"--trainer.callbacks={USR1}", **server.environment)
        assert first.returncode == 85, first.stderr
        [(name, run)] = server.runs.items()
        assert run["preempted"] and run["exit"] == 85
        second = fit(folder, **server.environment)
        assert second.returncode == 0, second.stderr
        validated = fit(folder, verb="validate", **server.environment)
        assert validated.returncode == 0, validated.stderr
        assert list(server.runs) == [name] and run["starts"] > 2
        assert run["exit"] == 0
        assert steps(run) == list(range(12))
        assert run["config"]["model"]["init_args"]["optimizer"]["eps"] == 1e-3  # the recipe's
        assert run["config"]["model"]["init_args"]["caption_dropout"] == 0.1  # a default
        assert run["config"]["trainer"]["max_steps"] == 12
        assert (folder / "run/wandb_id").read_text().strip() == name

        anew = fit(folder, "--ckpt_path=fresh", "--trainer.max_steps=2", **server.environment)
        assert anew.returncode == 0, anew.stderr
        assert len(server.runs) == 2


@pytest.mark.parametrize(("fault", "arguments", "status"), [
    ("BadLoss", {"step": 4, "rank": 0, "factor": "nan"}, 2),
    ("KillWorkerAt", {"step": 4, "rank": 0}, 2),
    ("SignalAt", {"step": 4, "rank": 0, "name": "SIGTERM"}, 143),
])  # fmt: skip
def test_a_run_that_ends_early_did_so_there_too_and_validation_keeps_its_configuration(folder, fault, arguments, status):
    callback = json.dumps([{"class_path": f"tests.cluster.faults.{fault}", "init_args": arguments}])
    with Server() as server:
        ended = fit(folder, f"--trainer.callbacks={callback}", "--checkpoint.every_steps=2", "--data.init_args.workers=1",
                    **server.environment)  # fmt: skip
        assert ended.returncode == status, ended.stderr
        [run] = server.runs.values()
        assert run["exit"] == status and "preempted" not in run
        assert fit(folder, "--model.init_args.caption_dropout=0.7", verb="validate", **server.environment).returncode == 0
        assert run["config"]["model"]["init_args"]["caption_dropout"] == 0.1


def test_offline_starts_are_folders_of_one_run_which_sync_puts_together(folder):
    for count in (6, 12):
        ended = fit(folder, f"--trainer.max_steps={count}")
        assert ended.returncode == 0, ended.stderr
    name = (folder / "run/wandb_id").read_text().strip()
    folders = sorted((folder / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(path.name.endswith(f"-{name}") for path in folders)
    with Server() as server:
        synced = call(folder, "wandb", "sync", *map(str, folders), **server.environment)
        assert synced.returncode == 0, synced.stderr
        assert list(server.runs) == [name]
        assert steps(server.runs[name]) == list(range(12))


@pytest.mark.parametrize(("setting", "message"), [
    ({"WANDB_MODE": "sometimes"}, "WANDB_MODE: must be online, offline or disabled, not 'sometimes'"),
    ({"WANDB_MODE": "online"}, "wandb.mode: online needs an API key"),
])  # fmt: skip
def test_what_cannot_be_logged_is_said_before_the_run_starts(folder, setting, message):
    ended = fit(folder, **setting)
    assert ended.returncode == 2
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_nothing_is_logged_where_nothing_was_asked_for(folder):
    ended = call(folder, sys.executable, "-m", "nar_t2i", "fit", "--config", "tiny.yaml", "--trainer.max_steps=1")
    assert ended.returncode == 0, ended.stderr
    assert not (folder / "run/wandb").exists() and "wandb" not in ended.stderr


def sweep(name, *settings):
    """A shipped sweep, on the tiny recipe."""
    content = yaml.safe_load((shipped() / "sweeps" / f"{name}.yaml").read_text())
    assert content["command"][-1] == "${args}"
    command = [part for part in content["command"] if not part.startswith("--run_dir")]
    command[command.index("quickstart/generator")] = "tiny.yaml"
    return {**content, "command": [*command[:-1], *settings, "${args}"]}


def agent(folder, server):
    ended = call(folder, "wandb", "agent", "team/project/sweep", **server.environment)
    assert ended.returncode == 0, ended.stderr
    assert not server.trials
    return ended


def test_a_sweep_over_learning_strategies(folder):
    trials = [
        {"model.init_args.learning.init_args.schedule": "arccos", "model.init_args.learning.init_args.curriculum": 0.5,
         "model.init_args.optimizer.fused": None, "model.init_args.optimizer.learning_rate": 1e-05},
        {"model.init_args.learning.init_args.schedule": "linear", "model.init_args.learning.init_args.curriculum": 0.0,
         "model.init_args.optimizer.fused": False, "model.init_args.sample_prompts": ["a red star", "two blue squares"]},
    ]  # fmt: skip
    small = [*PICTURES, "--model.init_args.scene_prompts=1", "--trainer.max_steps=3", "--trainer.val_check_interval=3"]
    with Server(sweep("learning", *small), trials) as server:
        agent(folder, server)
        assert list(server.runs) == ["trial000", "trial001"]
        for name, run in server.runs.items():
            assert run["exit"] == 0
            assert any("validation_scene_accuracy" in row for row in run["history"])
            there = folder / "run/sweeps/sweep" / name  # no trial goes on from another
            assert (there / "wandb_id").read_text().strip() == name and (there / "model").is_dir()
            assert yaml.safe_load((there / "config.yaml").read_text())["model"] == run["config"]["model"]
        first, second = (run["config"]["model"]["init_args"] for run in server.runs.values())
        assert first["learning"]["init_args"]["schedule"] == "arccos" and first["learning"]["init_args"]["curriculum"] == 0.5
        assert first["optimizer"]["fused"] is None and first["optimizer"]["learning_rate"] == 1e-5
        assert second["learning"]["init_args"]["schedule"] == "linear" and second["learning"]["init_args"]["curriculum"] == 0
        assert second["optimizer"]["fused"] is False and second["sample_prompts"] == ["a red star", "two blue squares"]


def test_a_sweep_over_inference_strategies(folder):
    small = [*PICTURES, "--model.init_args.scene_prompts=1"]
    trained = call(folder, sys.executable, "-m", "nar_t2i", "fit", "--config", "tiny.yaml", *PICTURES)
    assert trained.returncode == 0, trained.stderr
    content = sweep("inference", *small)
    values = content["parameters"]["model.init_args.inference"]["values"]
    trials = [{"model.init_args.inference": values[0], "model.init_args.guidance.scale": 2.0},
              {"model.init_args.inference": values[1], "model.init_args.guidance.scale": 1.0}]  # fmt: skip
    with Server(content, trials) as server:
        agent(folder, server)
        assert [run["exit"] for run in server.runs.values()] == [0, 0]
        assert all(any("validation_scene_accuracy" in row for row in run["history"]) for run in server.runs.values())
        first, second = (run["config"]["model"]["init_args"] for run in server.runs.values())
        assert first["inference"]["class_path"] == "nar_t2i.inference.OneStep" and first["guidance"]["scale"] == 2
        assert second["inference"]["init_args"]["steps"] == 4 and second["guidance"]["scale"] == 1
