"""The strategies that ask a judge, as plain as can be (see eager.py): a critic that revokes, a scorer that chooses."""

import copy

import torch

from nar_t2i.noise import gumbel
from nar_t2i.schedules import mask_ratio
from nar_t2i.types import TokenState
from tests.inference.eager import Eager


class EagerCritic(Eager):
    def decode(self, strategy, known=None):
        tokens, free = torch.zeros(self.n).long(), torch.ones(self.n).bool()
        if known is not None:
            tokens, free = torch.where(known.mask[0], known.tokens[0], tokens), ~known.mask[0]
        masked, total, protected, stay = free.clone(), int(free.sum()), set(), int(free.sum())
        text = strategy.critic.prepare(self.texts[0])
        strategy = copy.copy(strategy)
        strategy.steps = min(strategy.steps, total)
        for step in range(strategy.steps):
            if stay == 0:
                break
            log_probs = self.log_probs(tokens, masked, step / max(strategy.steps - 1, 1))
            values, stood = self.draw(log_probs, step, strategy.temperature, **strategy.truncation), ~masked & free
            tokens = torch.where(masked, values, tokens)
            if step + 1 == strategy.steps:
                break
            ratio = float(mask_ratio(strategy.schedule, torch.tensor((step + 1) / strategy.steps, dtype=torch.float64)))
            stay = max(min(int(total * ratio + 1e-9), stay - 1), 0)
            wrong = strategy.critic(TokenState(tokens[None], torch.zeros(1, self.n).bool()), text).logits[0, :, 0]
            luck = gumbel(self.uniform("choice", step)) * strategy.choice_temperature * (1 - (step + 1) / strategy.steps)
            score = (1 - wrong.sigmoid()).log() + luck
            slots = [slot for slot in range(self.n) if free[slot]]
            least = sorted(slots, key=lambda slot: (self.detail(tokens, slot), slot))[: round(strategy.persistent * total)]
            protected |= {slot for slot in least if stood[slot]}
            order = sorted(slots, key=lambda slot: (slot not in protected, 0 if slot in protected else -float(score[slot]), slot))
            masked = free.clone()
            masked[order[: total - stay]] = False
        return tokens

    def detail(self, tokens, slot):
        rows, columns = self.network.spec.shape
        row, column = divmod(slot, columns)
        beside = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        beside = [r * columns + c for r, c in beside if 0 <= r < rows and 0 <= c < columns]
        return sum(int(tokens[slot] != tokens[other]) for other in beside) / len(beside)


def eager_best_of(strategy, eager, known=None):
    """`eager` decodes for the first candidate, whose noise the copies are made of."""
    noise, free = eager.noise, torch.ones(eager.n).bool() if known is None else ~known.mask[0]
    found, scores = [], []
    for number in range(strategy.candidates):
        eager.noise = OneCopy(noise, number)
        tokens = eager.decode(strategy.first, known)
        score = 0.0
        for split in range(strategy.scorer.splits):
            group = (noise.uniform("score", split, (eager.n,))[0] * strategy.scorer.groups).long()
            for slot in range(eager.n):
                if free[slot]:
                    state = TokenState(tokens[None], (free & (group == group[slot]))[None])
                    told = eager.network(state, eager.network.prepare(eager.texts[0])).logits[0, slot]
                    score += float(told.log_softmax(-1)[tokens[slot]])
        found.append(tokens)
        scores.append(score)
    eager.noise = noise
    return found[max(range(len(scores)), key=scores.__getitem__)]


class OneCopy:
    """One row of the noise of many copies."""

    def __init__(self, noise, number):
        self.all, self.number = noise.copies(number + 1), number

    def at(self, step, positions):
        return _Row(self.all.at(step, positions.expand(len(self.all.ids), -1)), self.number)

    def uniform(self, stream, step=0, shape=()):
        return self.all.uniform(stream, step, shape)[self.number :]


class _Row:
    def __init__(self, slots, number):
        self.slots, self.number = slots, number

    def uniform(self, stream):
        return self.slots.uniform(stream)[self.number :]
