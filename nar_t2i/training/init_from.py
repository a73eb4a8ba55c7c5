"""`init_from`: start from the weights of a checkpoint, a run or a pipeline folder, as far as they fit.

Distinct from resuming: the optimizer, the step count and the data order all start anew, and averaged weights are
preferred to the ones training stood at.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.folders import WEIGHTS
from nar_t2i.training import checkpoints
from nar_t2i.training.ema import averages_of

MOST_NAMES = 5
VOCABULARY = "model.init_args.text"  # of what is read


@dataclass
class LoadReport:
    """What `load_weights` did, by the names of the module's own state; `str` is the summary for a person.

    loaded: taken over as they were. resized: position embeddings fitted to another length or grid.
    missing: the module has them, the source does not. unexpected: the other way round. kept: the module's own, from its tokenizer,
    which is another than the source's. frozen: the module's own, which are not trained and which the source does not have.
    wrong_shape: name → (the source's shape, the module's). reads: see GeneratorModule.reads, trained_beside: see
    TrainedModule.note_frozen, where the source says them.
    """

    source: str
    averaged: bool = False
    reads: Mapping[str, str] = field(default_factory=dict)
    trained_beside: Mapping[str, list[float]] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = [f"{name} {old} → {new}" for name, (old, new) in self.wrong_shape.items()]
        kinds = {"resized": self.resized, "missing": self.missing, "unexpected": self.unexpected, "wrong shape": shapes,
                 "kept, of another tokenizer": self.kept, "kept, frozen": self.frozen}  # fmt: skip
        averaged = " (averaged)" if self.averaged else ""
        lines = [f"init_from {self.source}: {len(self.loaded)} tensors taken over{averaged}"]
        return "\n".join(lines + [f"  {kind}: {_listed(names)}" for kind, names in kinds.items() if names])


def load_weights(module: nn.Module, path: str | Path, averaged: bool = True) -> LoadReport:
    """Copy into `module`, in place, every tensor of `path` whose name and shape fit.

    path: a checkpoint file, a .safetensors file, a run's folder (its newest checkpoint), a pipeline folder (all its
    .safetensors, each under the name of its part: text/weights.safetensors holds `text.…`), or one part of such a folder
    (MODEL/text: the module's `text` alone), or its file: see `_whole_names`. Position embeddings (named
    `position`, or with an attribute `position_grid = (H, W)`) of another length are interpolated, or, with an attribute
    `position_counts = True`, as that of words, cut off or followed by the module's own. What the module has from its tokenizer
    (`of_tokenizer = True`) stays. Frozen parameters may be missing, but for those that come from nowhere else
    (`from_elsewhere = True`, see `check_frozen`). averaged: prefer averaged weights where there are some. Raises UserError where
    the source cannot be read or nothing fits.
    """
    source, averaged, reads, trained_beside = _read(Path(path), averaged)
    target = module.state_dict(keep_vars=True)
    source = _whole_names(source, {_plain(name): value for name, value in target.items()}, Path(path))
    report = LoadReport(str(path), averaged, reads, trained_beside)
    used = set()
    for name, value in target.items():
        found = _plain(name)
        if found not in source:
            own = isinstance(value, nn.Parameter) and not value.requires_grad and not getattr(value, "from_elsewhere", False)
            (report.frozen if own else report.missing).append(name)
            continue
        used.add(found)
        fitting = source[found]
        if getattr(value, "of_tokenizer", False):
            same = fitting.shape == value.shape and _equal(fitting.to(value), value)
            (report.loaded if same else report.kept).append(name)
            continue
        if fitting.shape != value.shape:
            fitting = _resize_position(fitting, value) if _is_position(name, value) else None
        if fitting is None:
            report.wrong_shape[name] = (tuple(source[found].shape), tuple(value.shape))
            continue
        with torch.no_grad():
            value.copy_(fitting)
        (report.loaded if fitting is source[found] else report.resized).append(name)
    report.unexpected.extend(name for name in source if name not in used)
    if not report.loaded and not report.resized:
        raise UserError(
            f"init_from: nothing in {path} fits this model; it holds {_listed(list(source))}, the model has {_listed(list(target))}"
        )
    return report


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to the rounding of weights that are stored in half precision."""
    return torch.allclose(a.float(), b.float(), rtol=0, atol=0.01 * float(b.abs().max()))


def check_frozen(module: nn.Module, report: LoadReport | None) -> None:
    """UserError where frozen weights that only another run can bring came from none. report: of `load_weights`, None = nothing was
    loaded."""
    needed = [name for name, p in module.named_parameters() if getattr(p, "from_elsewhere", False)]
    absent = needed if report is None else [name for name in needed if name in {*report.missing, *report.wrong_shape}]
    if absent:
        source = "init_from names none" if report is None else f"{report.source} has none that fit"
        raise UserError(
            f"init_from: frozen weights that start at random stay so, and {source} for {_listed(absent)}; name a run or a "
            "model that has them, or train them (trainable: all)"
        )


class Weights(NamedTuple):
    """All tensors by name, whether they are averaged ones, and what they were trained to read and beside, where that is known."""

    tensors: dict[str, Tensor]
    averaged: bool = False
    reads: Mapping[str, str] = {}
    trained_beside: Mapping[str, list[float]] = {}


def check_vocabulary(module: nn.Module, report: LoadReport) -> None:
    """UserError where embeddings of words were taken over that are those of other words here."""
    there, here = report.reads.get(VOCABULARY), getattr(module, "reads", {}).get(VOCABULARY)
    if there and here and there != here and any(name.startswith("text.") for name in report.loaded):
        raise UserError(
            f"init_from: {report.source} was trained with another vocabulary than model.init_args.text has, so that its "
            "embeddings are "
            "those of other words; name that vocabulary, or start from the other parts of a model folder, such as MODEL/network"
        )


