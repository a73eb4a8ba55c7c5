"""Quantizers: latent vectors ↔ codes. Always in fp32 or better: a nearest neighbour in bf16 is often another one."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nar_t2i.noise import Noise
from nar_t2i.parts import part


class Quantized(NamedTuple):
    """latents: (…, D) unit vectors, straight-through. codes: (…) int64. error: (…) squared distance. loss: scalar."""

    latents: Tensor
    codes: Tensor
    error: Tensor
    loss: Tensor


@part
class VectorQuantizer(nn.Module):
    """VQ with an L2-normalised codebook (ViT-VQGAN, arXiv 2110.04627), updated by moving averages or by its loss.

    codes: K. width: D. update: "ema" (van den Oord et al., arXiv 1711.00937, appendix A) or "loss" (‖sg(z) − e‖²).
    commitment: β. decay: of the moving averages. revive_below: a code whose moving count of uses falls under this share
    of the mean count is dead and takes the place of a latent of the current batch (our choice); 0 switches it off.
    revive_steps: none is revived after so many updates; an average of the codebook, which is what a run exports, has no
    meaning while codes change their places.

    Statistics are summed over ranks and revived codes are drawn from the latents of all ranks, so that one and two
    ranks give the same codebook. `step()` must be called once after every optimizer step, on all ranks, after the same
    number of forward passes of the same size. Forward passes in evaluation mode or without gradients are not counted.
    """

    def __init__(
        self,
        codes: int = 512,
        width: int = 8,
        update: Literal["ema", "loss"] = "ema",
        commitment: float = 0.25,
        decay: float = 0.97,
        revive_below: float = 0.03,
        revive_steps: int | None = None,
    ):
        super().__init__()
        self.codes, self.width, self.update = codes, width, update
        self.commitment, self.decay, self.revive_below, self.revive_steps = commitment, decay, revive_below, revive_steps
        start = F.normalize(torch.randn(codes, width), dim=1)
        if update == "loss":
            self.codebook = nn.Parameter(start)
            self.codebook.no_decay = True
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("sums", start.clone())
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._seen: list[tuple[Tensor, Tensor]] = []

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, latents: Tensor) -> Quantized:
        """latents: (…, D), any float type; they are normalised here."""
        z = F.normalize(_at_least_fp32(latents), dim=-1)
        flat = z.reshape(-1, self.width)
        book = F.normalize(self.codebook.to(z.dtype), dim=-1)
        with torch.no_grad():
            codes = (flat @ book.T).argmax(dim=1)
        chosen = F.embedding(codes, book).view_as(z)
        error = (z - chosen).square().sum(-1)
        loss = self.commitment * (z - chosen.detach()).square().sum(-1).mean()
        if self.update == "loss":
            loss = loss + (z.detach() - chosen).square().sum(-1).mean()
        if self.training and torch.is_grad_enabled():
            self._seen.append((flat.detach(), codes))
        return Quantized(z + (chosen - z).detach(), codes.view(z.shape[:-1]), error.detach(), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """(…) int64 → (…, D) unit vectors, in the codebook's type."""
        return F.embedding(codes, F.normalize(self.codebook, dim=-1))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Take in what the forward passes since the last step saw, on all ranks; nothing changes if there were none.

        Returns (K,), how often each code was used.
        """
        if not self._seen:
            return torch.zeros_like(self.counts)
        # Forward pass by forward pass, and rank by rank within one: the global batch's order, on any number of ranks.
        latents = torch.cat([_gather(z) for z, _ in self._seen])
        codes = torch.cat([_gather(c) for _, c in self._seen])
        self._seen.clear()
        used = torch.bincount(codes, minlength=self.codes).to(self.counts.dtype)
        self.counts.lerp_(used, 1 - self.decay)
        if self.update == "ema":
            sums = torch.zeros_like(self.sums).index_add_(0, codes, latents.to(self.sums.dtype))
            self.sums.lerp_(sums, 1 - self.decay)
            alive = self.counts > 1e-6
            self.codebook[alive] = F.normalize(self.sums[alive], dim=1)
        if self.revive_steps is None or self.updates < self.revive_steps:
            self._revive(latents)
        self.updates += 1
        return used

    def _revive(self, latents: Tensor) -> None:
        mean = self.counts.mean()
        dead = (self.counts < self.revive_below * mean).nonzero().flatten()
        if not len(dead):
            return
        chance = Noise(0, self.updates.view(1)).uniform("revive", shape=(len(latents),))[0]
        chosen = latents[chance.argsort()[: len(dead)]].to(self.codebook.dtype)
        dead = dead[: len(chosen)]
        self.codebook.data[dead] = chosen
        self.counts[dead] = mean
        if self.update == "ema":
            self.sums[dead] = chosen * mean


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gather(x: Tensor) -> Tensor:
    """The rows of all ranks, in rank order."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
