"""What a network of learning/prefixes knows: how much drawing a stage apart loses, which prompts go wrong, and whether its own
likelihood tells right drawings from wrong ones.

    python benchmarks/prefix_stages.py runs/long-ablation/runs/0/prefixes/model --prompts 40 --drawings 8

Nats are of validation scenes' tokens given their captions, without guidance. Prompts are those that decoding is tuned on, as many
a category; drawings are of the kinds with several objects, by the recipe's settings, and the likeliest of them by all that is drawn
before the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks import results
from nar_t2i import recipe
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.errors import UserError
from nar_t2i.evaluation.prompt_generator import generate
from nar_t2i.evaluation.scene_accuracy import verdicts
from nar_t2i.evaluation.scene_prompts import CATEGORIES, ScenePrompt
from nar_t2i.hardware import fast_precision, usable_cores
from nar_t2i.networks import PrefixDecoder
from nar_t2i.parts import build, changed
from nar_t2i.pipeline import TextToImage
from nar_t2i.pixels import to_float
from nar_t2i.schedules import Guidance
from nar_t2i.types import Condition, TokenState

SEVERAL = ("two_objects", "counting", "color_attribution")


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("model", metavar="FOLDER")
    parser.add_argument("--scenes", type=results.positive, default=128)
    parser.add_argument("--prompts", type=results.positive, default=40, help="a category; default: 40")
    parser.add_argument("--drawings", type=results.whole, default=0, help="of each prompt with several objects; default: none")
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe's Particles, or guidance_scale")
    parsed = parser.parse_args()
    t2i = TextToImage.from_pretrained(parsed.model)
    if not isinstance(t2i.network, PrefixDecoder):
        raise UserError(f"{parsed.model}: {type(t2i.network).__name__} has no order in stages")
    model = recipe.load("learning/prefixes").config["model"]["init_args"]
    changes = {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in parsed.change)}
    t2i.guidance = Guidance(**model["guidance"] | {"scale": changes.pop("guidance_scale", model["guidance"]["scale"])})
    t2i.inference = changed(build(model["inference"]), **changes)
    print_nats(t2i, parsed.scenes)
    prompts = generate("seen", parsed.prompts, seed=1)
    right = drawn(t2i, prompts, 10**6)[0]
    of = {kind: right[[p.category == kind for p in prompts]].mean() for kind in CATEGORIES}
    print(f"right: {right.mean():.3f} of {len(prompts)}; " + ", ".join(f"{kind} {share:.2f}" for kind, share in of.items()))
    if parsed.drawings:
        several = [p for p in prompts if p.category in SEVERAL]
        drawings = [drawn(t2i, several, 10**6 + 1000 * number) for number in range(parsed.drawings)]
        verdict, likelihood = (np.array(of_drawings) for of_drawings in zip(*drawings, strict=True))
        picked = verdict[likelihood.argmax(0), np.arange(len(several))]
        print(
            f"of {parsed.drawings} drawings of {len(several)} prompts: each right in {verdict.mean():.3f}, the likeliest in "
            f"{picked.mean():.3f}, any in {verdict.max(0).mean():.3f}"
        )
    return 0


@torch.no_grad()
def print_nats(t2i: TextToImage, count: int) -> None:
    """A line a stage: the sum over its slots but the first, each given what stood before the stage, and each given the one before
    it, too; of the last stage, which is never read, the former alone."""
    network, source = t2i.network, RenderedScenes("validation", count, image_size=t2i.tokenizer.image_size)
    samples = [source.read(index) for index in range(count)]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    tokens, condition = t2i.tokenizer.encode(to_float(images)).tokens, t2i.text([sample.captions[0] for sample in samples])
    lesson = network.lesson
    about = network.about(lesson.slots, lesson.asked)
    nats = network(network.along(lesson, tokens), network.prepare(condition)).nll(tokens[:, about]).mean(0)
    given_before = together(t2i, tokens, condition).mean(0)[network.order]
    start, stages = 0, [*network.stages, network.spec.length - sum(network.stages)]
    for number, (size, questions) in enumerate(zip(stages, lesson.questions, strict=True)):
        line = f"stage of {size}: {nats[questions.start : questions.stop].sum():.2f} nats apart"
        if number < len(stages) - 1:
            line += f", {given_before[start + 1 : start + size].sum():.2f} together"
        print(line)
        start += size
    print(f"all that is read, token by token: {given_before[: sum(network.stages)].sum():.2f} nats")


def together(t2i: TextToImage, tokens: Tensor, condition: Condition) -> Tensor:
    """(B, N) negative log-likelihoods, each token given those before it that are read."""
    state = TokenState(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    return t2i.network(state, t2i.network.prepare(condition)).nll(tokens)


@torch.no_grad()
def drawn(t2i: TextToImage, prompts: Sequence[ScenePrompt], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts and log-likelihoods, one a prompt."""
    texts = [p.prompt for p in prompts]
    with torch.autocast(t2i.device.type, torch.bfloat16, enabled=fast_precision() != "32-true"):
        sampled = t2i.sample(texts, seed=seed, batch_size=1024)
    likelihood = -together(t2i, sampled.tokens, t2i.text(texts))[:, t2i.network.order[: sum(t2i.network.stages)]].sum(1)
    right = verdicts(sampled.images.permute(0, 2, 3, 1).numpy(), prompts, usable_cores())
    return np.array(right, dtype=float), likelihood.numpy()


if __name__ == "__main__":
    results.program(main)
