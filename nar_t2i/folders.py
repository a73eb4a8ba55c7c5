"""One part, one folder: `config.json` (see `nar_t2i.parts`), `weights.safetensors`, and the files it names.

A part lists the arguments that name files in its class attribute `assets`; the files are copied into the folder and
their names in the configuration become relative, so that a folder can be moved. A part with a method
`save_assets(folder, dtype)` writes them itself and returns the arguments that change. Those of parts within a part lie in
folders of their own. Loading runs no code of the folder's and downloads nothing.
"""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nar_t2i.errors import UserError
from nar_t2i.files import read_json, whole_path, write_json
from nar_t2i.hashing import file_hash, text_hash
from nar_t2i.parts import build, describe, resolve

CONFIG, WEIGHTS = "config.json", "weights.safetensors"


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key, as JSON would give them back."""
    if isinstance(settings, dict):
        return {k: v for key, value in settings.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    if isinstance(settings, (list, tuple)):
        return {k: v for number, value in enumerate(settings) for k, v in flat(value, f"{prefix}{number}.").items()}
    return {prefix.removesuffix("."): settings}


def check_same(path: Path, settings: dict[str, Any]) -> None:
    """UserError where what lies beside `path` was made with other settings; says which."""
    before = flat(read_json(path)) if path.exists() else {}
    now = flat(settings)
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        raise UserError(f"{path.parent} was made with {key} {before.get(key)!r}, and now it is {now.get(key)!r} "
                        f"({len(differing)} such differences); name another folder with --out")  # fmt: skip


def save_part(part: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a part into `folder`. dtype: of the stored floating-point weights; None keeps theirs."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _with_assets(part, folder, "", dtype)
    state = {
        name: (value.to(dtype) if dtype and value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in part.state_dict().items()
    }
    try:
        with whole_path(folder / WEIGHTS) as temporary:
            save_file(state, temporary)
    except SafetensorError as error:  # a disk that is full, too
        raise UserError(f"{folder / WEIGHTS}: could not be written: {error}") from error
    write_json(folder / CONFIG, config)


def told_otherwise(folder: Path) -> None:
    """UserError where a folder is no model, but something that has one, or makes one."""
    if (folder / CONFIG).exists():
        return
    if (folder / "model" / CONFIG).exists():
        raise UserError(f"{folder}: a run's folder, whose model is {folder / 'model'}")
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder}: a run that has not ended; nar-t2i export {folder} MODEL makes a model of its newest checkpoint")
    if folder.suffix == ".ckpt":
        raise UserError(f"{folder}: a checkpoint; nar-t2i export {folder} MODEL makes a model of it")


def load_part(folder: str | Path, trusted: tuple[str, ...] = ()) -> nn.Module:
    """Read a part back, in float32 and evaluation mode. UserError where the folder is not a saved part."""
    folder = Path(folder)
    told_otherwise(folder)
    config = read_json(folder / CONFIG)
    if isinstance(config, dict) and "format" in config:
        raise UserError(f"{folder}: a whole model; name one of its parts, such as {folder / 'tokenizer'}")
    if not isinstance(config, dict) or set(config) != {"class_path", "init_args"}:
        raise UserError(f"{folder / CONFIG}: needs exactly the keys class_path and init_args")
    if not isinstance(config["class_path"], str) or not isinstance(config["init_args"], dict):
        raise UserError(f"{folder / CONFIG}: class_path must be a text and init_args a mapping")
    _find_assets(config, folder, trusted)
    try:
        part = build(config, trusted)
        part.load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        raise UserError(f"{folder / WEIGHTS}: no such file") from None
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder}: {first_difference(error)}") from error
    except (KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be built: {type(error).__name__}: {error}") from error
    return part.eval()


def first_difference(error: Exception) -> str:
    """What an error says in one line; of torch's about weights that do not fit, the first that does not."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines and lines[0].startswith("Error(s) in loading") else "".join(lines[:1])


def frozen_network(model: str | nn.Module) -> nn.Module:
    """The network of a model folder, or a network that was loaded before: to be asked, not to be trained."""
    network = load_part(Path(os.path.normpath(model), "network")) if isinstance(model, str) else model
    return network.eval().requires_grad_(False)


def _with_assets(part: Any, folder: Path, inside: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """The part's description, with its files, and those of the parts that it is made of, copied into `folder`/`inside`."""
    own_folder = folder / inside
    own_folder.mkdir(exist_ok=True)
    config = copy.deepcopy(describe(part))
    changed = part.save_assets(own_folder, dtype) if hasattr(part, "save_assets") else {}
    config["init_args"].update(changed)
    assets = getattr(part, "assets", ())
    for name in set(assets) - set(changed):
        source = Path(config["init_args"][name])
        if not (target := own_folder / source.name).exists() or not source.samefile(target):
            shutil.copyfile(source, target)
        config["init_args"][name] = source.name
    for name in assets:
        config["init_args"][name] = str(Path(inside, config["init_args"][name]))
    for name, value in part.__dict__["_described_args"].items():
        if isinstance(value, (list, tuple)) and any(_is_part(item) for item in value):
            config["init_args"][name] = [
                _with_assets(item, folder, str(Path(inside, f"{name}-{number}")), dtype) if _is_part(item) else describe(item)
                for number, item in enumerate(value)
            ]
        elif _is_part(value):
            config["init_args"][name] = _with_assets(value, folder, str(Path(inside, name)), dtype)
    return config


def _is_part(value: Any) -> bool:
    return isinstance(value, nn.Module) and "_described_args" in value.__dict__


def _find_assets(config: Any, folder: Path, trusted: tuple[str, ...]) -> None:
    """Make the paths in a saved description, and in those within it, paths from here."""
    if isinstance(config, list):
        for item in config:
            _find_assets(item, folder, trusted)
    if not isinstance(config, dict):
        return
    if set(config) == {"class_path", "init_args"} and isinstance(config["init_args"], dict):
        for name in getattr(resolve(config["class_path"], trusted), "assets", ()):
            path = folder / str(config["init_args"].get(name))
            if path.resolve() == folder.resolve() or not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{folder / CONFIG}: {name} must be a file of this folder")
            if not path.exists():
                raise UserError(f"{path}: no such file")
            for file in path.rglob("*"):
                if not file.resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{file}: leads out of this folder")
            config["init_args"][name] = str(path)
        _find_assets(list(config["init_args"].values()), folder, trusted)


def folder_hash(folder: Path) -> str:
    """sha256 of the files of a model, or of a part, by their names in its folder; of a model those of its parts and its
    configuration, since pictures may lie beside them.
    """
    parts = [folder] if (folder / WEIGHTS).is_file() else [config.parent for config in folder.glob(f"*/{CONFIG}")]
    files = sorted({folder / CONFIG, *(file for part in parts for file in part.rglob("*") if file.is_file())})
    return text_hash("\n".join(f"{file.relative_to(folder)} {file_hash(file)}" for file in files))
