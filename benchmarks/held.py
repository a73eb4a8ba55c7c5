"""What a rank really holds between two steps, to compare with `nar_t2i.training.memory`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


def storage(tensors: Iterable[Tensor | None]) -> int:
    """Bytes, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def really_held(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Bytes of weights, of the optimizer's states with the fp32 weights that it updates, and of the average; and elements of
    the trained parameters by the optimizer's groups, and of the frozen ones. Under DDP or ZeRO."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    if engine is None:
        optimizer, masters = trainer.optimizers[0], []
        weights = storage(module.parameters())
        groups = [[p.numel() for p in group["params"]] for group in optimizer.param_groups]
    else:
        optimizer, wrapper = engine.optimizer.optimizer, engine.optimizer
        if hasattr(wrapper, "single_partition_of_fp32_groups"):
            masters = wrapper.single_partition_of_fp32_groups
            weights = storage(module.parameters())
        else:
            masters = wrapper.fp32_partitioned_groups_flat
            whole = [p for p in module.parameters() if p.ds_status.name == "AVAILABLE"]
            weights = storage([p.ds_tensor for p in module.parameters()]) + sum(p.numel() * p.element_size() for p in whole)
        of_groups = wrapper.bit16_groups if hasattr(wrapper, "bit16_groups") else wrapper.fp16_groups
        groups = [[getattr(p, "ds_numel", p.numel()) for p in group] for group in of_groups]
    sizes = {m.numel() for m in masters} | {p.numel() for p in module.parameters()}
    states = [s for state in optimizer.state.values() for s in state.values() if s.numel() in sizes and s.ndim]
    return {
        "weights": weights,
        "optimizer": storage(states) + storage(masters),
        "average": sum(t.numel() * t.element_size() for t in module.ema.average.values()),
        "groups": groups,
        "frozen": sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if not p.requires_grad),
    }
