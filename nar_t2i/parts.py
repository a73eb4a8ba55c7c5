"""Parts that describe themselves: a class path and the arguments it was built with, as plain JSON.

A pipeline folder, a checkpoint and a recipe name their parts in the same form, `{"class_path": …, "init_args": …}`,
which is jsonargparse's. `build` only ever imports classes of this package (and of packages that the caller trusts), so
that loading a folder from a stranger runs no code of theirs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from nar_t2i.errors import UserError

T = TypeVar("T", bound=type)
TRUST = "NAR_T2I_TRUST"  # packages whose classes may be built, with commas between them


def part(cls: T) -> T:
    """Class decorator: remember the arguments of `__init__` for `describe`. TypeError where one is given without a name (*args).
    UserError where one that has neither type nor default is None, which jsonargparse gives for what a recipe lacks."""
    original = cls.__init__
    signature = inspect.signature(original)
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
    nameless, further = kinds.get(inspect.Parameter.VAR_POSITIONAL), kinds.get(inspect.Parameter.VAR_KEYWORD)
    bare = [name for name, p in signature.parameters.items() if p.annotation is p.default is inspect.Parameter.empty]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if missing := [name for name in bare if bound.arguments[name] is None]:
            raise UserError(f"{cls.__name__}: {', '.join(missing)} must be given; where None is meant, make it the default")
        if type(self) is cls:
            if bound.arguments.get(nameless):
                raise TypeError(f"{cls.__name__}: a part's arguments need names, which those of *{nameless} have not")
            arguments = {k: v for k, v in bound.arguments.items() if k not in ("self", nameless, further)}
            arguments.update(bound.arguments.get(further, {}))
            self.__dict__["_described_args"] = arguments
        original(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


def describe(value: Any) -> Any:
    """A part as `{"class_path", "init_args"}`, recursively; plain values as themselves."""
    arguments = getattr(value, "_described_args", None)
    if arguments is not None:
        if not isinstance(value, nn.Module) and any(isinstance(argument, nn.Module) for argument in arguments.values()):
            raise TypeError(f"{type(value).__name__} holds a network, whose weights no description has; name its folder instead")
        return {"class_path": class_path(type(value)), "init_args": {k: describe(v) for k, v in arguments.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {"class_path": class_path(type(value)), "init_args": asdict(value)}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [describe(v) for v in value]
    raise TypeError(f"{type(value).__name__} cannot be described; decorate the class with @part")


def changed(part: Any, **changes: Any) -> Any:
    """A part of the same kind, made from the same arguments but for some."""
    return type(part)(**{**part._described_args, **changes})


def build(description: Any, trusted: Sequence[str] = ()) -> Any:
    """The inverse of `describe`. Without "init_args" a part is built from its defaults.

    trusted: further package names whose classes may be built. Raises UserError for any other class.
    """
    if isinstance(description, Mapping):
        if "class_path" in description and set(description) <= {"class_path", "init_args"}:
            cls = resolve(description["class_path"], trusted)
            return cls(**{k: build(v, trusted) for k, v in (description.get("init_args") or {}).items()})
        return {k: build(v, trusted) for k, v in description.items()}
    if isinstance(description, list):
        return [build(v, trusted) for v in description]
    return description


def with_defaults(description: Any) -> Any:
    """A description in which each part tells those arguments, too, whose defaults are plain values, so that `build` takes it.

    jsonargparse would otherwise give a part that stands where another one is the default all arguments of that other one
    that it knows by name, and so another default than its own.
    """
    if isinstance(description, list):
        return [with_defaults(value) for value in description]
    if not isinstance(description, dict):
        return description
    told = {key: with_defaults(value) for key, value in description.items()}
    if "class_path" not in told:
        return told
    return {**told, "init_args": {**_plain_defaults(told["class_path"]), **(told.get("init_args") or {})}}


def _plain_defaults(path: Any) -> dict[str, Any]:
    """Of a part's arguments; none for what is no part, or a mistake, of which whoever builds it tells."""
    module, _, name = str(path).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return {}
    if not (hasattr(cls.__init__, "__wrapped__") or is_dataclass(cls)):
        return {}
    defaults = {key: parameter.default for key, parameter in inspect.signature(cls.__init__).parameters.items()}
    return {key: value for key, value in defaults.items() if isinstance(value, (bool, int, float, str, type(None)))}


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve(path: str, trusted: Sequence[str] = ()) -> type:
    """The class that a path names, if it and its package are trusted: named here, or in the environment (TRUST)."""
    packages = ("nar_t2i", *trusted, *filter(None, map(str.strip, os.environ.get(TRUST, "").split(","))))
    if not isinstance(path, str) or path.split(".", 1)[0] not in packages:
        raise UserError(
            f"class {path!r} is not part of nar_t2i; {TRUST}=PACKAGE in the environment lets classes of yours be loaded"
        )
    module, _, name = path.rpartition(".")
    try:
        if "__main__" in path.split("."):
            raise ImportError("a module that is a command, which importing would run")
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        if path.split(".", 1)[0] == "nar_t2i":
            raise UserError(f"class {path!r} does not exist in this version of nar_t2i") from error
        raise UserError(f"class {path!r} cannot be loaded: {error}") from error
    # A module of ours may have imported a foreign class.
    foreign = getattr(cls, "__module__", "").split(".", 1)[0] not in packages
    if foreign or not (isinstance(cls, type) and (hasattr(cls.__init__, "__wrapped__") or is_dataclass(cls))):
        raise UserError(f"{path!r} is not a part that can be built")
    return cls
