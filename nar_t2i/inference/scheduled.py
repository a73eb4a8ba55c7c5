"""Decoding in a number of passes that is known ahead: what all such strategies share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.networks.predictions import truncation
from nar_t2i.noise import Noise, SlotNoise
from nar_t2i.schedules import Guidance, MaskSchedule, masked_counts, pass_progress
from nar_t2i.types import (
    Condition,
    Decoded,
    InferenceStrategy,
    Known,
    Prediction,
    Sampled,
    Step,
    TokenNetwork,
    TokenState,
    over_values,
)


class Scheduled(InferenceStrategy):
    """Each pass predicts the unknown tokens and keeps those of the highest score, as many as the schedule says.

    steps: passes; where fewer tokens are unknown, as many as these are, with the guidance and the temperatures of a decoding of
    that many (ProgressiveStages revises to its end). schedule: of the share that stays masked. temperature: of the token draws,
    0 = the mode; final_temperature: what it changes to, linearly, until the last pass; None = it stays. top_k, top_p: see
    `Categorical.sample`. A subclass says what the score is.
    """

    static = True

    def __init__(
        self,
        steps: int = 16,
        schedule: MaskSchedule = "cosine",
        temperature: float = 1.0,
        final_temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        if steps < 1 or steps != int(steps):
            raise UserError(f"steps must be at least 1, and whole, not {steps}")
        if not (0 <= temperature < math.inf and (final_temperature is None or 0 <= final_temperature < math.inf)):
            raise UserError(f"temperatures must be finite and at least 0, not {temperature} and {final_temperature}")
        self.steps, self.schedule = steps, schedule
        self.temperature, self.final_temperature = temperature, final_temperature
        self.truncation = truncation(top_k, top_p)

    def counts(self, unknown: Tensor) -> list[Tensor]:
        """How many tokens stay masked after each pass. unknown: (B,) tokens to fill."""
        return masked_counts(self.schedule, self.steps, unknown)

    def draw(self, prediction: Prediction, draws: SlotNoise, step: int) -> Sampled:
        """A token for each slot."""
        return prediction.sample(draws, self.temperature_at(step), **self.truncation)

    def temperature_at(self, step: int) -> float:
        last = self.temperature if self.final_temperature is None else self.final_temperature
        return self.temperature + (last - self.temperature) * (pass_progress(step, self.steps) or 0.0)

    def score(self, prediction: Prediction, sampled: Sampled, draws: SlotNoise, step: int) -> Tensor:
        """(B, M): the slots of the highest scores keep their tokens."""
        raise NotImplementedError

    def passes(self, unknown: int) -> int:
        """How many it takes for so many tokens."""
        return min(self.steps, unknown)

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
        tokens, masked = start_state(network.spec, len(noise.ids), noise.ids.device, known)
        wanted = torch.tensor([self.passes(unknown) for unknown in to_fill(masked, known).tolist()])
        groups = wanted.unique().tolist()
        if len(groups) == 1:
            return self._of(groups[0])._decode(network, condition, null, noise, guidance, known, on_step)
        # Rows of other numbers of passes are decoded apart, so that an image does not depend on its batch.
        steps: list[tuple[Tensor, list[Step]]] = []
        found = []
        for passes in groups:
            rows = (wanted == passes).nonzero()[:, 0].to(tokens.device)
            steps.append((rows, [Step(-1, tokens[rows], masked[rows])]))
            found.append(self._of(passes)._decode(
                network, condition.map(lambda x: x[rows]), null.map(lambda x: x[rows]), noise.of_images(rows), guidance,
                Known(known.mask[rows], known.tokens[rows]), steps[-1][1].append if on_step else None,
            ))  # fmt: skip
        for step in range(max(len(told) for _, told in steps) - 1 if on_step else 0):
            for rows, told in steps:
                state = told[min(step + 1, len(told) - 1)]
                tokens, masked = tokens.index_copy(0, rows, state.tokens), masked.index_copy(0, rows, state.masked)
            on_step(Step(step, tokens, masked))
        for (rows, _), decoded in zip(steps, found, strict=True):
            tokens = tokens.index_copy(0, rows, decoded.tokens)
        return Decoded(tokens, max(decoded.passes for decoded in found), max(decoded.rows for decoded in found))

    def _of(self, passes: int) -> Scheduled:
        """The same in so many passes."""
        if passes == self.steps:
            return self
        other = copy.copy(self)
        other.steps = passes
        return other

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
        """All rows in `steps` passes."""
        guided = GuidedNetwork(network, condition, null, guidance)
        tokens, masked = start_state(network.spec, len(noise.ids), noise.ids.device, known)
        unknown = to_fill(masked, known)
        guess = no_guess(network, tokens)
        for step, left in enumerate(self.counts(unknown)):
            most = int(unknown.max())
            if most == 0:
                break
            slots = masked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
            prediction = guided(TokenState(tokens, masked, guess=guess), pass_progress(step, self.steps), slots)
            draws = noise.at(step, slots)
            sampled = self.draw(prediction, draws, step)
            guess = guessed(guess, slots, sampled.values)
            open_slots = masked.gather(1, slots)
            score = self.score(prediction, sampled, draws, step).masked_fill(~open_slots, float("-inf"))
            filled = (lowest_first(-score) < a_row(unknown - left, known, score.device)) & open_slots
            tokens, masked = fill(tokens, masked, slots, sampled.values, filled)
            unknown = left
            if on_step:
                on_step(Step(step, tokens, masked))
        return Decoded(tokens, guided.passes, guided.rows)


def to_fill(masked: Tensor, known: Known | None) -> Tensor:
    """(B,) on the host: how many slots are open in each row. The device is asked only where some are given."""
    return torch.full((len(masked),), masked.shape[1]) if known is None else masked.sum(1).cpu()


def a_row(count: Tensor, known: Known | None, device: torch.device) -> Tensor | int:
    """What ranks within a row, (B, N), are compared with. Where no slot is given all rows have the same count, a plain
    number, so that nothing is copied to the device."""
    return int(count[0]) if known is None else count.to(device)[:, None]


def lowest_first(score: Tensor) -> Tensor:
    """(B, M) rank of each entry, 0 = lowest; equal scores in order of place."""
    return score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)


def no_guess(network: TokenNetwork, tokens: Tensor) -> Tensor | None:
    """What a network that reads guesses is shown in the first pass, where there is none yet (see `TokenState.guess`)."""
    return torch.full_like(tokens, -1) if network.self_conditioning else None


def guessed(guess: Tensor | None, slots: Tensor, values: Tensor) -> Tensor | None:
    """The guess for the next pass: what this one drew for `slots`."""
    return None if guess is None else guess.scatter(1, slots, values)


def fill(tokens: Tensor, masked: Tensor, slots: Tensor, values: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """Write `values` where `filled`, leave every other slot as it is."""
    masked = masked.scatter(1, slots, masked.gather(1, slots) & ~filled)
    place = over_values(slots, values).expand_as(values)
    kept = torch.where(over_values(filled, values), values, tokens.gather(1, place))
    return tokens.scatter(1, place, kept), masked
