"""Muon: momentum whose every step is made orthogonal (Jordan et al. 2024, "Muon: an optimizer for hidden layers")."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# The quintic iteration of Jordan et al., tuned for slope at zero: singular values end near 1, not at it.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """(n, R, S) → for each the nearest matrix with all singular values near 1, by five Newton-Schulz steps in bf16."""
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return x.to(matrices.dtype)


class MuonWithAdamW(Optimizer):
    """Muon on the groups marked `muon`, AdamW on the others: one optimizer to the trainer.

    Muon's parameters are matrices, or convolutions, which are taken as matrices (out, in · height · width). Its step
    has root mean square 0.2 · lr, as AdamW's usually has (Liu et al., arXiv 2502.16982), so both share one schedule.
    torch.optim.Muon takes matrices only, and a second optimizer would need manual optimisation.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ):
        # "fused" tells load_state_dict to put restored step counts beside the weights: the fused kernel wants them there.
        defaults = {"momentum": momentum, "betas": betas, "eps": eps, "muon": False, "weight_decay": 0.0, "fused": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if group["muon"] else self._adamw)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        decay = 1 - group["lr"] * group["weight_decay"]
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
            wide = update if len(update) <= update.shape[1] else update.mT  # the short side's square is the smaller one
            alike[tuple(wide.shape)].append((p, wide))
        # Matrices of one shape go through together: small products one by one leave a processor waiting.
        for (short, long), members in alike.items():
            steps = orthogonalised(torch.stack([wide for _, wide in members]))
            for (p, _), step in zip(members, steps, strict=True):
                step = step if len(p) == short else step.mT
                p.mul_(decay).add_(step.reshape(p.shape), alpha=-group["lr"] * 0.2 * long**0.5)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
