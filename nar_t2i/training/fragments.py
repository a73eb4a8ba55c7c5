"""What a rank holds under ZeRO, told by parameter, so that any number of ranks can put it together again.

Every stage divides fp32 weights and the optimizer's states over the ranks in one way or another. A fragment says which
elements of which parameter a rank has; two sets of ranks then meet parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.training.ema import averages_of

KEY = "fragments"  # of what run.pt says about them
WEIGHT, AVERAGE, START = "weight", "average", "start"


class Incomplete(Exception):
    """The ranks' fragments do not make up a parameter."""


class Fragment(NamedTuple):
    """Elements start … start + len(weight) of a flattened parameter.

    weight: (n,) fp32, a view of what the optimizer updates. partition: the flat tensor that it is a part of, from
    `offset` on; the optimizer's states are kept by partition.
    """

    start: int
    weight: Tensor
    partition: Tensor
    offset: int


def of(engine: Any) -> dict[str, Fragment]:
    """The fragments that this rank of a DeepSpeed engine holds, by the parameter's name; some parameters have none."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    found = _of_stage_3 if engine.zero_optimization_partition_weights() else _of_stages_1_and_2
    return {names[id(p)]: fragment for p, fragment in found(engine.optimizer)}


def _of_stages_1_and_2(optimizer: Any) -> Iterator[tuple[Tensor, Fragment]]:
    for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for p in group:
            if p._hp_mapping is not None:
                here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                yield p, Fragment(there.start, partition.narrow(0, here.start, here.numel), partition, here.start)


def _of_stage_3(optimizer: Any) -> Iterator[tuple[Tensor, Fragment]]:
    rank = dist.get_rank(optimizer.dp_process_group)
    for group in optimizer.fp16_groups:
        for p in group:
            index, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            partition = optimizer.fp32_partitioned_groups_flat[index]
            start = rank * size
            count = max(0, min(size, p.ds_numel - start))  # the last ranks' are padded
            if count:
                yield p, Fragment(start, partition.narrow(0, offset, count), partition, offset)


def refresh(engine: Any) -> None:
    """Make the weights that the network computes with what the fragments say. All ranks must call it."""
    optimizer = engine.optimizer
    if not engine.zero_optimization_partition_weights():
        optimizer.update_lp_params()
        return
    fragments = of(engine)
    for name, p in engine.module.named_parameters():
        if name in fragments:
            weight = fragments[name].weight
            p.ds_tensor.data.narrow(0, 0, len(weight)).copy_(weight)
    if optimizer.persistent_parameters:  # small ones, which stay whole
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


# ---- into and out of checkpoints ---------------------------------------------------------------------------------------


def divide(engine: Any, checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Take out of Lightning's checkpoint what is divided, leave in it what all ranks share, and return this rank's part:
    {parameter: {"start": …, "weight": (n,), a key for each of the optimizer's states, "average": (n,)}}."""
    own: dict[str, dict[str, Any]] = {}
    scalars: dict[str, Any] = {}
    states = engine.optimizer.optimizer.state
    for name, (start, weight, partition, offset) in of(engine).items():
        own[name] = {START: start, WEIGHT: weight.detach().cpu().clone()}
        for key, value in states.get(partition, {}).items():
            if isinstance(value, Tensor) and value.shape == partition.shape:
                own[name][key] = value.narrow(0, offset, len(weight)).cpu().clone()
            else:
                scalars[key] = value
    for average in averages_of(checkpoint):
        for name in set(average) & set(own):
            own[name][AVERAGE] = average.pop(name).cpu()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.optimizer.param_groups]
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters() if p.requires_grad}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scale = {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float, bool))} if scaler is not None else {}
    checkpoint[KEY] = {"groups": groups, "scalars": scalars, "shapes": shapes, "loss_scale": scale}
    return own


def assemble(own: Mapping[str, Fragment], parts: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Tensor]]:
    """{parameter: {key: (n,)}}: for each of this rank's fragments what `parts`, of any number of ranks, say of it.

    Raises Incomplete where they do not say everything.
    """
    result = {}
    for name, fragment in own.items():
        sources = [part[name] for part in parts if name in part]
        keys = sorted({key for source in sources for key in source} - {START})
        count = len(fragment.weight)
        result[name] = {key: _cut(name, fragment.start, count, [(s[START], s[key]) for s in sources]) for key in keys}
        if not keys:
            raise Incomplete(f"nothing is known of {name}")
    return result


def restore(engine: Any, shared: dict[str, Any], found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put into the engine what `assemble` found. shared: what `divide` left under KEY. All ranks must call it."""
    optimizer = engine.optimizer.optimizer
    for fragment in of(engine).values():  # all states of a partition come at once, empty
        state = optimizer.state[fragment.partition]
        state.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in shared["scalars"].items()})
    with torch.no_grad():
        for name, (_, weight, partition, offset) in of(engine).items():
            weight.copy_(found[name][WEIGHT])
            for key in found[name].keys() - {WEIGHT, AVERAGE}:
                state = optimizer.state[partition].setdefault(key, torch.zeros_like(partition))
                state.narrow(0, offset, len(weight)).copy_(found[name][key])
    if len(optimizer.param_groups) != len(shared["groups"]):
        raise UserError(
            f"the checkpoint's optimizer has {len(shared['groups'])} groups of weights, the recipe's "
            f"{len(optimizer.param_groups)}: what "
            "is trained is another; give the run another run_dir, or start from this one with --init_from"
        )
    for group, saved in zip(optimizer.param_groups, shared["groups"], strict=True):
        group.update(saved)
    for name, value in shared["loss_scale"].items():
        setattr(engine.optimizer.loss_scaler, name, value)
    refresh(engine)


def undivide(checkpoint: dict[str, Any], parts: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Complete Lightning's checkpoint with whole weights and averages, from the parts of all ranks."""
    shapes = checkpoint[KEY]["shapes"]
    checkpoint["optimizer_states"] = []
    averages = list(averages_of(checkpoint))
    for name, shape in shapes.items():
        sources = [part[name] for part in parts if name in part]
        count = torch.Size(shape).numel()
        whole = _cut(name, 0, count, [(s[START], s[WEIGHT]) for s in sources])
        checkpoint["state_dict"][name] = whole.view(shape)
        if averages and all(AVERAGE in source for source in sources):
            averages[0][name] = _cut(name, 0, count, [(s[START], s[AVERAGE]) for s in sources]).view(shape)


def put_averages(checkpoint: dict[str, Any], found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give the averages of this rank's fragments back to the callback that keeps them."""
    for average in averages_of(checkpoint):
        average.update({name: values[AVERAGE] for name, values in found.items() if AVERAGE in values})


def _cut(name: str, start: int, count: int, sources: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Elements start … start + count out of pieces (first element, values)."""
    result = torch.empty(count, dtype=sources[0][1].dtype) if sources else torch.empty(0)
    filled = 0
    for begin, values in sources:
        low, high = max(start, begin), min(start + count, begin + len(values))
        if low < high:
            result[low - start : high - start] = values[low - begin : high - begin]
            filled += high - low
    if filled != count:
        raise Incomplete(f"{filled} of {count} elements of {name} are there")
    return result
