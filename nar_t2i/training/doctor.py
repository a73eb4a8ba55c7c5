"""`nar-t2i doctor`: what a recipe needs on so many GPUs, and what is wrong with it, before anything is queued.

It takes two steps of the recipe on this machine's CPU, of one image and of two, on the recipe's own data: what cannot be
read or built is noticed here, and activations are counted rather than guessed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from nar_t2i import recipe as recipes
from nar_t2i.data.opening import is_remote
from nar_t2i.data.order import validation_batches
from nar_t2i.data.source import SampleError
from nar_t2i.errors import UserError
from nar_t2i.networks.attention import fused
from nar_t2i.training import command, zero
from nar_t2i.training.base import has_frozen
from nar_t2i.training.init_from import load_weights
from nar_t2i.training.memory import STAGES, Held, Trained, held
from nar_t2i.training.resolving import load_recipe

MIB = 2**20
CAPTIONED = 2000  # samples whose captions are read
# How the recipe is run here.
PROBE = {
    "trainer.accelerator": "cpu", "trainer.devices": "1", "trainer.num_nodes": "1", "trainer.strategy": "auto",
    "trainer.max_steps": "1", "trainer.logger": "false", "trainer.enable_checkpointing": "false",
    "trainer.limit_val_batches": "0", "trainer.num_sanity_val_steps": "0", "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false", "trainer.callbacks": "null", "wandb": "null", "init_from": "null",
    "data.init_args.micro_batch_size": "null", "data.init_args.workers": "0", "data.init_args.epoch_size": "null",
    "data.init_args.validation": "null", "data.init_args.validation_cache": "null",
}  # fmt: skip


class Activations(Callback):
    """Counts the bytes that the forward pass saves for the backward pass, weights and buffers aside."""

    def __init__(self) -> None:
        self.bytes = 0
        self._storages: dict[int, int] = {}
        self._hooks: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        own = {t.untyped_storage().data_ptr() for t in [*pl_module.parameters(), *pl_module.buffers()]}

        def pack(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage.data_ptr() not in own:
                self._storages[storage.data_ptr()] = storage.nbytes()
            return saved

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)
        self._hooks.__enter__()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.stop()

    def stop(self) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks, self.bytes = None, sum(self._storages.values())


class Probed(NamedTuple):
    """What one step was made of, the bytes that it saved for its backward pass, and the module that took it."""

    trained: Trained
    activations: int
    module: LightningModule


def probe(configs: Sequence[str | Path], overrides: Sequence[str], size: int) -> Probed:
    """Take one step of `size` images on this CPU. Raises UserError, and KeyboardInterrupt."""
    with tempfile.TemporaryDirectory() as folder:
        asked = recipes.load(configs, overrides).config
        settings = {**PROBE, "run_dir": folder, "data.init_args.global_batch_size": str(size)}
        if asked.get("model", {}).get("init_args", {}).get("compile"):
            settings["model.init_args.compile"] = "null"  # compiled passes save what their hardware makes best
        cli = command.RecipeCLI(recipes.load(configs, [*overrides, *(f"{key}={value}" for key, value in settings.items())]))
        cli.build("fit")
        init_from = asked.get("init_from")
        if init_from and Path(init_from).exists() and has_frozen(cli.model):
            load_weights(cli.model, init_from)  # a cache of a frozen text encoder's states belongs to its weights
        cli.model.write = lambda folder: None
        counter = Activations()
        cli.trainer.callbacks.append(counter)
        try:
            with fused():
                cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        except SystemExit as error:
            raise KeyboardInterrupt from error
        finally:
            counter.stop()
        if cli.signals.received:
            raise KeyboardInterrupt
    return Probed(_trained(cli.model, cli.trainer.optimizers), counter.bytes, cli.model)


def main(arguments: argparse.Namespace) -> int:
    command.quieten()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    zero.register()
    configs, overrides = arguments.recipes, arguments.overrides
    recipe = load_recipe("fit", configs, overrides)
    cli = command.RecipeCLI(recipe)  # the recipe as it is: its keys and types
    trainer = cli.config.trainer
    nodes = _positive("--nodes", trainer.num_nodes if arguments.nodes is None else arguments.nodes)
    gpus = _positive("--gpus-per-node", _devices(trainer.devices) if arguments.gpus_per_node is None else arguments.gpus_per_node)
    ranks, strategy = nodes * gpus, _strategy(trainer.strategy)
    half = "16" in str(trainer.precision)
    if arguments.gpu_memory_gib is not None and not arguments.gpu_memory_gib > 0:
        raise UserError(f"--gpu-memory-gib: must be above 0, not {arguments.gpu_memory_gib:g}")
    limit = arguments.gpu_memory_gib and arguments.gpu_memory_gib * 1024 * MIB
    print(f"recipe       {recipe.name}: {nodes} × {gpus} = {ranks} ranks, {trainer.precision}, {strategy}")
    wrong = [f"{key}: {path} does not exist" for key in ("init_from", "ckpt_path")
             if (path := cli.config[key]) not in (None, *command.FRESH) and not Path(path).exists()]  # fmt: skip
    if refusal := _refusal(strategy, cli.config):
        wrong.append(refusal)
    try:
        data = cli.build_data()
        _tell_data(data, cli.config, ranks, wrong)
        one, two = (probe(configs, overrides, size) for size in (1, 2))
    except UserError as error:
        wrong.append(str(error))
    else:
        _tell_captions(data, two.module)
        wrong += _tell_memory(one, two, data, cli.config, strategy, ranks, half, limit)
    for problem in dict.fromkeys(wrong):
        print(f"wrong        {' '.join(problem.split())}")
    return 2 if wrong else 0


def _tell_data(data: Any, config: Any, ranks: int, wrong: list[str]) -> None:
    steps, batch = config.trainer.max_steps, data.global_batch_size
    total = validated = None
    for split in ("train", "validation"):
        asked = config.data.init_args.get(split)
        if asked is None:
            continue
        if isinstance(asked, str) and is_remote(asked):
            print(f"{split:<12} {asked}: streamed")
            continue
        try:
            source = data.source(split)
        except (UserError, OSError) as error:
            wrong.append(f"{split}: {error}")
            continue
        print(
            f"{split:<12} {source.name}: {len(source):,} samples in {len(source.blocks):,} shards; {source.lost_count:,} unreadable"
        )
        total = len(source) if split == "train" else total
        validated = len(source) if split == "validation" else validated
    try:
        micro, accumulation = data.micro_batch_size(ranks), data.accumulation(ranks)
        if validated is not None:
            validation_batches(validated, micro, world=ranks)
    except UserError as error:
        wrong.append(str(error))
        return
    seen = f"; {steps:,} steps see {steps * batch:,} images" if steps > 0 else ""
    epochs = f", {steps * batch / total:,.1f} times each" if steps > 0 and total else ""
    print(f"batch        {batch} images a step = {ranks} ranks × {micro} × {accumulation} in turn{seen}{epochs}")


def _tell_captions(data: Any, module: LightningModule) -> None:
    """How many of the training captions do not fit into the text encoder."""
    text = getattr(module, "text", None)
    encoders = [encoder for encoder in getattr(text, "encoders", [text]) if hasattr(encoder, "tokenize")]
    if not encoders or getattr(data, "streams", True):
        return
    source = data.source("train")
    indices = np.unique(np.linspace(0, len(source) - 1, min(len(source), CAPTIONED)).astype(int))
    for encoder in encoders:
        encoded, truncated = encoder.encoded, encoder.truncated
        for index in indices:
            with suppress(SampleError):
                encoder.tokenize(source.read_text(int(index)).captions)
        encoded, truncated = encoder.encoded - encoded, encoder.truncated - truncated
        fits = f"{truncated / encoded:.1%} do not fit into {encoder.max_length} tokens of {type(encoder).__name__}"
        print(f"captions     {encoded:,} read: {fits}")


def _tell_memory(
    one: Probed, two: Probed, data: Any, config: Any, strategy: str, ranks: int, half: bool, limit: float | None
) -> list[str]:
    """Print the table; what is wrong."""
    per_image, fixed = max(0, two.activations - one.activations), max(0, 2 * one.activations - two.activations)
    trained = one.trained
    print(f"parameters   {sum(map(sum, trained.groups)):,} trained, {sum(trained.frozen):,} frozen")
    print(f"activations  {per_image / MIB:,.1f} MiB an image and {fixed / MIB:,.1f} MiB a step, counted on this CPU")
    try:
        micro, accumulates = data.micro_batch_size(ranks), data.accumulation(ranks) > 1
    except UserError:
        micro, accumulates = 1, False  # what is wrong with it is told already
    names = [name for name in STAGES if name == "ddp" or _refusal(name, config) is None]
    rows = {name: held(trained, ranks, STAGES[name], half) for name in names}
    _table(rows, micro, accumulates, -(-data.global_batch_size // ranks), per_image, fixed, limit)
    row = rows.get(strategy.removesuffix("_offload"))
    need = row.peak(micro * per_image + fixed, accumulates) if row and limit else 0
    if not limit or need <= limit or strategy.endswith("_offload"):
        return []
    return [f"{strategy} needs {need / MIB:,.0f} MiB of {limit / MIB:,.0f}: set data.init_args.micro_batch_size"]


def _table(
    rows: Mapping[str, Held], micro: int, accumulates: bool, share: int, per_image: int, fixed: int, limit: float | None
) -> None:
    """Print MiB a GPU by strategy. share: images of a step for each rank."""
    activations = micro * per_image + fixed
    names = ["weights", "gradients", "optimizer", "average", "buffers"]
    print(f"MiB a GPU, at a micro-batch of {micro}:")
    largest = "largest micro-batch" if limit else ""
    print(f"{'':<20}" + "".join(f"{name:>12}" for name in [*names, "activations", "peak"]) + f"  {largest}")
    for strategy, row in rows.items():
        values = [*(getattr(row, name) for name in names), activations, row.peak(activations, accumulates)]
        fits = str(largest_micro_batch(row, limit, share, per_image, fixed) or "none fits") if limit else ""
        print(f"{strategy:<20}" + "".join(f"{value / MIB:>12,.0f}" for value in values) + f"  {fits}")


def largest_micro_batch(row: Held, limit: float, share: int, per_image: int, fixed: int) -> int:
    """The largest divisor of a rank's share of a step that fits into `limit` bytes; 0 if none does."""
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    return next((size for size in sizes if row.peak(size * per_image + fixed, size < share) <= limit), 0)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{name}: must be at least 1, not {value}")
    return value


