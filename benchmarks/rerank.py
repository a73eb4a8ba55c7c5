"""What a scorer of candidates is worth: how often the one that it keeps is right.

    python benchmarks/rerank.py [MODEL] --out docs/results/shipped/rerank.json

Draws several candidates of each of some prompts that no score is reported on, and lets several scorers choose: the
likelihood of the tokens given the text in 1, 2, 4 groups (`nar_t2i.inference.Likelihood`), their least likely token, and how
much likelier the text makes them than the null caption does. Beside them: the first candidate, and the best there is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import results
from nar_t2i.evaluation.prompt_generator import generate
from nar_t2i.evaluation.scene_accuracy import verdicts
from nar_t2i.files import write_json
from nar_t2i.generate import shipped_model
from nar_t2i.hardware import describe_machine, fast_precision, usable_cores
from nar_t2i.inference import BestOf, Likelihood
from nar_t2i.noise import Noise
from nar_t2i.pipeline import TextToImage
from nar_t2i.pixels import to_uint8
from nar_t2i.types import Condition, TokenState

BATCH = 32  # prompts


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("model", nargs="?", help="a model folder (default: the one in the package)")
    parser.add_argument("--candidates", type=results.positive, default=4)
    parser.add_argument("--seen", type=results.positive, default=40, help="prompts a category; default: 40")
    parser.add_argument("--held-out", type=results.positive, default=30, help="prompts a category; default: 30")
    parser.add_argument("--out", default="docs/results/shipped/rerank.json")
    parsed = parser.parse_args()
    t2i = TextToImage.from_pretrained(parsed.model or shipped_model())
    inference = t2i.inference.first if isinstance(t2i.inference, BestOf) else t2i.inference
    prompts = generate("seen", parsed.seen, seed=1) + generate("held_out", parsed.held_out, seed=1)
    images: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast_precision() != "32-true"):
        for start in tqdm(range(0, len(prompts), BATCH), unit="batch"):
            texts = [prompt.prompt for prompt in prompts[start : start + BATCH]]
            condition = t2i.text(texts)
            null = repeated(t2i.null(condition), parsed.candidates)
            condition = repeated(condition, parsed.candidates)
            noise = Noise(0, torch.arange(10**6 + start, 10**6 + start + len(texts)))
            tokens = inference.decode(t2i.network, condition, null, noise.copies(parsed.candidates), t2i.guidance).tokens
            images.append(to_uint8(t2i.tokenizer.decode(tokens)))
            same = Noise(0, noise.ids.repeat_interleave(parsed.candidates))
            for name, score in all_scores(t2i, tokens, condition, null, same).items():
                scores.setdefault(name, []).append(score.float())
    pictures = torch.cat(images).permute(0, 2, 3, 1).numpy()
    each = [prompt for prompt in prompts for _ in range(parsed.candidates)]
    right = torch.tensor(verdicts(pictures, each, usable_cores())).view(-1, parsed.candidates).float()
    accuracies = {"the first": right[:, 0].mean().item(), "the best there is": right.amax(1).mean().item()}
    for name, parts in scores.items():
        kept = torch.cat(parts).view(-1, parsed.candidates).argmax(1, keepdim=True)
        accuracies[name] = right.gather(1, kept).mean().item()
    write_json(Path(parsed.out), {
        "command": results.command(), "machine": describe_machine(), "prompts": len(prompts), "candidates": parsed.candidates,
        "accuracy": accuracies,
    })  # fmt: skip
    for name, accuracy in accuracies.items():
        print(f"{accuracy:.3f}  {name}")
    return 0


def repeated(condition: Condition, count: int) -> Condition:
    """(B·count) rows: each as often as it has candidates, which stand together."""
    return condition.map(lambda x: x.repeat_interleave(count, 0))


def all_scores(t2i: TextToImage, tokens: Tensor, condition: Condition, null: Condition, noise: Noise) -> dict[str, Tensor]:
    """By the scorer's name, (B,) scores of (B, N) tokens: the higher, the better. condition and null: a row a candidate."""
    free = torch.ones(tokens.shape[:2], dtype=torch.bool)
    scores = {f"likelihood, {n} groups": Likelihood(n).score(t2i.network, condition, tokens, free, noise) for n in (1, 2, 4)}
    without_text = Likelihood(2).score(t2i.network, null, tokens, free, noise)
    scores["likelier than untold, 2 groups"] = scores["likelihood, 2 groups"] - without_text
    group, worst = (noise.uniform("score", shape=(tokens.shape[1],)) * 2).long(), torch.zeros(len(tokens))
    for hidden in range(2):
        masked = group == hidden
        nll = t2i.network(TokenState(tokens, masked), t2i.network.prepare(condition)).nll(tokens)
        worst = torch.maximum(worst, (nll * masked).amax(1))
    return scores | {"the least likely token, 2 groups": -worst}


if __name__ == "__main__":
    results.program(main)
