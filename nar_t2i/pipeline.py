"""TextToImage: prompts in, images out; saved to and loaded from one folder.

model/
  config.json   format version, inference strategy, guidance
  tokenizer/ text/ null/ network/   a part folder each (nar_t2i.folders)
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.files import read_json, write_json
from nar_t2i.folders import load_part, save_part, told_otherwise
from nar_t2i.inference.best_of import BestOf
from nar_t2i.inference.graphs import Graphs
from nar_t2i.noise import Noise
from nar_t2i.parts import build, changed, describe
from nar_t2i.pixels import to_pil, to_uint8
from nar_t2i.schedules import Guidance
from nar_t2i.text.null import NullCaption
from nar_t2i.types import Condition, InferenceStrategy, Known, Step, TextEncoder, TokenCodec, TokenNetwork

FORMAT = 1
PARTS = ("tokenizer", "text", "null", "network")


class Samples(NamedTuple):
    """images: (n, 3, H, W) uint8. tokens: (n, N, …). passes: network calls an image. rows: row evaluations an image."""

    images: Tensor
    tokens: Tensor
    passes: int
    rows: int


class TextToImage:
    """A tokenizer, a text encoder, the null caption, a network, and how to decode by default.

    `t2i(prompts, steps=16, guidance_scale=3.0, seed=0)` gives PIL images; `sample` gives tensors and counts. graphs: recorded
    decodings, which a loaded pipeline uses on a CUDA device; None = each pass is launched by itself.
    """

    def __init__(
        self,
        tokenizer: TokenCodec,
        text: TextEncoder,
        null: NullCaption,
        network: TokenNetwork,
        inference: InferenceStrategy,
        guidance: Guidance,
    ):
        self.tokenizer, self.text, self.null, self.network = tokenizer, text, null, network
        self.inference, self.guidance = inference, guidance
        self.graphs: Graphs | None = None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], trusted: tuple[str, ...] = ()) -> TextToImage:
        """Load a saved pipeline. Runs no code of the folder's and downloads nothing; UserError where it is not whole.

        trusted: further packages whose classes the folder may name.
        """
        folder = Path(folder)
        told_otherwise(folder)
        config = read_json(folder / "config.json")
        if isinstance(config, dict) and "class_path" in config:
            raise UserError(
                f"{folder}: a {str(config['class_path']).rpartition('.')[2]} alone, which draws no pictures; name a "
                "generator's model"
            )
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise UserError(f"{folder / 'config.json'}: not a pipeline of format {FORMAT}")
        parts = {name: load_part(folder / name, trusted) for name in PARTS}
        for (name, part), kind in zip(parts.items(), (TokenCodec, TextEncoder, NullCaption, TokenNetwork), strict=True):
            if not isinstance(part, kind):
                raise UserError(f"{folder / name}: a {type(part).__name__}, and no {kind.__name__}")
        try:
            inference, guidance = (build(config[name], trusted) for name in ("inference", "guidance"))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'config.json'}: inference and guidance cannot be built: {error}") from error
        if not (isinstance(inference, InferenceStrategy) and isinstance(guidance, Guidance)):
            raise UserError(f"{folder / 'config.json'}: inference and guidance must name a strategy and a Guidance")
        t2i = cls(**parts, inference=inference, guidance=guidance)
        t2i.graphs = Graphs()  # while a network is trained, its weights move, and memory is short
        return t2i

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a self-contained folder. dtype: of the stored weights; loading always gives float32."""
        folder = Path(folder)
        (folder / "config.json").unlink(missing_ok=True)  # written last: without it parts of two models are not taken for one
        for name in PARTS:
            save_part(getattr(self, name), folder / name, dtype)
        config = {"format": FORMAT, "inference": describe(self.inference), "guidance": describe(self.guidance)}
        write_json(folder / "config.json", config)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> TextToImage:
        """Move or cast all parts."""
        for name in PARTS:
            getattr(self, name).to(device=device, dtype=dtype)
        self.graphs = self.graphs and Graphs()
        return self

    def compile(self) -> TextToImage:
        """Have torch.compile fuse what the network computes. The first images then take some seconds longer, or a minute where
        the network has no `stack`, and again with another number of them at once; a C++ compiler is needed. Tokens are equal up
        to rounding."""
        for part in self.network.stack or [self.network]:
            part.compile()
        self.graphs = self.graphs and Graphs()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __call__(
        self,
        prompts: str | Sequence[str],
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompts: str | Sequence[str] | None = None,
        known: Known | None = None,
        on_step: Callable[[Step], None] | None = None,
        batch_size: int = 64,
        candidates: int | None = None,
    ) -> list[Image.Image]:
        """PIL images, one a prompt. See `sample` for the arguments."""
        samples = self.sample(
            prompts, steps, guidance_scale, temperature, seed, negative_prompts, known, on_step, batch_size, candidates
        )
        return to_pil(samples.images)

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str],
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: int | Sequence[int] = 0,
        negative_prompts: str | Sequence[str] | None = None,
        known: Known | None = None,
        on_step: Callable[[Step], None] | None = None,
        batch_size: int = 64,
        candidates: int | None = None,
    ) -> Samples:
        """Generate.

        steps, guidance_scale, temperature: None keeps the pipeline's. seed: image i of an integer seed s is the image of
        seed s + i alone; a sequence gives each image its own. negative_prompts: take the null caption's place in
        guidance. known: tokens to keep, a row a prompt. on_step: called after every step of every batch.
        batch_size: images that are decoded at once. candidates: images to draw of each prompt, of which the one stays that
        the network finds likeliest (BestOf); None keeps the pipeline's.

        Images come in the order of the prompts. Raises UserError where lengths differ, this strategy has no such setting, or a
        seed is no 64-bit integer.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("no prompt was given")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        seeds = seeds_of(seed, len(prompts))
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts] * len(prompts)
        if negative_prompts and len(negative_prompts) != len(prompts):
            raise UserError(f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts")
        if known is not None and len(known.mask) != len(prompts):
            raise UserError(f"known tokens of {len(known.mask)} images for {len(prompts)} prompts")
        inference, guidance = self.decoding(steps, guidance_scale, temperature, candidates)
        for name in PARTS:
            getattr(self, name).eval()
        images, tokens = [], []
        passes = rows_an_image = 0
        at_once = max(1, batch_size // getattr(inference, "candidates", 1))
        for start in range(0, len(prompts), at_once):
            rows = slice(start, start + at_once)
            condition = self.text(prompts[rows])
            null = self._null(condition, negative_prompts and negative_prompts[rows])
            noise = Noise(0, seeds[rows].to(self.device), _precision(self.network))
            given = known and Known(known.mask[rows], known.tokens[rows])
            if self.graphs and given is None and on_step is None and self.device.type == "cuda":
                decoded = self.graphs.decode(inference, self.network, condition, null, noise, guidance)
            else:
                decoded = inference.decode(self.network, condition, null, noise, guidance, given, on_step)
            passes, rows_an_image = max(passes, decoded.passes), max(rows_an_image, decoded.rows)
            tokens.append(decoded.tokens)
            images.append(to_uint8(self.tokenizer.decode(decoded.tokens, condition=condition)))
        return Samples(torch.cat(images), torch.cat(tokens), passes, rows_an_image)

    def _null(self, condition: Condition, negative_prompts: list[str] | None) -> Condition:
        return self.text(negative_prompts) if negative_prompts else self.null(condition)

    def with_decoding(
        self,
        steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        candidates: int | None = None,
    ) -> TextToImage:
        """This pipeline, with the same parts, that decodes so where it is not asked otherwise. See `sample` for the arguments.

        Other settings make another strategy, which may read a critic's folder: for many calls of `sample`, made once.
        """
        other = copy.copy(self)
        other.inference, other.guidance = self.decoding(steps, guidance_scale, temperature, candidates)
        return other

    def decoding(
        self, steps: int | None, guidance_scale: float | None, temperature: float | None, candidates: int | None
    ) -> tuple[InferenceStrategy, Guidance]:
        """The default strategy and guidance, or those of their kind with other settings. UserError where there are none such."""
        guidance, inference = self.guidance, self.inference
        if guidance_scale is not None:
            guidance = replace(guidance, scale=guidance_scale)
        if candidates == 1 and isinstance(inference, BestOf):
            inference = inference.first
        elif candidates is not None and hasattr(inference, "candidates"):
            inference = changed(inference, candidates=candidates)
        elif candidates is not None and candidates != 1:
            inference = BestOf(inference, candidates)
        for name, value in (("steps", steps), ("temperature", temperature)):
            inference = inference if value is None else _with(inference, name, value)
        return inference, guidance


def _with(inference: InferenceStrategy, name: str, value: Any) -> InferenceStrategy:
    """The strategy with `name` set to `value`; where it wraps another one (`first`), that one, too."""
    changes = {name: value} if _takes(inference, name) else {}
    if changes and name == "temperature" and _takes(inference, "final_temperature"):
        changes["final_temperature"] = None  # of all draws
    if _takes(inference, "first") and (not changes or _takes(inference.first, name)):
        changes["first"] = _with(inference.first, name, value)
    if not changes:
        raise UserError(f"{type(inference).__name__} has no {name}")
    return changed(inference, **changes)


def _takes(inference: InferenceStrategy, name: str) -> bool:
    """Whether a strategy is made with such an argument, or passes it on to the one that it is a kind of."""
    made = type(inference).__init__
    parameters = {} if made is object.__init__ else inspect.signature(made).parameters
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return name in parameters or (passes_on and hasattr(inference, name))


def seeds_of(seed: int | Sequence[int], count: int) -> Tensor:
    """(count,) int64: from an integer on, or as they are given."""
    try:
        seeds = [int(s) for s in seed] if isinstance(seed, Sequence) else [int(seed) + i for i in range(count)]
        as_tensor = torch.tensor(seeds, dtype=torch.int64)
    except (OverflowError, RuntimeError, ValueError, TypeError):
        raise UserError(f"seed {seed} is no whole number of 64 bits, nor a list of such") from None
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} prompts")
    return as_tensor


def _precision(network: torch.nn.Module) -> torch.dtype:
    """Noise in float64 for a float64 network, else float32."""
    return torch.float64 if next(network.parameters()).dtype == torch.float64 else torch.float32