def _devices(asked: Any) -> int:
    """How many GPUs of a node a recipe names."""
    if isinstance(asked, (list, tuple)):
        return len(asked)
    if isinstance(asked, str) and "," in asked:
        return len([part for part in asked.split(",") if part])
    if str(asked).isdigit() and int(asked) > 0:
        return int(asked)
    print(f"one GPU a node is taken, since trainer.devices is {asked}; --gpus-per-node says otherwise")
    return 1


def _strategy(asked: Any) -> str:
    """One of STAGES, with "_offload" where states are."""
    if hasattr(asked, "class_path"):
        if not asked.class_path.endswith("ZeRO"):
            return asked.class_path
        arguments = asked.get("init_args") or {}
        offload = "_offload" if arguments.get("offload_optimizer") else ""
        return f"deepspeed_stage_{arguments.get('stage', 2)}{offload}"
    return {"auto": "ddp", "deepspeed": "deepspeed_stage_2"}.get(asked, asked)


def _refusal(strategy: str, config: Any) -> str | None:
    """Why ZeRO does not take this recipe, or None."""
    arguments = config.model.init_args
    if not strategy.startswith("deepspeed"):
        return None
    if "codec" in arguments:
        return "trainer.strategy: a tokenizer has two optimizers, which DeepSpeed cannot train; use ddp"
    if arguments.optimizer.kind == "muon":
        return "model.init_args.optimizer.kind: muon needs whole matrices, which ZeRO divides; use adamw, or strategy ddp"
    return None


def _trained(module: LightningModule, optimizers: Sequence[Optimizer]) -> Trained:
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    known = {id(p) for group in groups for p in group}
    states = [s for optimizer in optimizers for state in optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
    own = {id(t) for t in [*module.parameters(), *module.buffers()]}
    apart = [item for value in vars(module).values() if isinstance(value, list) for item in value]
    roots = [module, *(item for item in apart if isinstance(item, nn.Module))]
    rest = {id(t): t for root in roots for t in [*root.parameters(), *root.buffers()] if id(t) not in known}
    frozen = {identity for identity, t in rest.items() if identity in own and isinstance(t, nn.Parameter)}
    return Trained(
        groups=[[p.numel() for p in group] for group in groups],
        frozen=[rest[identity].numel() for identity in frozen],
        apart=sum(_bytes(t) for identity, t in rest.items() if identity not in frozen),
        states=sum(_bytes(s) for s in states if s.ndim),
        average=sum(_bytes(t) for t in module.ema.average.values()) if module.ema is not None else 0,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
