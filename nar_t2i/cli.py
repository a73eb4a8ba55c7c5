"""The `nar-t2i` command. It imports what a subcommand needs only when that subcommand runs."""

from __future__ import annotations

import argparse
import atexit
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from nar_t2i import __version__
from nar_t2i.errors import INTERRUPTED, REQUEUE, UserError, note_preempted, unwritable

LIGHTNING_VERBS = {
    "fit": "train a model, or go on training it",
    "validate": "run a model's validation",
    "test": "run the test of a LightningModule of your own",
    "predict": "run the prediction of a LightningModule of your own",
}
# What each of the other subcommands runs: a module with `main(namespace)`.
MODULES = {
    "generate": "nar_t2i.generate",
    "evaluate": "nar_t2i.evaluate",
    "suite": "nar_t2i.suite",
    "doctor": "nar_t2i.training.doctor",
    "export": "nar_t2i.training.export",
    "import": "nar_t2i.amused",
    "report": "nar_t2i.evaluation.report",
    "ablate": "nar_t2i.ablate",
    "quickstart": "nar_t2i.quickstart",
}
SUITES = ("geneval", "dpg", "t2i-compbench", "hpsv2")
RECIPE_HELP = """\
usage: nar-t2i {verb} --config RECIPE [--config RECIPE …] [--KEY VALUE …]

{what} with a recipe: a YAML file, or the name of a shipped one. Later recipes lie on top of earlier ones.

  --config RECIPE, -c RECIPE  may be given several times
  --KEY VALUE, --KEY=VALUE   override a key, anywhere in the line: --trainer.max_steps=100
  --run_dir FOLDER           the run's folder (default: runs/<name of the recipe>); one that holds a checkpoint goes on
  --ckpt_path FILE|fresh     the checkpoint to go on from; fresh: none
  --init_from PATH           start from the weights of a checkpoint, a run or a model folder
  --print_config             print the resolved configuration and stop
"""
STOPPED = "nar-t2i: interrupted; the same command goes on where it can"
DOCTOR_USAGE = "nar-t2i doctor RECIPE [--nodes N] [--gpus-per-node G] [--gpu-memory-gib M] [--KEY VALUE …]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C.

    With NAR_T2I_TRACEBACK=1 in the environment, a mistake shows where it was noticed.
    """
    arguments = [_at_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        if arguments and arguments[0] in LIGHTNING_VERBS:
            return _lightning(arguments[0], arguments[1:])
        if arguments and arguments[0] == "doctor":
            namespace, rest = _parser().parse_known_args(arguments)
            configs, namespace.overrides, _ = _recipe(rest)
            namespace.recipes = [namespace.recipe, *configs]
        else:
            namespace = _parser().parse_args(arguments)
        return importlib.import_module(MODULES[namespace.command]).main(namespace) or 0
    except UserError as error:
        if os.environ.get("NAR_T2I_TRACEBACK") == "1":
            raise
        print(f"nar-t2i: error: {_message(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        told = unwritable(error)
        if told is None or os.environ.get("NAR_T2I_TRACEBACK") == "1":
            raise
        print(f"nar-t2i: error: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return INTERRUPTED


def _at_home(argument: str) -> str:
    """--out=~/x, in which a shell leaves the tilde as it is."""
    option, equals, value = argument.partition("=")
    return f"{option}={os.path.expanduser(value)}" if equals and option.startswith("--") and value.startswith("~/") else argument


def program() -> NoReturn:
    """Run the command as a process of its own."""
    if sys.argv[1:2] in (["fit"], ["ablate"]):
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # a job that is told to make room before it has begun, or between runs
            signal.signal(number, _asked_early)
    if sys.argv[1:2] == ["fit"]:
        signal.signal(signal.SIGINT, _interrupted_early)
    leave(main())


def _asked_early(*_: object) -> NoReturn:
    """Leave, to be started again: there is nothing to save."""
    note_preempted()
    os._exit(REQUEUE)


def _interrupted_early(*_: object) -> NoReturn:
    """Ctrl-C while libraries are imported, of which some take KeyboardInterrupt for an error of their own."""
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(INTERRUPTED)


def leave(status: int) -> NoReturn:
    """End the process once all that is registered to happen then has happened, without taking Python apart.

    A thread of gloo, NCCL or a loader that asks for Python's lock while that is being done aborts a process that had
    finished well: about one of some hundred ranks was seen to end with SIGABRT. A loader's workers, which heed no signal and
    may wait for a file system for ever, are ended first.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nar-t2i", description="Train, compare and use non-autoregressive text-to-image models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb, what in LIGHTNING_VERBS.items():
        commands.add_parser(verb, help=f"{what} (a recipe)")  # for --help; `main` has taken them already

    generate = commands.add_parser("generate", help="draw pictures from prompts")
    generate.add_argument("--model", metavar="FOLDER", help="a model folder (default: the small model in the package)")
    generate.add_argument(
        "--recipe", metavar="NAME", help="draw as a recipe says, such as inference/halton (default: as the model does)"
    )
    generate.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    generate.add_argument("--prompts", metavar="FILE", help="a file with one prompt a line, or JSON lines with a `prompt`")
    generate.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    _add_decoding(generate)
    generate.add_argument("--temperature", type=float, help="of the draws (default: the model's own)")
    generate.add_argument(
        "--out", default="generated", metavar="DIR", help="where pictures go (default: generated); what is there is not drawn again"
    )
    generate.add_argument("--image", metavar="FILE", help="a picture to edit: its middle square")
    generate.add_argument("--mask", metavar="FILE", help="light where --image is drawn anew (default: where it is transparent)")
    generate.add_argument("--variation", type=float, metavar="SHARE", help="draw a share of --image anew, anywhere: 0 to 1")
    generate.add_argument("--compile", action="store_true", help="with torch.compile: slower to begin with, faster after it")
    generate.add_argument("--film", choices=("strip", "gif", "none"), default="none", help="show the tokens filling")

    evaluate = commands.add_parser("evaluate", help="measure a model")
    _add_model(evaluate)
    evaluate.add_argument(
        "--metrics",
        metavar="LIST",
        help="comma-separated: scene_accuracy (default), fid, kid, precision_recall, clip_score, cmmd, scene_frechet",
    )
    evaluate.add_argument("--protocol", metavar="NAME", help="a recipe of recipes/evaluation, such as coco-30k, or a file")
    evaluate.add_argument(
        "--data", metavar="DATA", help="captions and real pictures: shards, a recipe's validation data, or 'scenes'"
    )
    evaluate.add_argument("--count", type=int, metavar="N", help="samples of --data (default: all)")
    evaluate.add_argument("--inception", metavar="FILE", help="TorchScript: images to features, for fid, kid, precision_recall")
    evaluate.add_argument("--clip", metavar="FOLDER", help="a CLIPModel of transformers, for clip_score and cmmd")
    evaluate.add_argument("--prompts", metavar="FILE", help="scene prompts as JSON lines (default: the committed ones)")
    evaluate.add_argument("--per-category", type=int, metavar="N", help="the first N prompts of each category (default: all)")
    evaluate.add_argument("--out", required=True, metavar="FILE", help="where the numbers go, as JSON")
    _add_decoding(evaluate, seed=None)
    _add_batches(evaluate)

    suite = commands.add_parser("suite", help="draw for another benchmark's programs, and read their results")
    steps = suite.add_subparsers(dest="step", required=True, metavar="STEP")
    draw = steps.add_parser("draw", help="draw a suite's prompts, in the layout that its programs read")
    draw.add_argument("name", choices=SUITES)
    _add_model(draw)
    draw.add_argument("--prompts", required=True, metavar="PATH", help="the suite's own file or folder of prompts")
    draw.add_argument("--out", required=True, metavar="FOLDER", help="where pictures go")
    draw.add_argument("--pictures", type=int, metavar="N", help="of each prompt (default: the suite's)")
    _add_decoding(draw)
    _add_batches(draw)
    ingest = steps.add_parser("ingest", help="turn a suite's results into JSON that report shows")
    ingest.add_argument("name", choices=SUITES)
    ingest.add_argument("results", metavar="PATH", help="what the suite's programs wrote")
    ingest.add_argument("--out", required=True, metavar="FILE", help="where the scores go, as JSON")

    doctor = commands.add_parser("doctor", help="what a recipe needs, and what is wrong with it", usage=DOCTOR_USAGE)
    doctor.add_argument("recipe", metavar="RECIPE")
    doctor.add_argument("--nodes", type=int, metavar="N", help="default: the recipe's")
    doctor.add_argument("--gpus-per-node", type=int, metavar="G", help="default: the recipe's")
    doctor.add_argument("--gpu-memory-gib", type=float, metavar="M", help="of each, for the largest micro-batch that fits")

    export = commands.add_parser("export", help="turn a checkpoint into a model folder")
    export.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run's folder: its newest one")
    export.add_argument("folder", metavar="FOLDER", help="the model folder to write")
    export.add_argument("--raw", action="store_true", help="the weights of the last step instead of their average")

    imports = commands.add_parser("import", help="turn aMUSEd's published weights into a model folder")
    imports.add_argument("folder", metavar="FOLDER", help="a folder as diffusers stores AmusedPipeline")
    imports.add_argument("model", metavar="MODEL", help="the model folder to write")

    report = commands.add_parser("report", help="write reports of runs, and one table of all that is named")
    report.add_argument("runs", nargs="+", metavar="PATH", help="folders of runs or of ablations, JSON files of evaluate and suite")
    report.add_argument("--out", metavar="FILE", help="the table of several (default: side-by-side.html beside the first)")

    ablate = commands.add_parser("ablate", help="train and judge a list of recipes, and compare them")
    ablate.add_argument("recipes", nargs="+", metavar="RECIPE", help="files, or names of shipped recipes")
    ablate.add_argument("--scale", metavar="NAME", help="a recipe of recipes/scale that is laid over each, such as small")
    ablate.add_argument("--out", default="runs/ablation", metavar="DIR", help="default: runs/ablation")
    ablate.add_argument("--seeds", type=int, default=1, help="trainings of each recipe (default: 1)")
    ablate.add_argument("--prompts", type=int, default=200, help="a category, seen and held out (default: 200, all)")
    ablate.add_argument("--equal", choices=("flops", "steps"), default="flops", help="what trainings share (default: flops)")
    ablate.add_argument("--task", type=int, metavar="I", help="only the I-th of the parts that can be done side by side, from 0 on")
    ablate.add_argument("--count", action="store_true", help="say how many such parts there are, and do nothing")
    ablate.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="laid over every recipe")

    quickstart = commands.add_parser("quickstart", help="captions to pictures on the embedded data set, in minutes")
    quickstart.add_argument("--out", default="runs/quickstart", metavar="DIR", help="default: runs/quickstart")
    quickstart.add_argument(
        "--shortened", action="store_true", help="some ten minutes on single objects, for continuous integration"
    )
    quickstart.add_argument("--shuffled-captions", action="store_true", help="a control: captions of other pictures")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder, a run, or a checkpoint")
    parser.add_argument("--weights", choices=("ema", "raw", "both"), help="of a run or a checkpoint (default: ema)")


