"""What each mistake prints: one line, and status 2."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from nar_t2i.cli import main
from tests.cli.running import RECIPE, ROOT, fit

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
        ["--model.class_path=tests.cli.toys.Nothing"],
        "key model.class_path: class 'tests.cli.toys.Nothing' does not exist",
    ),
    "no such module": (["--data.class_path=nowhere.Data"], "key data.class_path: class 'nowhere.Data' does not exist"),
    "wrong class": (
        ["--model.init_args.network.class_path=tests.cli.toys.Data"],
        "key model.init_args.network.class_path: class 'tests.cli.toys.Data' is not a Module",
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


def test_circular_extends_and_yaml_mistakes(folder, capsys):
    (folder / "base.yaml").write_text("extends: toy.yaml\n")
    assert fit() == 2
    assert "key extends: circular: toy.yaml → base.yaml → toy.yaml" in capsys.readouterr().err
    (folder / "base.yaml").write_text("a: [\n")
    assert fit() == 2
    assert re.search(r"error: base.yaml: line \d: not valid YAML", capsys.readouterr().err)


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
