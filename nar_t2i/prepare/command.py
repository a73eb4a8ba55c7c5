"""What every data command shares: its arguments, and errors without a traceback."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable

from nar_t2i.errors import UserError


def run(work: Callable[[], object]) -> int:
    """Do the work and print what it returns. Exit status: 0; 2 for bad input; 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(work())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