def _add_decoding(parser: argparse.ArgumentParser, seed: int | None = 0) -> None:
    parser.add_argument("--steps", type=int, help="decoding steps (default: the model's own)")
    parser.add_argument("--guidance-scale", type=float, help="1 = no guidance (default: the model's own)")
    parser.add_argument("--candidates", type=int, metavar="N", help="draw N of each, keep the likeliest (default: the model's own)")
    parser.add_argument("--seed", type=int, default=seed, help="of the first picture; each takes the next (default: 0)")


def _add_batches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default: 64)")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of drawing (default: 32-true)")


def _lightning(verb: str, arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(RECIPE_HELP.format(verb=verb, what=LIGHTNING_VERBS[verb].capitalize()), end="")
        return 0
    configs, overrides, print_config = _recipe(arguments)
    if not configs:
        raise UserError(f"command line: {verb} needs --config RECIPE; see nar-t2i {verb} --help")
    command = importlib.import_module("nar_t2i.training.command")
    if signal.getsignal(signal.SIGINT) is _interrupted_early:  # all is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command.run(verb, configs, overrides, print_config)


def _recipe(arguments: list[str]) -> tuple[list[str], list[str], bool]:
    """Recipes, overrides as KEY=VALUE, and whether --print_config is among them."""
    configs: list[str] = []
    overrides: list[str] = []
    print_config = False
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--print_config":
            print_config = True
            continue
        if not argument.startswith("--") and argument != "-c":
            raise UserError(f"command line: unexpected argument {argument!r}; overrides are --KEY VALUE")
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(f"command line: {argument} needs a value")
            value = arguments.pop(0)
        if argument == "-c" or name == "config":
            configs.append(value)
        else:
            overrides.append(f"{name}={value}")
    return configs, overrides, print_config


def _message(error: UserError) -> str:
    """One line. An error of a data loader's worker arrives with the worker's traceback around its message."""
    text = str(error)
    if "Original Traceback" in text:
        text = text.rpartition("UserError: ")[2]
    return " ".join(text.split())
