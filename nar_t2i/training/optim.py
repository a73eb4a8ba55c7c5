"""AdamW, its parameter groups and its learning-rate schedule: what every trained module shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nar_t2i.errors import UserError
from nar_t2i.training.muon import MuonWithAdamW

# Layers whose parameters are never decayed, whatever their shape.
_UNDECAYED = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
)
_THIN = 16  # rows or columns of a matrix that Muon leaves to AdamW
# Devices on which torch runs AdamW as one kernel.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass
class OptimizerConfig:
    """The `optimizer` key of a recipe.

    kind: "adamw", or "muon" for matrices and convolutions with AdamW for the rest (see `nar_t2i.training.muon`).
    learning_rate: the peak, reached at the end of the warm-up.
    muon_learning_rate: Muon's peak, on the same schedule; None = `learning_rate`.
    weight_decay: decoupled; acts on matrices and convolutions only (see `parameter_groups`).
    beta1, beta2, eps: AdamW's.
    warmup_steps: optimizer steps of linear growth from 0 to the peak.
    schedule: "cosine" falls to `final_ratio` of the peak at the last step; "constant" stays at the peak.
    final_ratio: learning rate at the end of "cosine", as a share of the peak.
    clip_norm: largest norm of the gradient over all parameters; 0 = no clipping.
    fused: one kernel for the whole update; None = wherever torch offers it.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float | None = None
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_ratio: float = 0.0
    clip_norm: float = 1.0
    fused: bool | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "weight_decay", "warmup_steps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"optimizer: {name} must be at least 0, not {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer: {name} must be from 0 to below 1, not {getattr(self, name)}")
        if not 0 <= self.final_ratio <= 1:
            raise UserError(f"optimizer: final_ratio must be from 0 to 1, a share of the peak, not {self.final_ratio}")
        if not self.eps > 0:
            raise UserError(f"optimizer: eps must be above 0, not {self.eps}")
        if self.kind == "muon" and not self.learning_rate:
            raise UserError("optimizer: learning_rate 0 with muon, whose rate follows from it; freeze what is not to be trained")


def parameter_groups(
    modules: nn.Module | Iterable[nn.Module], weight_decay: float, learning_rate_scale: float = 1.0, muon: bool = True
) -> list[dict[str, Any]]:
    """The trainable parameters of `modules`, each once, as one decayed and one undecayed group (empty ones left out).

    Not decayed: norms, biases and everything else of fewer than two dimensions, embeddings, and parameters that carry
    `no_decay = True` (learned positions). A matrix that is shared with an embedding counts as an embedding.
    learning_rate_scale: this group's learning rate over the recipe's; `build` applies it.
    muon: False leaves all of them to AdamW, where the others' matrices are Muon's.
    """
    roots = [modules] if isinstance(modules, nn.Module) else list(modules)
    layers = [layer for root in roots for layer in root.modules()]
    undecayed = {id(p) for layer in layers if isinstance(layer, _UNDECAYED) for p in layer.parameters(recurse=False)}
    unique = {id(p): p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad}

    def decays(p: nn.Parameter) -> bool:
        return p.ndim >= 2 and id(p) not in undecayed and not getattr(p, "no_decay", False)

    groups = [
        {"params": [p for p in unique.values() if decays(p)], "weight_decay": weight_decay, "matrices": muon},
        {"params": [p for p in unique.values() if not decays(p)], "weight_decay": 0.0, "matrices": False},
    ]
    return [{**group, "learning_rate_scale": learning_rate_scale} for group in groups if group["params"]]


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """What multiplies the peak learning rate in the optimizer step that follows `step` finished ones, 0 ≤ step < total_steps."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    # The first step after the warm-up is at the peak, the last of all, where there is another, at `final_ratio`.
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    return config.final_ratio + (1 - config.final_ratio) * (1 + math.cos(math.pi * progress)) / 2


class Schedule(LambdaLR):
    """One factor for all groups. A run that goes on keeps the rates, decays and betas of its recipe, in which they may have
    been changed since, and not those that its checkpoint restores.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]):
        super().__init__(optimizer, factor)
        self._asked = [
            {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
        ]

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_asked"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, here = state_dict["base_lrs"], self.base_lrs
        super().load_state_dict({**state_dict, "base_lrs": here})
        factor = self.lr_lambdas[0](self.last_epoch)
        for group, asked, old, new in zip(self.optimizer.param_groups, self._asked, before, here, strict=True):
            group.update(asked)
            if new != old:
                group["lr"] = new * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        _place_counts(self.optimizer)


def _place_counts(optimizer: Optimizer) -> None:
    """Put the restored counts of steps where the update looks for them: a fused one beside the weights, any other on the host.
    They were read on the host under ZeRO, and written by the other kind where `fused` was changed; a GPU's kernel takes any
    address for its own.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    for p, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(p.device if fused else "cpu", torch.float32)


def build(
    config: OptimizerConfig, groups: list[dict[str, Any]], total_steps: int | Callable[[], int]
) -> tuple[Optimizer, Schedule]:
    """The optimizer over `groups` (of `parameter_groups`) and its schedule, which is to be stepped after every optimizer step.

    total_steps: optimizer steps of the whole run, or how to ask for them where they are an estimate. Each group's peak is
    multiplied by `learning_rate_factor`.
    """
    total = total_steps if callable(total_steps) else lambda: total_steps
    groups = [{**group, "lr": config.learning_rate * group.get("learning_rate_scale", 1.0)} for group in groups]
    betas = (config.beta1, config.beta2)
    if config.kind == "muon":
        optimizer: Optimizer = MuonWithAdamW(_divided(groups, config), betas=betas, eps=config.eps)
        optimizer.register_load_state_dict_pre_hook(_check_groups)
        return optimizer, Schedule(optimizer, lambda step: learning_rate_factor(step, total(), config))
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices <= set(_FUSED_DEVICES) if config.fused is None else config.fused
    optimizer = AdamW(groups, betas=betas, eps=config.eps, fused=fused)
    # A fused AdamW offers to unscale fp16 gradients itself, and Lightning then refuses to clip them, in bf16 too.
    # Declining the offer lets the precision plugin unscale first, clip, and step, as with any other optimizer.
    optimizer._step_supports_amp_scaling = False
    optimizer.register_load_state_dict_pre_hook(_check_groups)
    return optimizer, Schedule(optimizer, lambda step: learning_rate_factor(step, total(), config))


def _check_groups(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """UserError where a checkpoint's states are of another kind of optimizer, or of other weights."""
    there, here = (
        ["Muon's" if any("muon" in group for group in groups) else "AdamW's", *(len(group["params"]) for group in groups)]
        for groups in (saved["param_groups"], optimizer.param_groups)
    )
    if there != here:
        told = [f"{kind} of groups of {', '.join(map(str, sizes))} weights" for kind, *sizes in (there, here)]
        raise UserError(
            f"the checkpoint's optimizer states are {told[0]}, the recipe's {told[1]}: model.init_args.optimizer.kind, or what is "
            "trained, is another; give the run another run_dir, or start from this one with --init_from"
        )


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Where the schedule has brought `OptimizerConfig.learning_rate`: the rate of the first group that is not Muon's, which has one
    of its own."""
    groups = optimizer.param_groups
    return next((group for group in groups if not group.get("muon")), groups[0])["lr"]


def _divided(groups: list[dict[str, Any]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """The groups, with those of matrices divided into Muon's and AdamW's. Thin matrices (inputs of pixels, heads of a
    few outputs) have hardly a spectrum to make flat: AdamW's."""

    def is_muons(p: nn.Parameter) -> bool:
        return min(len(p), p[0].numel()) > _THIN

    rate = config.learning_rate if config.muon_learning_rate is None else config.muon_learning_rate
    ratio = rate / config.learning_rate
    divided = []
    for group in groups:
        muons = [p for p in group["params"] if group["matrices"] and is_muons(p)]
        rest = [p for p in group["params"] if not (group["matrices"] and is_muons(p))]
        divided += [{**group, "params": muons, "muon": True, "lr": group["lr"] * ratio}] if muons else []
        divided += [{**group, "params": rest}] if rest else []
    return divided
