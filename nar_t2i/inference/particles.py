"""Many tokens a pass, drawn apart and weighed together, for networks that say how likely a prefix is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.inference.guided import GuidedNetwork, start_state
from nar_t2i.networks.attention import StaticCache
from nar_t2i.networks.predictions import truncation
from nar_t2i.noise import Noise
from nar_t2i.parts import part
from nar_t2i.schedules import Guidance, pass_progress
from nar_t2i.types import Condition, Decoded, InferenceStrategy, Known, Prediction, Step, TokenNetwork, TokenState, over_values


@part
class Particles(InferenceStrategy):
    """One pass a stage of a PrefixDecoder's order, for several candidates of each image at once.

    A pass draws the tokens of its stage apart, each from what stood before the stage. The next pass reads them and says, along
    the way, how likely each was after those before it; the candidates are resampled by the ratio (sequential Monte Carlo, Gordon
    et al. 1993; systematic resampling, Kitagawa 1996). With many candidates, one of them taken at random has the tokens of all
    stages but the last as if they had been drawn one a pass; with one they are drawn apart, as those of the last stage always are.

    candidates: an image. likeliest: the one is kept whose tokens before the last stage are likeliest; False = one at random.
    temperature: of all stages but the last, and of what they are weighed by; final_temperature: of the last; None = the same.
    top_k, top_p: see `Categorical.sample`; weights are of the tempered predictions before that cut. Known tokens are kept, and
    candidates that make them likely stay. `on_step` hears of the kept one, after decoding.
    """

    static = True

    def __init__(
        self,
        candidates: int = 16,
        likeliest: bool = True,
        temperature: float = 1.0,
        final_temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        if candidates < 1:
            raise UserError(f"Particles: candidates must be at least 1, not {candidates}")
        if not temperature > 0:
            raise UserError(f"Particles: temperature must be above 0, not {temperature}")
        if final_temperature is not None and not final_temperature >= 0:
            raise UserError(f"Particles: final_temperature must be at least 0, not {final_temperature}")
        self.candidates, self.likeliest = candidates, likeliest
        self.temperature, self.final_temperature = temperature, temperature if final_temperature is None else final_temperature
        self.truncation = truncation(top_k, top_p)

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
        images, count, length = len(noise.ids), self.candidates, network.spec.length
        if not network.staged:
            raise UserError(f"Particles decodes a PrefixDecoder; {type(network).__name__} has no order in stages")
        stages = [*network.stages, length - sum(network.stages)]

        def each(rows: Tensor) -> Tensor:
            return rows.repeat_interleave(count, 0)

        guided = GuidedNetwork(network, condition.map(each), null.map(each), guidance)
        tokens, unknown = start_state(network.spec, images * count, noise.ids.device, known and Known(*map(each, known)))
        draws, cache = noise.copies(count), StaticCache(length)
        likelihood = torch.zeros(len(tokens), device=tokens.device)  # of what stands so far, each token after those before it
        weights = torch.zeros_like(likelihood)
        before = apart = network.order[:0]
        start = 0
        for step, size in enumerate(stages):
            here = network.order[start : start + size]
            asks = here if step == 0 else here[1:]  # about the first asks the token before it
            slots = torch.cat([before, asks]).expand(len(tokens), -1)
            asked = torch.arange(slots.shape[1], device=slots.device).expand_as(slots) >= len(before)
            said = guided(TokenState(tokens[:, slots[0]], asked, slots), pass_progress(step, len(stages)), cache=cache)
            cache.crop(start)
            if len(before) > 1:
                together = before[1:]  # the first of a stage was drawn from all before it
                likely = self._log_prob(said[:, :-size], tokens[:, together])
                likelihood = likelihood + likely.sum(1)
                weights = weights + (likely - apart[:, 1:] * unknown[:, together]).sum(1)
                rows = resampled(weights.view(images, count), noise.uniform("resampled", step))
                tokens, said, likelihood, weights = tokens[rows], said[rows], likelihood[rows], torch.zeros_like(weights)
                cache.reorder(guided.both(rows))
            said = said[:, -size:]
            last = step == len(stages) - 1
            sampled = said.sample(
                draws.at(step, here.expand(len(tokens), -1)),
                self.final_temperature if last else self.temperature,
                **self.truncation,
            )
            free = over_values(unknown[:, here], sampled.values)
            if last:  # which no later pass weighs: given tokens there are told by what stands before
                told = (self._log_prob(said, tokens[:, here]) * ~unknown[:, here]).sum(1)
                likelihood, weights = likelihood + told, weights + told
            tokens = tokens.index_copy(1, here, torch.where(free, sampled.values, tokens[:, here]))
            if not last:
                apart = self._log_prob(said, tokens[:, here])
                likelihood = likelihood + apart[:, 0]
                weights = weights + apart[:, 0] * ~unknown[:, here][:, 0]
            before, start = here, start + size
        if self.likeliest:
            kept = likelihood.view(images, count).argmax(1)
        else:
            shares = weights.view(images, count).double().softmax(dim=1).cumsum(dim=1)
            kept = torch.searchsorted(shares, noise.uniform("kept")[:, None].double()).clamp(max=count - 1)[:, 0]
        tokens = tokens[kept + torch.arange(images, device=kept.device) * count]
        if on_step:
            self._tell(on_step, network.order, stages, tokens, known)
        return Decoded(tokens, guided.passes, guided.rows * count)

    def _log_prob(self, said: Prediction, tokens: Tensor) -> Tensor:
        """(*slots) of the tempered prediction."""
        return -said.tempered(self.temperature).nll(tokens)

    @staticmethod
    def _tell(on_step: Callable[[Step], None], order: Tensor, stages: list[int], tokens: Tensor, known: Known | None) -> None:
        start = 0
        for step, size in enumerate(stages):
            start += size
            masked = torch.ones_like(tokens[..., 0] if tokens.ndim > 2 else tokens, dtype=torch.bool)
            masked[:, order[:start]] = False
            on_step(Step(step, tokens, masked if known is None else masked & ~known.mask))


def resampled(weights: Tensor, uniform: Tensor) -> Tensor:
    """(B · P,) the rows that take the places of all: of each image, particle i about as often as exp(weights[i]) says, P in all.
    weights: (B, P) log-weights. uniform: (B,)."""
    images, count = weights.shape
    shares = weights.double().softmax(dim=1).cumsum(dim=1)
    places = (uniform[:, None] + torch.arange(count, device=weights.device)) / count
    chosen = torch.searchsorted(shares, places.double()).clamp(max=count - 1)
    return (chosen + torch.arange(images, device=weights.device)[:, None] * count).flatten()
