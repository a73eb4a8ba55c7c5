"""The strategies once more, as plain as can be: one image at a time, all logits of both rows in every pass, no gather."""

import copy

import torch

from nar_t2i.inference import (
    Confidence,
    EntropyBounded,
    GibbsSweeps,
    Halton,
    Moment,
    ProgressiveStages,
    Purity,
    RandomOrder,
)
from nar_t2i.inference.halton import halton_order
from nar_t2i.noise import gumbel
from nar_t2i.schedules import mask_ratio
from nar_t2i.types import TokenState


class Eager:
    def __init__(self, network, condition, null, noise, guidance):
        self.network, self.texts, self.noise, self.guidance = network, (condition, null), noise, guidance
        self.n = network.spec.length
        self.uniform = lambda stream, step: self.noise.at(step, torch.arange(self.n)[None]).uniform(stream)[0]

    def log_probs(self, tokens, masked, progress):
        state = TokenState(tokens[None], masked[None])
        c, u = (self.network(state, self.network.prepare(x)).logits[0] for x in self.texts)
        s = self.guidance.at(progress)
        return (u + s * (c - u)).log_softmax(-1)

    def draw(self, log_probs, step, temperature, top_k=0, top_p=1.0):
        values, u = [], self.uniform("value", step)
        for slot, row in enumerate(log_probs):
            t = float(temperature if isinstance(temperature, float) else temperature[slot])
            p = (row / t).softmax(-1) if t else torch.eye(len(row), dtype=row.dtype)[row.argmax()]
            likeliest = sorted(range(len(p)), key=lambda code: -p[code])
            allowed = [c for i, c in enumerate(likeliest) if p[likeliest[:i]].sum() < top_p and (not top_k or i < top_k)]
            p = torch.stack([p[c] if c in allowed else p[c] * 0 for c in range(len(p))])
            values.append(int((p.cumsum(0) < u[slot] * p.sum()).sum()))
        return torch.tensor(values)

    def decode(self, strategy, known=None):
        tokens, masked = torch.zeros(self.n).long(), torch.ones(self.n).bool()
        if known is not None:
            tokens, masked = torch.where(known.mask[0], known.tokens[0], tokens), ~known.mask[0]
        if isinstance(strategy, GibbsSweeps):
            return self.gibbs(strategy, self.decode(strategy.first, known), masked)
        if isinstance(strategy, EntropyBounded):
            return self.entropy_bounded(strategy, tokens, masked)
        free, unknown, left = masked.clone(), int(masked.sum()), int(masked.sum())
        if not isinstance(strategy, ProgressiveStages):
            strategy = copy.copy(strategy)
            strategy.steps = min(strategy.steps, unknown)
        for step in range(strategy.steps):
            if left == 0 and not (isinstance(strategy, ProgressiveStages) and unknown):  # which revises to the end
                break
            progress = step / max(strategy.steps - 1, 1)
            ratio = float(mask_ratio(strategy.schedule, torch.tensor((step + 1) / strategy.steps, dtype=torch.float64)))
            stay = max(min(int(unknown * ratio + 1e-9), left - 1), 0) if step + 1 < strategy.steps else 0
            log_probs = self.log_probs(tokens, masked, progress if strategy.steps > 1 else None)
            change = 0 if strategy.final_temperature is None else strategy.final_temperature - strategy.temperature
            temperature = strategy.temperature + change * progress
            luck = gumbel(self.uniform("choice", step))
            if isinstance(strategy, RandomOrder):
                score = -self.noise.uniform("order", shape=(self.n,))[0]
            elif isinstance(strategy, Halton):
                score = [-halton_order(self.network.spec.shape).index(slot) for slot in range(self.n)]
            elif isinstance(strategy, Purity):
                purity = log_probs.exp().amax(-1)
                score, temperature = purity.log() + luck, temperature / (1 + strategy.sharpness * purity)
            elif isinstance(strategy, Moment):
                beta = 1 + 1 / (strategy.choice_temperature * max(1 - (step + 1) / strategy.steps, 1 / strategy.steps))
                score, temperature = (log_probs * beta).exp().sum(-1).log() + luck, temperature / beta
            values = self.draw(log_probs, step, temperature, **strategy.truncation)
            own = log_probs[torch.arange(self.n), values]
            if isinstance(strategy, ProgressiveStages):
                score, standing = own, [s for s in range(self.n) if free[s] and not masked[s]]
                standing.sort(key=lambda slot: float(log_probs[slot, tokens[slot]]))
                again = standing[: round(strategy.revise * len(standing))]
                tokens[again] = values[again]
            if isinstance(strategy, Confidence):
                score = own + strategy.choice_temperature * (1 - (step + 1) / strategy.steps) * luck
            order = sorted((slot for slot in range(self.n) if masked[slot]), key=lambda slot: (-float(score[slot]), slot))
            kept = order[: left - stay]
            tokens[kept], masked[kept], left = values[kept], False, stay
        return tokens

    def entropy_bounded(self, strategy, tokens, masked):
        for step in range(strategy.most_steps):
            if not masked.any():
                break
            log_probs = self.log_probs(tokens, masked, step / max(strategy.most_steps - 1, 1))
            values, entropy = self.draw(log_probs, step, strategy.temperature), -(log_probs.exp() * log_probs).sum(-1)
            order = sorted((slot for slot in range(self.n) if masked[slot]), key=lambda slot: float(entropy[slot]))
            for place, slot in enumerate(order):
                if entropy[order[:place]].sum() <= strategy.bound or step == strategy.most_steps - 1:
                    tokens[slot], masked[slot] = values[slot], False
        return tokens

    def gibbs(self, strategy, tokens, unknown):
        for sweep in range(strategy.sweeps):
            order = self.noise.uniform("gibbs order", sweep, (self.n,))[0]
            queue = sorted((slot for slot in range(self.n) if unknown[slot]), key=lambda slot: float(order[slot]))
            for start in range(0, len(queue), strategy.block):
                block = queue[start : start + strategy.block]
                masked = torch.isin(torch.arange(self.n), torch.tensor(block))
                log_probs = self.log_probs(tokens, masked, 1.0)
                tokens[block] = self.draw(log_probs, -1 - sweep * self.n - start, strategy.temperature)[block]
        return tokens
