"""Pictures of scene prompts, and their scene accuracy, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nar_t2i.evaluation import scene_accuracy
from nar_t2i.evaluation.scene_prompts import ScenePrompt
from nar_t2i.pipeline import Samples, TextToImage
from nar_t2i.pixels import to_arrays


class Drawn(NamedTuple):
    """images: (n, S, S, 3) uint8. passes, rows: see Samples. seconds: of drawing all. truncated: share of the prompts.
    settings: how they were drawn."""

    images: np.ndarray
    passes: int
    rows: int
    seconds: float
    truncated: float
    settings: dict[str, Any]


class Sampler:
    """A pipeline that draws as it is asked to.

    steps, guidance_scale, candidates: None keeps the pipeline's; UserError where it has no such setting. bf16: draw under
    autocast. batch_size: pictures at once, candidates counted.
    """

    def __init__(
        self,
        t2i: TextToImage,
        steps: int | None = None,
        guidance_scale: float | None = None,
        candidates: int | None = None,
        bf16: bool = False,
        batch_size: int = 64,
    ):
        self.t2i = t2i.with_decoding(steps, guidance_scale, candidates=candidates)
        self._steps, self._bf16, self._batch_size = steps, bf16, batch_size

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Samples:
        with torch.autocast(self.t2i.device.type, torch.bfloat16, enabled=self._bf16):
            return self.t2i.sample(prompts, seed=seeds, batch_size=self._batch_size)

    def settings(self, seed: int) -> dict[str, Any]:
        """How it draws, as it was asked to or by itself, from `seed` on."""
        inference = self.t2i.inference
        return {
            "precision": "bf16" if self._bf16 else "fp32",
            "bits": 16 if self._bf16 else 32,
            "steps": getattr(getattr(inference, "first", inference), "steps", None) if self._steps is None else self._steps,
            "candidates": getattr(inference, "candidates", 1),
            "guidance_scale": self.t2i.guidance.scale,
            "seed": seed,
        }


def draw_prompts(
    t2i: TextToImage,
    prompts: Sequence[ScenePrompt],
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    bf16: bool = False,
    workers: int = 1,
    name: str = "prompts",
    candidates: int | None = None,
) -> Drawn:
    """One picture a prompt, of seed `seed` + the prompt's index.

    bf16: generate under autocast. workers: on a CPU, batches that are drawn side by side. passes: of the longest batch.
    """
    start = time.perf_counter()
    encoded, truncated = t2i.text.encoded, t2i.text.truncated
    sampler = Sampler(t2i, steps, guidance_scale, candidates, bf16, batch_size)

    def draw(first: int) -> Samples:
        texts = [p.prompt for p in prompts[first : first + batch_size]]
        return sampler(texts, range(seed + first, seed + first + len(texts)))

    starts = range(0, len(prompts), batch_size)
    bar = {"desc": name, "unit": "batch", "mininterval": 0.5, "total": len(starts)}
    with side_by_side(workers if t2i.device.type == "cpu" else 1) as map_each:
        drawn = list(tqdm(map_each(draw, starts), **bar))
    return Drawn(
        np.concatenate([to_arrays(sampled.images) for sampled in drawn]),
        max(sampled.passes for sampled in drawn),
        max(sampled.rows for sampled in drawn),
        time.perf_counter() - start,
        (t2i.text.truncated - truncated) / max(1, t2i.text.encoded - encoded),
        sampler.settings(seed),
    )


def evaluate_prompts(
    t2i: TextToImage, prompts: Sequence[ScenePrompt], workers: int = 1, **asked: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """`draw_prompts`, which takes what is `asked`, and their scores. workers: processes of the detector, too.

    Returns (accuracy, shuffled, chance, decoder passes, …) and the pictures, (n, S, S, 3) uint8.
    """
    drawn = draw_prompts(t2i, prompts, workers=workers, **asked)
    found = scene_accuracy.detect_all(drawn.images, workers)
    result = {
        "accuracy": scene_accuracy.score(found, prompts),
        "shuffled": {**scene_accuracy.shuffled(found, prompts), "chance": scene_accuracy.chance(prompts)},
        "decoder_passes": drawn.passes,
        "decoder_rows": drawn.rows,
        "truncated_prompts": drawn.truncated,
        "images_per_second": len(drawn.images) / drawn.seconds,
        **drawn.settings,
    }
    return result, drawn.images


@contextmanager
def side_by_side(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over threads of one core each, which small batches keep busier than all cores at one of them."""
    if workers == 1:
        yield map
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(before)  # which the threads have set for some kernels of this one, too


def generator_metrics(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The `generator` part of metrics.json. results: of `evaluate_prompts`, by the name of their prompts.

    "shuffled" is that of the first.
    """
    first = next(iter(results.values()))
    accuracy = {name: result["accuracy"] for name, result in results.items()}
    rest = {key: value for key, value in first.items() if key not in ("accuracy", "shuffled")}
    return {"scene_accuracy": {**accuracy, "shuffled": first["shuffled"]}, **rest}
