"""What every data command shares: its arguments, and errors without a traceback."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable

from nar_t2i.errors import INTERRUPTED, UserError, unwritable


def run(work: Callable[[], object]) -> int:
    """Do the work and print what it returns. Exit status: 0; 2 for bad input; 130 when interrupted.

    With NAR_T2I_TRACEBACK=1 in the environment, a mistake shows where it was noticed.
    """
    traceback = os.environ.get("NAR_T2I_TRACEBACK") == "1"
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        # Names of files need not be text.
        print(str(work()).encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        told = unwritable(error)
        if told is None or traceback:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    except UserError as error:
        if traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return int(text)

    number.__name__ = "whole number"  # as argparse calls it where it is none
    return number


def add_shards(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("shards", help="folder, file or pattern of shards")
    arguments.add_argument("--index-folder", metavar="FOLDER", help="of their indices; default: beside the shards")


def add_device(arguments: argparse.ArgumentParser) -> None:
    import torch

    def device(text: str) -> torch.device:
        try:
            return torch.zeros(1, device=text).device
        except (RuntimeError, AssertionError) as error:
            raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error

    arguments.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU, if there is one"
    )


def add_shard_range(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument(
        "--shard-range", metavar="FIRST:LAST", default="0:",
        help="only the shards from FIRST up to, not including, LAST; `array`: this task's share of them in a Slurm array "
        "(default: all). What an earlier run has finished is not done again, and the run that finishes the last shard "
        "writes the manifest",
    )  # fmt: skip


def shard_range(text: str, count: int) -> range:
    """The shards, of `count`, that this process is to do. Raises UserError where `text` says nothing of the kind."""
    if text == "array":
        try:
            task, first, last, tasks = (int(os.environ[f"SLURM_ARRAY_TASK_{x}"]) for x in ("ID", "MIN", "MAX", "COUNT"))
        except (KeyError, ValueError):
            raise UserError("--shard-range array: this is no task of a Slurm array (sbatch --array=0-9 …)") from None
        if last - first + 1 != tasks:
            raise UserError(
                f"--shard-range array: an array of {tasks} tasks from {first} to {last} has gaps, so that nobody would do "
                "their shards; submit the whole array again, which skips what is done"
            )
        return range((task - first) * count // tasks, (task - first + 1) * count // tasks)
    found = re.fullmatch(r"(\d+):(\d*)", text)
    if not found or (found[2] and int(found[2]) <= int(found[1])):
        raise UserError(f"--shard-range {text!r}: must be FIRST:LAST, such as 0:100, or array")
    return range(count)[int(found[1]) : int(found[2] or count)]
