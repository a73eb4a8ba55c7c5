"""How a run goes on: from which checkpoint, with what, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nar_t2i.cli import main
from nar_t2i.training import checkpoints
from tests.cli.running import ROOT, fit, metrics, weights


def test_fit_again_goes_on(folder, capsys):
    assert fit("--trainer.max_steps=5") == 0
    assert fit("--trainer.max_steps=10") == 0
    assert "going on from run/checkpoints/step-00000005.ckpt" in capsys.readouterr().err
    assert [int(row["step"]) for row in metrics(folder)] == list(range(10))
    checkpoint = checkpoints.read(folder / "run/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 10
    assert (folder / "run/config.1.yaml").is_file()  # the first start's
    kept = sorted(path.name for path in (folder / "run/checkpoints").glob("step-*"))
    assert kept == ["step-00000005.ckpt", "step-00000010.ckpt"]  # as many as by default


def test_rows_behind_the_checkpoint_are_written_again_and_stand_once(folder):
    assert fit("--trainer.max_steps=4", "--checkpoint.keep=0", "--checkpoint.every_steps=2") == 0
    checkpoints.remove(folder / "run/checkpoints/step-00000004.ckpt")
    assert fit("--trainer.max_steps=4") == 0
    assert [int(row["step"]) for row in metrics(folder)] == [0, 1, 2, 3]


def test_fresh_refuses_to_go_on(folder, capsys):
    assert fit() == 0
    assert fit("--ckpt_path=fresh", "--trainer.max_steps=2") == 0
    assert "going on" not in capsys.readouterr().err
    assert [int(row["step"]) for row in metrics(folder)] == [0, 1]
    assert checkpoints.read(folder / "run/checkpoints/last.ckpt")["global_step"] == 2


def cut_off(checkpoint):
    path = checkpoint / "run.pt"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(checkpoint):
    path = checkpoint / "run.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BREAKS = {
    "run.pt is missing or cut off": cut_off,
    "run.pt is not what was written": flip_a_byte,
    "rank-00000.pt is missing or cut off": lambda checkpoint: (checkpoint / "rank-00000.pt").unlink(),
    "step-00000006.ckpt has no manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
}


@pytest.mark.parametrize("said", BREAKS)
def test_a_broken_checkpoint_is_passed_over(folder, capsys, said):
    assert fit("--checkpoint.every_steps=3", "--checkpoint.keep=0") == 0
    BREAKS[said](folder / "run/checkpoints/step-00000006.ckpt")
    assert fit() == 0
    error = capsys.readouterr().err
    assert f"{said}; trying the checkpoint before" in error
    assert "going on from run/checkpoints/step-00000003" in error
    assert [int(row["step"]) for row in metrics(folder)] == list(range(6))


@pytest.mark.parametrize("said", BREAKS)
def test_a_broken_checkpoint_that_was_asked_for_is_an_error(folder, capsys, said):
    assert fit("--checkpoint.every_steps=3", "--checkpoint.keep=0") == 0
    BREAKS[said](folder / "run/checkpoints/step-00000006.ckpt")
    assert fit("--ckpt_path=run/checkpoints/step-00000006.ckpt", verb="validate") == 2
    assert said in capsys.readouterr().err


def test_where_no_checkpoint_is_whole_nothing_starts_over_unasked(folder, capsys):
    assert fit() == 0
    flip_a_byte(folder / "run/checkpoints/step-00000006.ckpt")
    assert fit() == 2
    assert "no whole checkpoint is left; ckpt_path=fresh starts over" in capsys.readouterr().err


def test_a_disk_that_fills_up_while_saving_leaves_the_checkpoint_before(folder):
    """The limit on a file's size stands in for a disk: both fail in the middle of a write."""
    assert fit("--trainer.max_steps=3") == 0
    small = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from nar_t2i.cli import main; main()"
    )
    command = [sys.executable, "-c", small, "fit", "--config", "toy.yaml", "--trainer.max_steps=6", "--checkpoint.every_steps=2"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "step-00000004.ckpt: could not be written" in result.stderr
    names = sorted(p.name for p in (folder / "run/checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000003.ckpt"]
    assert fit("--trainer.max_steps=6") == 0
    assert [int(row["step"]) for row in metrics(folder)] == list(range(6))


def test_keep_limits_the_checkpoints(folder):
    assert fit("--checkpoint.every_steps=1", "--checkpoint.keep=2") == 0
    names = sorted(p.name for p in (folder / "run/checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000005.ckpt", "step-00000006.ckpt"]


@pytest.mark.parametrize("given", [[], ["--ckpt_path=run/checkpoints/last.ckpt"]])
def test_a_checkpoints_hyperparameters_never_override_the_recipe(folder, capsys, given):
    assert fit("--model.init_args.secret=trained") == 0
    checkpoint = checkpoints.read(folder / "run/checkpoints/last.ckpt")
    assert checkpoint["hyper_parameters"]["secret"] == "trained"  # the trap is set
    capsys.readouterr()
    assert fit("--model.init_args.secret=mine", *given, verb="validate") == 0
    assert "secret=mine" in capsys.readouterr().out


def test_validate_leaves_the_runs_configuration_alone(folder):
    assert fit() == 0
    before = (folder / "run/config.yaml").read_text()
    assert fit("--model.init_args.secret=other", verb="validate") == 0
    assert (folder / "run/config.yaml").read_text() == before


def test_init_from_starts_anew_with_the_weights(folder, capsys):
    assert fit("--run_dir=first") == 0
    assert fit("--init_from=first", "--trainer.max_steps=1", "--model.init_args.optimizer.learning_rate=0") == 0
    assert "4 tensors taken over" in capsys.readouterr().err
    first, second = weights("first/checkpoints/last.ckpt"), weights("run/checkpoints/last.ckpt")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert fit("--init_from=first", "--trainer.max_steps=2") == 0  # goes on with its own weights
    assert "taken over" not in capsys.readouterr().err


def test_ctrl_c_saves_after_the_batch_and_the_same_command_goes_on(folder, capsys):
    assert fit("--model.init_args.interrupt_at=3") == 130
    error = capsys.readouterr().err
    assert "interrupted; the same command goes on from the checkpoint in run" in error
    assert checkpoints.read(folder / "run/checkpoints/last.ckpt")["global_step"] == 4
    assert fit("--model.init_args.interrupt_at=3") == 0
    assert checkpoints.read(folder / "run/checkpoints/last.ckpt")["global_step"] == 6
    assert [int(row["step"]) for row in metrics(folder)] == list(range(6))


def test_a_checkpoint_with_objects_is_not_loaded(folder, capsys):
    assert fit("--model.init_args.save_object=true", "--trainer.max_steps=2") == 0
    assert fit() == 2
    assert "holds more than tensors and plain values" in capsys.readouterr().err


def test_validate_needs_weights(capsys):
    assert fit(verb="validate") == 2
    assert "key ckpt_path: there is no checkpoint in run" in capsys.readouterr().err


def test_a_start_that_is_refused_leaves_the_run_as_it_was(folder, capsys):
    """Its configuration, by which its checkpoints are opened, and its newest checkpoint."""
    shutil.copyfile(ROOT / "tests/cluster/tiny.yaml", "tiny.yaml")
    assert fit("--trainer.max_steps=4", recipe="tiny.yaml") == 0
    run = folder / "run"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "lock"}
    for wrong, said in (
        ("model.init_args.network.init_args.width=32", "of another model"),
        ("data.init_args.global_batch_size=24", "data.init_args.global_batch_size 24: the run goes on behind 64 samples"),
        ("model.init_args.optimizer.kind=muon", "optimizer states are AdamW's of groups of"),
        ("data.init_args.train=gone", "gone"),
    ):
        assert fit(f"--{wrong}", "--trainer.max_steps=8", recipe="tiny.yaml") == 2
        error = capsys.readouterr().err
        assert said in error and "AssertionError" not in error
        assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "lock"} == before
    assert main(["export", "run", "model"]) == 0
    assert fit("--trainer.max_steps=5", "--model.init_args.guidance.scale=9", recipe="tiny.yaml") == 0
    # A checkpoint goes by the configuration that it was trained by, and one that no configuration fits is no model.
    assert main(["export", "run/checkpoints/step-00000004.ckpt", "before"]) == 0 and main(["export", "run", "after"]) == 0
    scales = [
        json.loads(Path(name, "config.json").read_text())["guidance"]["init_args"]["scale"] for name in ("model", "before", "after")
    ]
    assert scales[0] == scales[1] != scales[2] == 9
    # A finished run that is started again writes its model by the recipe, and says so.
    assert fit("--trainer.max_steps=5", "--model.init_args.guidance.scale=7", recipe="tiny.yaml") == 0
    said = [
        json.loads((run / "model/config.json").read_text())["guidance"],
        yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["guidance"],
    ]
    assert said[0]["init_args"]["scale"] == said[1]["scale"] == 7
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("width: 16", "width: 32"))
    for earlier in run.glob("config.*.yaml"):
        earlier.unlink()
    assert (
        main(["export", "run", "never"]) == 2
        and "is of another model than" in capsys.readouterr().err
        and not Path("never").exists()
    )
    BREAKS["run.pt is missing or cut off"](run / "checkpoints/step-00000005.ckpt")
    assert (
        main(["export", "run/checkpoints/step-00000005.ckpt", "never"]) == 2
        and "is not a whole checkpoint" in capsys.readouterr().err
    )


