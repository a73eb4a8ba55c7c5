"""What jsonargparse says about a wrong configuration, said as one line that names the file and the key.

jsonargparse reports a mistake deep in a recipe as a nest of failed alternatives. So the class in which it lies is found
first: each `class_path` node is checked by itself, the innermost first, and then the message is about one argument.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from nar_t2i import parts
from nar_t2i.errors import UserError
from nar_t2i.recipe import Recipe
from nar_t2i.training.wandb_run import WandbConfig

OURS = (__file__, parts.__file__, str(Path(__file__).with_name("command.py")))  # what builds parts
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
MOST_HINTS = 12
REQUIRED = "is required"


def explain(recipe: Recipe, error: Exception, parser: ArgumentParser) -> UserError:
    """The error to show for `error`, which `parser` raised about `recipe.config`."""
    wandb = recipe.config.get("wandb")  # null or keys, of which jsonargparse would tell as alternatives
    keys = [field.name for field in fields(WandbConfig)]
    if wandb is not None and not isinstance(wandb, dict):
        return recipe.error("wandb", f"takes keys, such as wandb.project={wandb}")
    for key in wandb or ():
        if key not in keys:
            return recipe.error(f"wandb.{key}", _unknown(key, keys))
    for prefix, node in _class_nodes("", recipe.config):
        found = _check(node)
        # What a factory is given only when it is called, a class by itself requires, too; then the error does not say so.
        if found is not None and (found[1] != REQUIRED or found[0].removeprefix("init_args.") in str(error)):
            key, reason = found
            return recipe.error(f"{prefix}.{key}", reason)
    key, reason = _read(str(error), parser, recipe.config)
    return recipe.error(key, reason) if key else UserError(f"{recipe.name}: {reason}")


def _class_nodes(prefix: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a `class_path`, with its dotted key, inner ones before those around them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _class_nodes(f"{prefix}.{name}" if prefix else str(name), item)
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        yield prefix, value


def _check(node: dict[str, Any]) -> tuple[str, str] | None:
    """The first mistake in one node, as (key, reason)."""
    for key in node:
        if key not in CLASS_KEYS:
            return key, _unknown(key, CLASS_KEYS)
    module, _, name = node["class_path"].rpartition(".")
    if not module:
        return None  # a short name, which only the surrounding type can look up
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        return "class_path", f"class {node['class_path']!r} does not exist ({error})"
    parser = ArgumentParser(exit_on_error=False)
    arguments = node.get("init_args") or {}
    if not isinstance(cls, type) or not isinstance(arguments, dict):
        return None
    try:
        parser.add_class_arguments(cls, fail_untyped=False, sub_configs=True)
        parser.parse_object(arguments)
    except Exception as error:  # whatever the class's signature makes jsonargparse raise, it is this class's mistake
        key, reason = _read(str(error), parser, arguments)
        return (f"init_args.{key}", reason) if key else ("init_args", reason)
    return None


def _read(message: str, parser: ArgumentParser, config: dict[str, Any]) -> tuple[str, str]:
    """(key, reason) of one message; the key is empty where the message names none."""
    names = [action.dest for action in parser._actions if action.dest not in ("help", "config", "print_config")]
    if match := re.match(r"Option '(.+?)' is not accepted", message):
        return match[1], _unknown(match[1], sorted({name.split(".")[0] for name in names}))
    if match := re.match(r"Group '(.+?)' does not accept option '(.+?)'", message):
        group, option = match[1], match[2]
        inside = [name[len(group) + 1 :] for name in names if name.startswith(f"{group}.")]
        return f"{group}.{option}", _unknown(option, sorted(inside))
    if match := re.match(r"the following arguments are required: ([^\s,]+)", message):
        return match[1], REQUIRED
    if match := re.match(r'Parser key "(.+?)":\s*(.*)', message, re.DOTALL):
        key, reason = match[1], _reason(match[2])
        is_class = isinstance(_at(config, key), dict) and "class_path" in _at(config, key)
        return (f"{key}.class_path" if is_class and reason.startswith("class ") else key), reason
    return "", message.strip().splitlines()[0] if message.strip() else "is not a valid configuration"


def _unknown(key: str, accepted: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, accepted, n=1)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    if accepted and len(accepted) <= MOST_HINTS:
        return f"unknown key; accepted: {', '.join(accepted)}"
    return "unknown key"


def _reason(text: str) -> str:
    """Why a value was refused, from the lines that follow `Parser key "…":`."""
    if match := re.search(r"Import path (\S+) does not correspond to a subclass of (\S+)", text):
        return f"class {match[1]!r} is not a {match[2]}"
    if match := re.search(r"Expected a dot import path string: (\S+)", text):
        if "." not in match[1] and (choices := re.search(r"Literal\[(.*?)\]", text)):
            return f"expected one of {choices[1]}, or a class_path, got {match[1]}"
        return f"class {match[1]!r} does not exist; give its full path"
    given = re.search(r"(?:Got value|Given value): (.*)", text)
    value = f", got {_short(given[1])}" if given else ""
    if match := re.search(r"Not a valid subclass of (\w+)", text):
        return f"expected a class_path of a {match[1]}{value}"
    names = re.findall(r"Expected a (.+?)(?:\. Got value.*)?$", text, re.MULTILINE)
    expected = dict.fromkeys(_type_name(name) for name in names)
    if expected:
        return f"expected {' or '.join(expected)}{value}"
    return text.strip().splitlines()[0]


def _type_name(name: str) -> str:
    name = re.sub(r"<class '(.+?)'>", r"\1", name)
    name = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", name)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name).replace("NoneType", "null")


def _short(value: str, most: int = 80) -> str:
    return value if len(value) <= most else value[: most - 1] + "…"


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError that an exception was raised from, if any."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def mistake(error: BaseException | None) -> str | None:
    """What a part's own code raised, and where, of an error that jsonargparse tells as one about types; None where it is one."""
    while error is not None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_foreign(frame.filename)]
        if frames:
            return f"{type(error).__name__}: {' '.join(str(error).split())} ({frames[-1].filename}:{frames[-1].lineno})"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _is_foreign(file: str) -> bool:
    """Whether code of this file is no part's: libraries, and what builds parts here."""
    return file.startswith((sysconfig.get_path("stdlib"), "<")) or "site-packages" in file or file in OURS
