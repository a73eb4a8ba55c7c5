"""Drawing several candidates of each image and keeping the one that a scorer likes best."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.folders import frozen_network
from nar_t2i.inference.confidence import Confidence
from nar_t2i.inference.critic_guided import doubt_of
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance
from nar_t2i.types import Condition, Decoded, InferenceStrategy, Known, Step, TokenNetwork, TokenState


class Scorer:
    """Says how good whole images are, in one network call. static: see InferenceStrategy."""

    static: bool = False

    def rows(self, network: TokenNetwork) -> int:
        """Row evaluations an image."""
        return 1

    def score(self, network: TokenNetwork, condition: Condition, tokens: Tensor, free: Tensor, noise: Noise) -> Tensor:
        """(B,), higher is better. network: the generator. tokens: (B, N, …). free: (B, N), True where they were drawn."""
        raise NotImplementedError


@part
class Likelihood(Scorer):
    """How likely the generator itself finds the tokens, given the text.

    The drawn slots fall into `groups` at random, each of which is hidden once and predicted from the others: a
    pseudo-likelihood (Besag, 1975). What decoding drew apart is so seen together. splits: how many times the groups are drawn
    anew, for a mean that depends less on how they fell. All groups of all splits are rows of one pass. A causal network gives
    the likelihood itself, in one row whatever these are. (How much likelier the text makes the tokens than the null caption
    does was tried as well and chose no better than chance: docs/results/shipped.)
    """

    static = True

    def __init__(self, groups: int = 2, splits: int = 1):
        if groups < 1 or splits < 1:
            raise UserError(f"Likelihood: groups {groups} and splits {splits} must be at least 1")
        self.groups, self.splits = groups, splits

    def rows(self, network: TokenNetwork) -> int:
        return 1 if network.causal else self.groups * self.splits

    def score(self, network: TokenNetwork, condition: Condition, tokens: Tensor, free: Tensor, noise: Noise) -> Tensor:
        rows, length = self.rows(network), (network.spec.length,)
        if network.causal:
            # It sees only what stands before, so that what is given behind the drawn tokens tells of them, too.
            asked, masked = torch.ones_like(free), torch.zeros_like(free)
        else:
            split = [(noise.uniform("score", number, length) * self.groups).long() for number in range(self.splits)]
            groups = [free & (group == hidden) for group in split for hidden in range(self.groups)]
            asked = masked = torch.stack(groups, 1).flatten(0, 1)

        def each(of_image: Tensor) -> Tensor:
            return of_image.repeat_interleave(rows, 0)

        whole = each(tokens)
        slots = torch.arange(network.spec.length, device=tokens.device).expand(len(whole), -1)
        prediction = network(TokenState(whole, masked), network.prepare(condition.map(each)), slots)
        nll = prediction.nll(whole, noise.repeated(rows).at(0, slots)) * asked
        return -nll.view(len(tokens), -1).sum(1) / (1 if network.causal else self.splits)


@part
class CriticScore(Scorer):
    """The mean log-probability, of a critic (CriticOf), that a drawn token is right. critic: see CriticGuided."""

    def __init__(self, critic: str | TokenNetwork):
        self.critic = frozen_network(critic)
        self.static = self.critic.static

    def score(self, network: TokenNetwork, condition: Condition, tokens: Tensor, free: Tensor, noise: Noise) -> Tensor:
        wrong = doubt_of(self.critic, network.spec, condition)(tokens)
        return -(torch.nn.functional.softplus(wrong) * free).sum(1) / free.sum(1).clamp(min=1)


@part
class BestOf(InferenceStrategy):
    """Another strategy's tokens, drawn `candidates` times, of which the scorer keeps one; of equals the first.

    All candidates of a batch are decoded at once. The first is the image that `first` alone would draw, so that one candidate
    changes nothing. `on_step` hears of the kept candidates, after decoding.
    """

    def __init__(
        self,
        first: InferenceStrategy = Confidence(),
        candidates: int = 4,
        scorer: Scorer = Likelihood(),
    ):
        if candidates < 1:
            raise UserError(f"BestOf: candidates must be at least 1, not {candidates}")
        self.static = first.static and scorer.static
        self.first, self.candidates, self.scorer = first, candidates, scorer

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
        def each(rows: Tensor) -> Tensor:
            return rows.repeat_interleave(self.candidates, 0)

        condition, null = condition.map(each), null.map(each)
        given = known and Known(*map(each, known))
        steps: list[Step] = []
        drawn = self.first.decode(
            network, condition, null, noise.copies(self.candidates), guidance, given, on_step and steps.append
        )
        passes, rows = drawn.passes, drawn.rows * self.candidates
        free = ~given.mask if given else torch.ones(drawn.tokens.shape[:2], dtype=torch.bool, device=drawn.tokens.device)
        best = torch.arange(0, len(free), self.candidates, device=free.device)
        if drawn.passes and self.candidates > 1:
            # All candidates of an image are asked the same questions.
            score = self.scorer.score(network, condition, drawn.tokens, free, noise.repeated(self.candidates))
            best = best + score.view(-1, self.candidates).argmax(1)
            passes, rows = passes + 1, rows + self.scorer.rows(network) * self.candidates
        if on_step:
            for step in steps:
                on_step(Step(step.step, step.tokens[best], step.masked[best]))
        return Decoded(drawn.tokens[best], passes, rows)