def _read(path: Path, averaged: bool) -> Weights:
    if not path.exists():
        raise UserError(f"init_from: {path} does not exist")
    if path.is_file():
        return _read_file(path, averaged)
    run = path.parent if path.name == "checkpoints" else path
    if (path / checkpoints.MANIFEST).is_file():
        return _read_checkpoint(path, averaged)
    if found := checkpoints.newest(run, lambda checkpoint: _weights(checkpoints.read(checkpoint), averaged)):
        return found[1]
    files = sorted(path.rglob("*.safetensors"))
    if not files:
        raise UserError(f"init_from: {path} holds neither a whole checkpoint nor a .safetensors file")
    if len(files) == 1:
        return _read_file(files[0], averaged)
    tensors = {}
    for file in files:
        inside = file.relative_to(path)
        parts = inside.parent.parts if file.name == WEIGHTS else (*inside.parent.parts, file.stem)
        tensors.update({".".join((*parts, name)): value for name, value in _read_file(file, averaged).tensors.items()})
    return Weights(tensors)


def _read_file(path: Path, averaged: bool) -> Weights:
    try:
        if path.suffix == ".safetensors":
            return Weights(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"init_from: {path} holds more than tensors and plain values; it is not loaded") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"init_from: {path} is not a whole checkpoint") from error
    if not isinstance(content, Mapping):
        raise UserError(f"init_from: {path} holds no state dict")
    return _weights(content, averaged)


def _read_checkpoint(path: Path, averaged: bool) -> Weights:
    try:
        return _weights(checkpoints.read(path), averaged)
    except checkpoints.Broken as error:
        raise UserError(f"{error}; {path} is not a whole checkpoint") from error


def _weights(content: Mapping[str, Any], averaged: bool) -> Weights:
    tensors = {_plain(k): v for k, v in content.get("state_dict", content).items() if isinstance(v, Tensor)}
    averages = [average for average in averages_of(content) if averaged and average]
    for average in averages:
        tensors.update({_plain(k): v for k, v in average.items()})
    return Weights(tensors, bool(averages), content.get(checkpoints.READS, {}), content.get(checkpoints.FROZEN, {}))


def _plain(name: str) -> str:
    """A name without what wrappers (torch.compile, DDP) put in front of and into it."""
    return name.removeprefix("module.").replace("_orig_mod.", "")


def _whole_names(source: dict[str, Tensor], target: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of `source` by the names of a whole model. Those in a folder that is named after a part of `target` are
    that part's. Others are whatever most of them fit: the whole model, or else one of its parts, of which no other gets any.
    UserError where two parts are as likely.
    """
    parts = sorted({name.partition(".")[0] for name in target if "." in name})
    folder = path.resolve().parent if path.name == WEIGHTS else path.resolve()
    if (folder / WEIGHTS).is_file() and folder.name in parts:
        likeliest = [f"{folder.name}."]
    else:
        fits = {prefix: _fits(source, target, prefix) for prefix in ("", *(f"{part}." for part in parts))}
        likeliest = [prefix for prefix, fit in fits.items() if fit == max(fits.values())]
    if len(likeliest) > 1 and likeliest[0]:
        names = " and ".join(prefix.removesuffix(".") for prefix in likeliest)
        raise UserError(f"init_from: {path} fits {names} alike; name a folder that is called as one of them, such as MODEL/network")
    return {f"{likeliest[0]}{name}": value for name, value in source.items()}


def _fits(source: Mapping[str, Tensor], target: Mapping[str, Tensor], prefix: str) -> tuple[int, int]:
    """How many tensors have the name of one of the target's below `prefix`, and how many its shape, too, which may differ
    between sizes of one network."""
    known = [(value, target[prefix + name]) for name, value in source.items() if prefix + name in target]
    return len(known), sum(value.shape == own.shape for value, own in known)


def _is_position(name: str, value: Tensor) -> bool:
    return hasattr(value, "position_grid") or "position" in name.split(".")[-2:]


def _resize_position(source: Tensor, target: Tensor) -> Tensor | None:
    """`source` (…, N, D) interpolated to the shape of `target`; None if they differ in more than N.

    A target with `position_grid` (H, W) is a grid in row order: bicubic, smoothed where it shrinks (as ViT checkpoints
    are resized, arXiv 2010.11929, section 3.2). With `position_counts` each place keeps its own. Otherwise linear along the length.
    """
    if source.ndim != target.ndim or source.ndim < 2 or source.shape[-1] != target.shape[-1]:
        return None
    width = target.shape[-1]
    length, new_length = source.numel() // width, target.numel() // width
    flat = source.reshape(length, width).T.float()
    grid = getattr(target, "position_grid", None)
    if getattr(target, "position_counts", False):
        fitted = target.detach().clone()
        fitted[..., :length, :] = source[..., :new_length, :]
        return fitted
    if grid is None:
        return F.interpolate(flat[None], size=new_length, mode="linear").squeeze(0).T.reshape(target.shape)
    rows = round(math.sqrt(length * grid[0] / grid[1]))
    if rows * (length // max(rows, 1)) != length or grid[0] * grid[1] != new_length:
        return None
    image = flat.reshape(1, width, rows, length // rows)
    resized = F.interpolate(image, size=tuple(grid), mode="bicubic", antialias=True)
    return resized.reshape(width, new_length).T.reshape(target.shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
