"""`nar-t2i doctor`: what a recipe needs on so many GPUs, and what is wrong with it, before anything is queued.

It takes two steps of the recipe on this machine's CPU, of one image and of two, on the recipe's own data: what cannot be
read or built is noticed here, and activations are counted rather than guessed.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from nar_t2i import recipe as recipes
from nar_t2i.errors import UserError
from nar_t2i.training import command, zero
from nar_t2i.training.memory import STAGES, Held, held

MIB = 2**20
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
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks, self.bytes = None, sum(self._storages.values())


def probe(configs: Sequence[str], overrides: Sequence[str], size: int) -> tuple[command.RecipeCLI, int]:
    """One step of `size` images on this CPU: what it was made of, and the bytes that it saved for its backward pass."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**PROBE, "run_dir": folder, "data.init_args.global_batch_size": str(size)}
        recipe = recipes.load(configs, [*overrides, *(f"{key}={value}" for key, value in settings.items())])
        cli = command.RecipeCLI(recipe)
        cli.build("fit")
        counter = Activations()
        cli.trainer.callbacks.append(counter)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli, counter.bytes


def main(arguments: argparse.Namespace) -> int:
    command.quieten()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    zero.register()
    configs, overrides = arguments.recipes, arguments.overrides
    recipe = command.load_recipe("fit", configs, overrides)
    cli = command.RecipeCLI(recipe)  # the recipe as it is: its keys and types
    trainer = cli.config.trainer
    nodes = _count(arguments.nodes, trainer.num_nodes, "--nodes")
    gpus = _count(arguments.gpus_per_node, trainer.devices, "--gpus-per-node")
    ranks = nodes * gpus
    wrong: list[str] = []

    data = cli.build_data()
    print(f"recipe       {recipe.name}: {nodes} × {gpus} = {ranks} ranks, {trainer.precision}, {trainer.strategy}")
    _tell_data(data, cli.config, ranks, wrong)
    one, first = probe(configs, overrides, 1)
    _, second = probe(configs, overrides, 2)
    per_image, fixed = max(0, second - first), max(0, 2 * first - second)
    model = one.trainer.lightning_module
    optimizers = one.trainer.optimizers
    groups = [[p.numel() for p in group["params"]] for optimizer in optimizers for group in optimizer.param_groups]
    frozen = frozen_bytes(model, optimizers)
    print(f"parameters   {sum(map(sum, groups)):,} trained; {frozen / MIB:,.1f} MiB of frozen ones and buffers")
    print(f"activations  {per_image / MIB:,.1f} MiB an image and {fixed / MIB:,.1f} MiB a step, counted on this CPU")
    accumulates = False
    micro = None
    try:
        micro, accumulates = data.micro_batch_size(ranks), data.accumulation(ranks) > 1
    except UserError as error:
        wrong.append(str(error))
    stages = STAGES if _divisible(cli.config) else {"ddp": 0}
    half = "16" in str(trainer.precision)
    averaged = model.ema is not None
    limit = arguments.gpu_memory_gib and arguments.gpu_memory_gib * 1024 * MIB
    _table({name: held(groups, frozen, ranks, stage, half, averaged) for name, stage in stages.items()},
           micro, accumulates, per_image, fixed, limit)  # fmt: skip
    if micro is not None and limit:
        name = trainer.strategy if trainer.strategy in stages else "ddp"
        need = held(groups, frozen, ranks, stages[name], half, averaged).peak(micro * per_image + fixed, accumulates)
        if need > limit:
            wrong.append(f"{name} needs {need / MIB:,.0f} MiB of {limit / MIB:,.0f}: set data.init_args.micro_batch_size")
    for problem in wrong:
        print(f"wrong        {problem}")
    return 2 if wrong else 0


def _tell_data(data: Any, config: Any, ranks: int, wrong: list[str]) -> None:
    steps, batch = config.trainer.max_steps, data.global_batch_size
    total = None
    for split in ("train", "validation"):
        asked = config.data.init_args.get(split)
        if asked is None:
            continue
        try:
            source = data.source(split)
        except (UserError, OSError) as error:
            wrong.append(f"{split}: {error}")
            continue
        print(f"{split:<12} {source.name}: {len(source):,} samples in {len(source.blocks):,} shards; {len(source.lost):,} unreadable")
        total = len(source) if split == "train" else total
    try:
        micro, accumulation = data.micro_batch_size(ranks), data.accumulation(ranks)
    except UserError:
        return  # said later
    seen = f"; {steps:,} steps see {steps * batch:,} images" if steps > 0 else ""
    epochs = f", {steps * batch / total:,.1f} times each" if steps > 0 and total else ""
    print(f"batch        {batch} images a step = {ranks} ranks × {micro} × {accumulation} in turn{seen}{epochs}")


def _table(
    rows: dict[str, Held], micro: int | None, accumulates: bool, per_image: int, fixed: int, limit: float | None
) -> None:
    """Print MiB a GPU by strategy."""
    activations = (micro or 1) * per_image + fixed
    names = ["weights", "gradients", "optimizer", "average", "buffers"]
    print(f"MiB a GPU, at a micro-batch of {micro or 1}:")
    largest = "largest micro-batch" if limit else ""
    print(f"{'':<20}" + "".join(f"{name:>12}" for name in [*names, "activations", "peak"]) + f"  {largest}")
    for strategy, row in rows.items():
        values = [*(getattr(row, name) for name in names), activations, row.peak(activations, accumulates)]
        fits = ""
        if limit:
            fits = str(_largest(row, limit, accumulates, per_image, fixed) or "none fits")
        print(f"{strategy:<20}" + "".join(f"{value / MIB:>12,.0f}" for value in values) + f"  {fits}")


def _largest(row: Held, limit: float, accumulates: bool, per_image: int, fixed: int) -> int:
    """The largest micro-batch whose peak stays below `limit` bytes; 0 if none does."""
    low, high = 0, 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        fits = row.peak(middle * per_image + fixed, accumulates) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _count(asked: int | None, default: Any, name: str) -> int:
    value = asked if asked is not None else default if isinstance(default, int) and default > 0 else 1
    if value < 1:
        raise UserError(f"{name}: must be at least 1, not {value}")
    return value


def _divisible(config: Any) -> bool:
    """Whether ZeRO takes this recipe: one optimizer, AdamW."""
    arguments = config.model.init_args
    return "codec" not in arguments and arguments.optimizer.kind == "adamw"


def frozen_bytes(module: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Of what no optimizer trains: frozen parameters and buffers, those of networks that a module keeps in a list included."""
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    apart = [item for value in vars(module).values() if isinstance(value, list) for item in value]
    roots = [module, *(item for item in apart if isinstance(item, nn.Module))]
    tensors = {id(t): t for root in roots for t in [*root.parameters(), *root.buffers()]}
    return sum(t.numel() * t.element_size() for identity, t in tensors.items() if identity not in trained)
