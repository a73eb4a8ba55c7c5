"""One token a pass, in raster order, with a key-value cache; conditional and unconditional rows in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nar_t2i.errors import UserError
from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.networks.attention import StaticCache
from nar_t2i.networks.predictions import truncation
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance, pass_progress
from nar_t2i.types import Condition, Decoded, InferenceStrategy, Known, Step, TokenNetwork, TokenState, over_values


@part
class Autoregressive(InferenceStrategy):
    """N passes for N tokens. temperature: of the draws, 0 = greedy. top_k, top_p: see `Categorical.sample`. Known tokens
    are kept and read as context."""

    static = True

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        if not 0 <= temperature < math.inf:
            raise UserError(f"Autoregressive: temperature must be finite and at least 0, not {temperature}")
        self.temperature, self.truncation = temperature, truncation(top_k, top_p)

    @torch.no_grad()
    def decode(
        self,
        network: TokenNetwork,
        condition: Condition,
        null: Condition,
        noise: Noise,
        guidance: Guidance,
        known: Known | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Decoded:
        if network.staged:
            raise UserError(f"{type(network).__name__} has an order in stages: Particles decodes it, not Autoregressive")
        guided = GuidedNetwork(network, condition, null, guidance)
        tokens, masked = start_state(network.spec, len(noise.ids), noise.ids.device, known)
        # cuDNN's attention would be planned anew for each length of the cache.
        kernels = (
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
            if tokens.is_cuda
            else nullcontext()
        )
        with kernels:
            tokens = self._drawn(guided, tokens, masked, noise, on_step)
        return Decoded(tokens, guided.passes, guided.rows)

    def _drawn(
        self, guided: GuidedNetwork, tokens: Tensor, masked: Tensor, noise: Noise, on_step: Callable[[Step], None] | None
    ) -> Tensor:
        spec = guided.network.spec
        cache, last = StaticCache(spec.length), spec.length - 1
        for slot in range(spec.length):
            here = torch.full((len(tokens), 1), slot, device=tokens.device)
            previous = slice(max(slot - 1, 0), max(slot, 1))
            state = TokenState(tokens[:, previous], masked[:, previous], positions=here)
            prediction = guided(state, pass_progress(slot, last + 1), cache=cache)
            sampled = prediction.sample(noise.at(slot, here), self.temperature, **self.truncation)
            drawn = torch.where(over_values(masked[:, slot], tokens[:, slot]), sampled.values[:, 0], tokens[:, slot])
            tokens, masked = tokens.clone(), masked.clone()
            tokens[:, slot], masked[:, slot] = drawn, False
            if on_step:
                on_step(Step(slot, tokens, masked))
        return tokens