def test_export_takes_the_newest_checkpoint_that_is_whole(folder, capsys):
    shutil.copyfile(ROOT / "tests/cluster/tiny.yaml", "tiny.yaml")
    assert fit("--trainer.max_steps=6", recipe="tiny.yaml") == 0
    BREAKS["run.pt is not what was written"](folder / "run/checkpoints/step-00000006.ckpt")
    assert main(["export", "run", "model"]) == 0
    said = capsys.readouterr()
    assert "step-00000006.ckpt/run.pt is not what was written; trying the checkpoint before" in said.err and "of step 3" in said.out
    assert main(["export", "run/checkpoints/step-00000006.ckpt", "other"]) == 2
    assert "init_from" not in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "number", "status"), [
    ("fit", "SIGUSR1", 85), ("fit", "SIGUSR2", 85), ("fit", "SIGINT", 130), ("ablate", "SIGUSR1", 85)
])  # fmt: skip
def test_a_run_that_is_told_to_end_before_it_has_begun_ends_at_once(folder, verb, number, status):
    """Asks to be started again where it is to make room; a library that swallows KeyboardInterrupt does not matter."""
    line = (
        f"import os, signal, sys; sys.argv[1:] = ['{verb}', 'base.yaml']\nfrom nar_t2i import cli\n"
        f"def main():\n  try: os.kill(os.getpid(), signal.{number})\n  except KeyboardInterrupt: return 1\n"
        "cli.main = main\ncli.program()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NAR_T2I_PREEMPTED": str(folder / "preempted")}
    done = subprocess.run([sys.executable, "-c", line], env=environment, capture_output=True, text=True)
    assert done.returncode == status and ("interrupted" in done.stderr) == (status == 130)
    assert (folder / "preempted").exists() == (status == 85)  # for a sweep's script


def test_where_every_checkpoint_is_cut_off_nothing_starts_over_unasked(folder, capsys):
    assert fit("--checkpoint.every_steps=3", "--checkpoint.keep=0") == 0
    for checkpoint in (folder / "run/checkpoints").glob("step-*.ckpt"):
        BREAKS["run.pt is missing or cut off"](checkpoint)
    assert fit("--trainer.max_steps=9") == 2
    assert "no whole checkpoint is left in run; ckpt_path=fresh starts over" in capsys.readouterr().err
    assert len(list((folder / "run/checkpoints").glob("step-*.ckpt"))) == 2
