"""Decoding in which a critic chooses what stays (TCTS, arXiv 2304.01515, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.folders import frozen_network
from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.inference.scheduled import Scheduled, a_row, fill, guessed, lowest_first, no_guess, to_fill
from nar_t2i.noise import Noise, gumbel
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance, MaskSchedule, pass_progress
from nar_t2i.types import Condition, Decoded, Known, Step, TokenNetwork, TokenSpec, TokenState, beside


@part
class CriticGuided(Scheduled):
    """Each pass draws all tokens that are open; a critic, which sees the whole picture and the text, says which may stay.

    As many stay as the schedule says, and all others are open again, those that stood before included: choices can be
    revoked. The last pass fills what is left. critic: the model folder of a run with CriticOf, or its network.
    choice_temperature: of Gumbel noise on the critic's log-probabilities, falling to 0. persistent: a share of the slots;
    a token that stands when its slot is among that share, of least detail, is not revoked any more (frequency-adaptive
    sampling). 0 revokes everywhere, 1 nowhere. The paper reads detail from self-attention; here it is the share of a
    slot's neighbours that hold another code (our choice).

    A saved model names the critic's folder as it was given, and holds no copy of it.

    The critic makes one call a pass, on conditional rows alone; `passes` and `rows` count the generator's and its calls.
    """

    def __init__(
        self,
        critic: str | TokenNetwork,
        steps: int = 16,
        schedule: MaskSchedule = "linear",
        temperature: float = 1.0,
        choice_temperature: float = 0.0,
        persistent: float = 0.0,
        final_temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        super().__init__(steps, schedule, temperature, final_temperature, top_k, top_p)
        if not (0 <= persistent <= 1 and choice_temperature >= 0):
            raise UserError(
                f"CriticGuided: persistent {persistent} must be 0 to 1, choice_temperature {choice_temperature} at least 0"
            )
        self.choice_temperature, self.persistent = choice_temperature, persistent
        self.critic = frozen_network(critic)
        self.static = self.critic.static

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
        free, doubt = masked, doubt_of(self.critic, network.spec, condition)
        unknown = to_fill(masked, known)
        remaining, protected = unknown, torch.zeros_like(masked)
        slots = torch.arange(network.spec.length, device=tokens.device).expand(len(tokens), -1)
        guess, asked = no_guess(network, tokens), 0
        for step, left in enumerate(self.counts(unknown)):
            if int(remaining.max()) == 0:
                break
            prediction = guided(TokenState(tokens, masked, guess=guess), pass_progress(step, self.steps), slots)
            tokens, _ = fill(tokens, masked, slots, self.draw(prediction, noise.at(step, slots), step).values, masked)
            guess = guessed(guess, slots, tokens)
            if step + 1 == self.steps:
                masked = torch.zeros_like(masked)
            else:
                right = -torch.nn.functional.softplus(doubt(tokens))
                asked += 1
                luck = gumbel(noise.at(step, slots).uniform("choice"))
                score = right + self.choice_temperature * (1 - (step + 1) / self.steps) * luck
                protected = protected | (~masked & free & self.smooth(tokens, free, network.spec))
                score = score.masked_fill(protected, float("inf")).masked_fill(~free, float("-inf"))
                keep = (lowest_first(-score) < a_row(unknown - left, known, score.device)) & free
                masked = free & ~keep
            remaining = left
            if on_step:
                on_step(Step(step, tokens, masked))
        return Decoded(tokens, guided.passes + asked, guided.rows + asked)

    def smooth(self, tokens: Tensor, free: Tensor, spec: TokenSpec) -> Tensor:
        """(B, N), the `persistent` share of the free slots that differ from the fewest of their neighbours."""
        count = (self.persistent * free.sum(1, keepdim=True)).round()
        detail = differing_neighbours(tokens.flatten(2) if tokens.ndim > 2 else tokens.unsqueeze(-1), spec.shape)
        return lowest_first(detail.masked_fill(~free, float("inf"))) < count


def doubt_of(critic: TokenNetwork, spec: TokenSpec, condition: Condition) -> Callable[[Tensor], Tensor]:
    """(B, N, …) tokens of whole images → (B, N) logits of each being wrong. UserError where the network is no critic of such
    tokens."""
    if critic.spec != spec:
        raise UserError(f"the critic reads {critic.spec}, the generator draws {spec}")
    judge = beside(critic, condition)
    text = judge.prepare(condition)

    def doubt(tokens: Tensor) -> Tensor:
        said = judge(TokenState(tokens, torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)), text)
        if said.logits is None or said.logits.shape[2:] != (1,):
            raise UserError("the critic says more of each token than whether it is wrong; name the model of a run with CriticOf")
        return said.logits.squeeze(-1)

    return doubt


def differing_neighbours(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, N, C) values of slots laid out as `shape` → (B, N), the share of the neighbours along each dimension that differ."""
    grid = values.unflatten(1, shape)
    differs, neighbours = torch.zeros(grid.shape[:-1], device=values.device), torch.zeros(shape, device=values.device)
    for dimension in range(1, 1 + len(shape)):
        length = grid.shape[dimension]
        if length < 2:
            continue
        change = (grid.narrow(dimension, 1, length - 1) != grid.narrow(dimension, 0, length - 1)).any(-1).float()
        for start in (0, 1):
            differs.narrow(dimension, start, length - 1).add_(change)
            neighbours.narrow(dimension - 1, start, length - 1).add_(1)
    return (differs / neighbours.clamp(min=1)).flatten(1)
