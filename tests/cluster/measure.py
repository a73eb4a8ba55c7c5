"""What a rank really holds, as a callback that a recipe can name."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback

import nar_t2i


def storage(tensors):
    """Bytes, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


class Held(Callback):
    """Writes held-RANK.json at the end: bytes of weights, and of the optimizer's states with the fp32 weights that it updates."""

    def on_train_end(self, trainer, module) -> None:
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        if engine is None:
            optimizer, masters = trainer.optimizers[0], []
            weights = storage(module.parameters())
        else:
            optimizer, wrapper = engine.optimizer.optimizer, engine.optimizer
            if hasattr(wrapper, "single_partition_of_fp32_groups"):
                masters = wrapper.single_partition_of_fp32_groups
                weights = storage(module.parameters())
            else:
                masters = wrapper.fp32_partitioned_groups_flat
                whole = [p for p in module.parameters() if p.ds_status.name == "AVAILABLE"]
                weights = storage([p.ds_tensor for p in module.parameters()]) + sum(p.numel() * p.element_size() for p in whole)
        sizes = {m.numel() for m in masters} | {p.numel() for p in module.parameters()}
        states = [s for state in optimizer.state.values() for s in state.values() if s.numel() in sizes and s.ndim]
        average = sum(t.numel() * t.element_size() for t in module.ema.average.values())
        found = {"weights": weights, "optimizer": storage(states) + storage(masters), "average": average}
        frozen = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if not p.requires_grad)
        groups = [[p.numel() for p in group["params"]] for group in module.configure_optimizers()["optimizer"].param_groups] \
            if engine is None else [[getattr(p, "ds_numel", p.numel()) for p in group] for group in
                                    (wrapper.bit16_groups if hasattr(wrapper, "bit16_groups") else wrapper.fp16_groups)]
        Path(trainer.default_root_dir, f"held-{trainer.global_rank}.json").write_text(json.dumps({**found, "groups": groups, "frozen": frozen}))


class Frozen(Callback):
    """Gives the module so many frozen weights."""

    def __init__(self, size: int) -> None:
        self.size = size

    def setup(self, trainer, module, stage) -> None:
        module.frozen = torch.nn.Parameter(torch.zeros(self.size), requires_grad=False)


class Code(Callback):
    """Writes where the package was imported from."""

    def on_train_start(self, trainer, module) -> None:
        Path(trainer.default_root_dir, f"code-{trainer.global_rank}.txt").write_text(nar_t2i.__file__)
