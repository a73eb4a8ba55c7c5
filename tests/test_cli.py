"""The command: what a recipe resolves to, what a run leaves behind, how it goes on, and what each mistake prints."""

import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nar_t2i.cli import main
from nar_t2i.folders import save_part
from nar_t2i.networks import EncoderDecoder
from nar_t2i.training import checkpoints
from tests.tiny_pipeline import tiny_pipeline

ROOT = Path(__file__).parents[1]
RECIPE = """
seed_everything: 1
model:
  class_path: tests.cli_toys.Model
  init_args:
    network: {class_path: tests.cli_toys.Network, init_args: {width: 3}}
    optimizer: {learning_rate: 0.01, warmup_steps: 2}
data: {class_path: tests.cli_toys.Data}
trainer:
  max_steps: 6
  accelerator: cpu
  log_every_n_steps: 1
  limit_val_batches: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(RECIPE)
    (tmp_path / "toy.yaml").write_text("extends: base.yaml\nrun_dir: run\n")
    return tmp_path


def fit(*arguments, verb="fit", recipe="toy.yaml"):
    return main([verb, "--config", recipe, *arguments])


def weights(path):
    return checkpoints.read(Path(path).resolve())["state_dict"]


def metrics(folder):
    with open(folder / "run/metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]  # without validation's rows


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


def test_lightning_does_not_advertise(folder, capfd):
    subprocess.run(
        [sys.executable, "-m", "nar_t2i", "fit", "--config", "toy.yaml"],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    text = "".join(capfd.readouterr())
    assert not re.search(r"💡|litlogger|litmodels|num_workers|LeafSpec|TPU|weights_only", text)


MISTAKES = {
    "unknown key": (["--modl.x=1"], "command line: key modl.x: unknown key; did you mean 'model'?"),
    "unknown trainer key": (["--trainer.max_step=1"], "key trainer.max_step: unknown key; did you mean 'max_steps'?"),
    "unknown nested key": (
        ["--model.init_args.network.init_args.widht=1"],
        "command line: key model.init_args.network.init_args.widht: unknown key; did you mean 'width'?",
    ),
    "unknown dataclass key": (
        ["--model.init_args.optimizer.warmup=1"],
        "key model.init_args.optimizer.warmup: unknown key; did you mean 'warmup_steps'?",
    ),
    "unknown key beside a class": (["--model.init_arg.x=1"], "key model.init_arg: unknown key; did you mean 'init_args'?"),
    "wandb without a key": (["--wandb=mine"], "command line: key wandb: takes keys, such as wandb.project=mine"),
    "unknown wandb key": (["--wandb.projct=mine"], "command line: key wandb.projct: unknown key; did you mean 'project'?"),
    "another kind of recipe": (["--config=evaluation/coco-30k"], "key metrics: is a protocol's, for nar-t2i evaluate --protocol"),
    "wrong type": (["--trainer.max_steps=many"], "command line: key trainer.max_steps: expected int, got many"),
    "wrong nested type": (
        ["--model.init_args.network.init_args.width=wide"],
        "key model.init_args.network.init_args.width: expected int, got wide",
    ),
    "wrong choice": (
        ["--model.init_args.optimizer.schedule=step"],
        "key model.init_args.optimizer.schedule: expected one of 'cosine', 'constant', got step",
    ),
    "no such class": (
        ["--model.class_path=tests.cli_toys.Nothing"],
        "key model.class_path: class 'tests.cli_toys.Nothing' does not exist",
    ),
    "no such module": (["--data.class_path=nowhere.Data"], "key data.class_path: class 'nowhere.Data' does not exist"),
    "wrong class": (
        ["--model.init_args.network.class_path=tests.cli_toys.Data"],
        "key model.init_args.network.class_path: class 'tests.cli_toys.Data' is not a Module",
    ),
    "not a class": (["--model.init_args.network=3"], "key model.init_args.network: expected a class_path of a Module, got 3"),
    "missing argument": (["--model.init_args.network=null"], "key model.init_args.network: is required"),
    "missing model": (["--model=null"], "command line: key model: is required"),
    "wrong list item": (
        ["--trainer.callbacks=[{class_path: nar_t2i.training.ema.EMA, init_args: {decy: 1}}]"],
        "key trainer.callbacks.0.init_args.decy: unknown key; did you mean 'decay'?",
    ),
    "refused by a class": (
        ["--trainer.callbacks=[{class_path: nar_t2i.training.ema.EMA, init_args: {decay: 3}}]"],
        "EMA: decay must be at least 0 and below 1",
    ),
    "refused by Lightning": (["--trainer.devices=0"], "toy.yaml: cannot be built:"),
    "interpolation": (["--model.init_args.secret=${nothing}"], "command line: key model.init_args.secret: "),
    "missing recipe": (["--config=nope.yaml"], "recipe 'nope.yaml' does not exist"),
    "missing checkpoint": (["--ckpt_path=nope.ckpt"], "command line: key ckpt_path: 'nope.ckpt' does not exist"),
    "broken checkpoint": (["--ckpt_path=base.yaml"], "key ckpt_path: 'base.yaml' is not a whole checkpoint"),
    "missing weights": (["--init_from=nope"], "init_from: nope does not exist"),
    "second run folder": (["--trainer.default_root_dir=x"], "key trainer.default_root_dir: is the run's folder"),
    "second sampler": (["--trainer.use_distributed_sampler=true"], "trainer.use_distributed_sampler: must be false"),
    "checkpoint settings": (["--checkpoint.keep=-1"], "every_steps must be at least 1"),
    "at run time": (["--model.init_args.fail=true"], "shard 00000.tar: sample 3: broken"),
    "in the data": (["--data.init_args.broken=true"], "shard 00000.tar: sample 3: broken"),
    "in a worker": (["--data.init_args.broken=true", "--data.init_args.workers=1"], "error: shard 00000.tar: sample 3: broken"),
    "no value": (["--trainer.max_steps"], "command line: --trainer.max_steps needs a value"),
    "no option": (["toy.yaml"], "command line: unexpected argument 'toy.yaml'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(case, capsys):
    arguments, expected = MISTAKES[case]
    assert fit(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("nar-t2i: error: ") and expected in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_a_mistake_in_a_file_names_that_file(folder, capsys):
    (folder / "base.yaml").write_text(RECIPE.replace("width: 3", "widht: 3"))
    assert fit() == 2
    assert "error: base.yaml: key model.init_args.network.init_args.widht: unknown key" in capsys.readouterr().err


def test_names_are_told_beside_the_classes_that_may_take_their_place(capsys):
    assert fit("--model.init_args.learning.init_args.schedule=cosin", recipe="quickstart/generator") == 2
    said = (
        "key model.init_args.learning.init_args.schedule: expected one of 'cosine', 'linear', 'square', 'arccos', "
        "'exponential', or a class_path, got cosin"
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "said"), [
    ("overfit_batches=1", "overfit_batches: changes nothing here"), ("max_epochs=1", "max_epochs: is never reached"),
    ("val_check_interval=0.5", "val_check_interval: is a share of an epoch"), ("fast_dev_run=true", "fast_dev_run: would take"),
])  # fmt: skip
def test_settings_of_lightning_that_would_do_nothing_here_are_refused(capsys, setting, said):
    assert fit(f"--trainer.{setting}", recipe="quickstart/tokenizer") == 2
    assert f"key trainer.{said}" in capsys.readouterr().err


def test_a_run_that_will_not_be_validated_says_so_and_its_resolved_configuration_is_accepted(folder, capsys):
    """As slurm/train.sh makes one of a recipe that says nothing of validation: it holds what Lightning would take."""
    settings = ["--trainer.val_check_interval=null", "--trainer.check_val_every_n_epoch=1", "--print_config"]
    assert fit(*settings, recipe="quickstart/tokenizer") == 0
    printed = capsys.readouterr()
    assert "this run will not be validated" in printed.err
    recipe = yaml.safe_load(printed.out)
    for every in (None, 1):
        recipe["trainer"]["check_val_every_n_epoch"] = every
        (folder / "resolved.yaml").write_text(yaml.safe_dump(recipe))
        assert fit("--print_config", recipe="resolved.yaml") == 0
    assert fit("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--print_config", recipe="quickstart/tokenizer") == 0


OWN = """
from nar_t2i.inference import Confidence
from nar_t2i.parts import part

