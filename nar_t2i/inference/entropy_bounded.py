"""Decoding as many tokens a pass as their uncertainty allows (EB-Sampler, Ben-Hamu et al., arXiv 2505.24857)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.inference.scheduled import fill, guessed, no_guess
from nar_t2i.networks.predictions import Categorical
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance, pass_progress
from nar_t2i.types import Condition, Decoded, InferenceStrategy, Known, Prediction, Step, TokenNetwork, TokenState


@part
class EntropyBounded(InferenceStrategy):
    """In each pass the most certain slots are filled, while what drawing them apart may cost stays below a bound.

    bound: γ, in nats, on the sum of the entropies of the slots of a pass without the largest of them, which bounds their
    mutual information; at least one slot is filled. temperature: of the draws, 0 = the mode. most_steps: passes; the last
    of them fills all that is left. How many it will take is not known ahead, so that guidance ramps and intervals run over
    `most_steps`: with few passes they hardly leave their beginning. One number a pass is read from the device: whether any slot
    is left.
    """

    def __init__(self, bound: float = 2.0, temperature: float = 1.0, most_steps: int = 64):
        if not (bound >= 0 and temperature >= 0 and most_steps >= 1):
            raise UserError(
                f"EntropyBounded: bound {bound}, temperature {temperature} must be at least 0, most_steps {most_steps} 1"
            )
        self.bound, self.temperature, self.most_steps = bound, temperature, most_steps

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
        guided = GuidedNetwork(network, condition, null, guidance)
        tokens, masked = start_state(network.spec, len(noise.ids), noise.ids.device, known)
        guess = no_guess(network, tokens)
        for step in range(self.most_steps):
            most = int(masked.sum(1).max())
            if most == 0:
                break
            slots = masked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
            open_slots = masked.gather(1, slots)
            # How far decoding is, is known of each image alone; guidance stands where the pass does.
            prediction = guided(TokenState(tokens, masked, guess=guess), pass_progress(step, self.most_steps), slots)
            sampled = prediction.sample(noise.at(step, slots), self.temperature)
            guess = guessed(guess, slots, sampled.values)
            filled = open_slots if step == self.most_steps - 1 else self.certain(entropy(prediction), open_slots)
            tokens, masked = fill(tokens, masked, slots, sampled.values, filled)
            if on_step:
                on_step(Step(step, tokens, masked))
        return Decoded(tokens, guided.passes, guided.rows)

    def certain(self, entropy: Tensor, open_slots: Tensor) -> Tensor:
        """(B, M), True for the slots to be filled: the longest run of the surest within the bound, and the surest of all."""
        ordered, order = entropy.masked_fill(~open_slots, float("inf")).sort(dim=1, stable=True)
        cost = ordered.cumsum(dim=1) - ordered  # of a run that ends here, without its last and largest
        within = (cost <= self.bound) & ordered.isfinite()
        return torch.zeros_like(open_slots).scatter(1, order, within)


def entropy(prediction: Prediction) -> Tensor:
    """(*slots) in nats."""
    if not isinstance(prediction, Categorical):
        raise UserError("EntropyBounded needs tokens that are codes; this network predicts others")
    log_probs = prediction.logits.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
