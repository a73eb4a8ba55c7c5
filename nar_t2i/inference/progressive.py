"""Decoding in few stages, with tokens of earlier ones revised on the way (arXiv 2210.02291)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nar_t2i.errors import UserError
from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.inference.scheduled import Scheduled, a_row, fill, guessed, lowest_first, no_guess, to_fill
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance, MaskSchedule, pass_progress
from nar_t2i.types import Condition, Decoded, Known, Step, TokenNetwork, TokenState


@part
class ProgressiveStages(Scheduled):
    """Each stage fills as many slots as the schedule says, those whose draws the network finds likeliest, and draws the
    least likely of the tokens that stand anew.

    steps: stages, one pass each. revise: the share of the standing tokens that is drawn anew in each pass, and in the last
    one too. What a network says at slots in sight means something where it has learned to mend them (`Progressive`,
    `Replaced`, `Unrolled`). The paper's dynamic importance is learned apart; the likelihood in its place is our choice.
    """

    def __init__(
        self,
        steps: int = 4,
        schedule: MaskSchedule = "linear",
        temperature: float = 1.0,
        revise: float = 0.2,
        final_temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        super().__init__(steps, schedule, temperature, final_temperature, top_k, top_p)
        if not 0 <= revise <= 1:
            raise UserError(f"ProgressiveStages: revise must be 0 to 1, not {revise}")
        self.revise = revise

    def passes(self, unknown: int) -> int:
        return self.steps  # to revise what stands, where little is unknown, too

    def _decode(
        self,
        network: TokenNetwork,
        condition: Condition,
        null: Condition,
        noise: Noise,
        guidance: Guidance,
        known: Known | None,
        on_step: Callable[[Step], None] | None,
    ) -> Decoded:
        guided = GuidedNetwork(network, condition, null, guidance)
        tokens, masked = start_state(network.spec, len(noise.ids), noise.ids.device, known)
        free, unknown = masked, to_fill(masked, known)
        guess = no_guess(network, tokens)
        slots = torch.arange(network.spec.length, device=tokens.device).expand(len(tokens), -1)
        for step, left in enumerate(self.counts(unknown)):
            if known is not None and not int(free.sum(1).max()):
                break
            prediction = guided(TokenState(tokens, masked, guess=guess), pass_progress(step, self.steps), slots)
            sampled = self.draw(prediction, noise.at(step, slots), step)
            guess = guessed(guess, slots, sampled.values)
            if sampled.log_prob is None:
                raise UserError("ProgressiveStages needs likelihoods of tokens; this network's predictions have none")
            standing = free & ~masked
            doubt = -prediction.nll(tokens)  # of what stands
            again = (self.revise * standing.sum(1, keepdim=True)).round()
            revised = standing & (lowest_first(doubt.masked_fill(~standing, float("inf"))) < again)
            score = sampled.log_prob.masked_fill(~masked, float("-inf"))
            filled = masked & (lowest_first(-score) < a_row(unknown - left, known, score.device))
            tokens, masked = fill(tokens, masked, slots, sampled.values, filled | revised)
            unknown = left
            if on_step:
                on_step(Step(step, tokens, masked))
        return Decoded(tokens, guided.passes, guided.rows)