class Plain(Confidence):
    def __init__(self, steps: int = 2):
        super().__init__(steps)

@part
class Further(Confidence):
    def __init__(self, boost: float = 1.0, **kwargs):
        super().__init__(**kwargs)

@part
class Mistaken(Confidence):
    def __init__(self, steps: int = 2):
        super().__init__(steps)
        self.other = undefined_name
"""


@pytest.fixture
def own_package(folder, monkeypatch):
    """A package of the user's, and a generator whose recipe takes seconds; `fit` with one of its strategies."""
    (folder / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("own_parts", None)
    t2i = tiny_pipeline(folder)
    save_part(t2i.tokenizer, folder / "codec")
    small = ("text.init_args.vocabulary=tiny.model", "text.init_args.width=16", "text.init_args.depth=1", "text.init_args.heads=2",
             "text.init_args.trainable=all", "network.init_args.width=16", "network.init_args.depth=1", "network.init_args.heads=2",
             "network.init_args.code_width=0", "tokenizer=codec", "sample_prompts=[]", "optimizer.warmup_steps=1",
             "optimizer.kind=adamw")  # fmt: skip
    scenes = "{class_path: nar_t2i.data.captions.RenderedScenes, init_args: {count: 8, image_size: 16}}"
    settings = [*(f"--model.init_args.{key}" for key in small), "--init_from=null", f"--data.init_args.train={scenes}",
                "--data.init_args.validation=null", "--data.init_args.cache=null", "--data.init_args.validation_cache=null",
                "--data.init_args.image_size=16", "--data.init_args.global_batch_size=4", "--trainer.max_steps=2",
                "--run_dir=own", "--trainer.precision=32-true"]  # fmt: skip
    return lambda inference, *more: fit(*settings, f"--model.init_args.inference={inference}", *more, recipe="quickstart/generator")


def test_parts_of_ones_own_are_told_of_early_saved_and_loaded_where_they_are_trusted(own_package, folder, capsys, monkeypatch):
    assert own_package("{class_path: own_parts.Plain}") == 2 and not Path("own/checkpoints").exists()
    assert "Plain cannot be described; decorate the class with @part; without it the model" in capsys.readouterr().err
    assert own_package("{class_path: own_parts.Mistaken}") == 2
    assert f"NameError: name 'undefined_name' is not defined ({folder}/own_parts.py:18)" in capsys.readouterr().err
    assert own_package("{class_path: own_parts.Further, init_args: {boost: 2.0, steps: 3}}") == 0
    saved = json.loads(Path("own/model/config.json").read_text())["inference"]["init_args"]
    assert saved["boost"] == 2 and saved["steps"] == 3 and "kwargs" not in saved
    line = ["generate", "--model", "own/model", "--prompt", "a red star", "--steps", "2"]
    assert main(line) == 2 and "NAR_T2I_TRUST=PACKAGE in the environment" in capsys.readouterr().err
    monkeypatch.setenv("NAR_T2I_TRUST", "other,own_parts")
    assert main(line) == 0


def test_a_run_does_not_go_on_beside_other_frozen_weights(own_package, capsys, monkeypatch):
    """Which no checkpoint holds: here of a network's embedding that is frozen and starts at random."""
    made = EncoderDecoder.__init__

    @functools.wraps(made)
    def frozen(self, *arguments, **settings):
        made(self, *arguments, **settings)
        self.embedding.requires_grad_(False)

    monkeypatch.setattr(EncoderDecoder, "__init__", frozen)
    network = "--model.init_args.network={class_path: nar_t2i.networks.EncoderDecoder, init_args: {width: 16, depth: 1, heads: 2}}"
    confidence = "{class_path: nar_t2i.inference.Confidence}"
    assert own_package(confidence, network) == 0
    assert own_package(confidence, network, "--trainer.max_steps=3") == 0  # of the same seed
    capsys.readouterr()
    assert own_package(confidence, network, "--trainer.max_steps=4", "--seed_everything=7") == 2
    assert "trained beside other frozen weights than these: network.embedding." in capsys.readouterr().err
    assert own_package(confidence, network, "--run_dir=other", "--init_from=own", "--seed_everything=7") == 0
    assert "kept, frozen: network.embedding." in capsys.readouterr().err


def test_circular_extends_and_yaml_mistakes(folder, capsys):
    (folder / "base.yaml").write_text("extends: toy.yaml\n")
    assert fit() == 2
    assert "key extends: circular: toy.yaml → base.yaml → toy.yaml" in capsys.readouterr().err
    (folder / "base.yaml").write_text("a: [\n")
    assert fit() == 2
    assert re.search(r"error: base.yaml: line \d: not valid YAML", capsys.readouterr().err)


def test_a_checkpoint_with_objects_is_not_loaded(folder, capsys):
    assert fit("--model.init_args.save_object=true", "--trainer.max_steps=2") == 0
    assert fit() == 2
    assert "holds more than tensors and plain values" in capsys.readouterr().err


def test_a_verb_that_has_nothing_to_do_says_so(folder, capsys):
    shutil.copyfile(ROOT / "tests/cluster/tiny.yaml", "tiny.yaml")
    assert fit("--trainer.max_steps=1", "--data.init_args.validation=null", recipe="tiny.yaml") == 0
    assert "across ranks is zero" not in capsys.readouterr().err
    for verb, said in (
        ("validate", "key data.init_args.validation: names no validation data"),
        ("test", "has no test_step: `nar-t2i evaluate`"),
        ("predict", "has no predict_step"),
    ):
        assert fit("--data.init_args.validation=null", verb=verb, recipe="tiny.yaml") == 2
        assert said in capsys.readouterr().err


def test_validate_needs_weights(capsys):
    assert fit(verb="validate") == 2
    assert "key ckpt_path: there is no checkpoint in run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["fly"],
        ["generate", "--stepz", "3"],
        ["generate", "--steps", "many"],
        ["evaluate"],
        ["fit"],
        ["generate", "--film", "vhs"],
    ],
)
def test_wrong_commands_are_one_line_and_status_2(line, capsys):
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("nar-t2i: error: ") and error.count("\n") == 1


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


@pytest.mark.parametrize(("number", "status"), [("SIGUSR1", 85), ("SIGUSR2", 85), ("SIGINT", 130)])
def test_a_run_that_is_told_to_end_before_it_has_begun_ends_at_once(folder, number, status):
    """Asks to be started again where it is to make room; a library that swallows KeyboardInterrupt does not matter."""
    line = (
        "import os, signal, sys; sys.argv[1:] = ['fit', '--config', 'base.yaml']\nfrom nar_t2i import cli\n"
        f"def main():\n  try: os.kill(os.getpid(), signal.{number})\n  except KeyboardInterrupt: return 1\n"
        "cli.main = main\ncli.program()"
    )
    done = subprocess.run([sys.executable, "-c", line], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == status and ("interrupted" in done.stderr) == (status == 130)


@pytest.mark.parametrize("url", ["s3://bucket/{00000..00009}.tar", "gs://bucket/0.tar", "hf://x/0.tar"])
@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_what_cannot_be_streamed_is_said_before_anything_tries(folder, capsys, url, where):
    Path("s.yaml").write_text(
        "extends: quickstart/tokenizer.yaml\n"
        + (f"data: {{init_args: {{train: '{url}', validation: null}}}}\n" if where == "recipe" else "")
    )
    arguments = [] if where == "recipe" else [f"--data.init_args.train={url}", "--data.init_args.validation=null"]
    assert main(["fit", "--config", "s.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert (
        "key data.init_args.train: " in error
        and "cannot be streamed directly; name the command" in error
        and "Traceback" not in error
    )


def test_where_every_checkpoint_is_cut_off_nothing_starts_over_unasked(folder, capsys):
    assert fit("--checkpoint.every_steps=3", "--checkpoint.keep=0") == 0
    for checkpoint in (folder / "run/checkpoints").glob("step-*.ckpt"):
        BREAKS["run.pt is missing or cut off"](checkpoint)
    assert fit("--trainer.max_steps=9") == 2
    assert "no whole checkpoint is left in run; ckpt_path=fresh starts over" in capsys.readouterr().err
    assert len(list((folder / "run/checkpoints").glob("step-*.ckpt"))) == 2


@pytest.mark.parametrize(("wrong", "said"), [
    ("--trainer.accumulate_grad_batches=8", "key trainer.accumulate_grad_batches: follows from data.init_args.global_batch_size"),
    ("--trainer.gradient_clip_val=0.1", "key trainer.gradient_clip_val: is the module's: set model.init_args.optimizer.clip_norm"),
])  # fmt: skip
def test_keys_of_the_trainer_that_would_do_nothing_are_refused(folder, capsys, wrong, said):
    shutil.copyfile(ROOT / "tests/cluster/tiny.yaml", "tiny.yaml")
    assert fit(wrong, recipe="tiny.yaml") == 2 and said in capsys.readouterr().err
    assert fit(wrong, "--trainer.max_steps=1") == 0  # of somebody else's module they are Lightning's


def test_validation_comes_after_steps_whatever_an_epoch_is(folder, capsys):
    assert fit("--print_config", "--trainer.val_check_interval=4") == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["check_val_every_n_epoch"] is None
