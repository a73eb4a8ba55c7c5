"""What text encoders of `transformers` share: opening a folder, tokenizing, freezing, and travelling with a pipeline.

A new kind is a subclass that names its model class and configuration and says how its states are made.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nar_t2i.errors import UserError
from nar_t2i.files import temporary_name
from nar_t2i.hashing import text_hash, weights_hash
from nar_t2i.text.layers import choose_trained, copied, mean_state, readable
from nar_t2i.types import Condition, TextEncoder

SAVED = "pretrained"  # the folder inside of a saved part
WEIGHTS = "weights.safetensors"  # beside it


class PretrainedTextEncoder(TextEncoder):
    """Captions → states (B, L, width) and a pooled state; a subclass says which.

    folder: a local folder as `transformers` saves it, or a hub name that is in the local Hugging Face cache, or the text
        encoder's folder of a saved pipeline, RUN/model/text. Nothing is ever downloaded. A saved pipeline holds a copy.
    pretrained: False takes the same architecture with random weights, so that initialisation alone can be compared.
    trainable: "none" freezes the weights: evaluation mode, no gradients, no part of checkpoints and optimizers. They are
        then no parameters of this module, but follow it to other devices and types. "last_2" trains the last two layers
        and what follows them, "all" everything.
    layer: whose states are used: -1 the last, -2 the one before it. Later ones are cut off where nothing reads them, and are
    not in a
        saved pipeline either, of which -1 is the layer that was used.
    max_length: tokens kept a caption, its marks of begin and end included; `truncated` counts the longer captions.
    mask_padding: False lets the network read padding, too, as some published models do; captions are then padded to
        `max_length`, so that an image does not depend on its batch.

    Dropout is switched off: a run that is resumed draws what the uninterrupted one would (our choice).
    Raises UserError where the folder is missing, not whole, or of another kind of model.
    """

    assets = ("folder",)
    model_class: str  # of transformers
    model_types: tuple[str, ...]  # in the folder's config.json
    model_arguments: Mapping[str, Any] = {}

    def __init__(
        self,
        folder: str,
        pretrained: bool = True,
        trainable: str = "none",
        layer: int = -1,
        max_length: int = 77,
        mask_padding: bool = True,
    ):
        super().__init__()
        self.trainable, self.layer, self.max_length, self.mask_padding = trainable, layer, max_length, mask_padding
        inner = Path(folder, SAVED)
        config, self._tokenizer = self._open(str(inner) if inner.is_dir() else folder)
        if (of_text := getattr(config, "text_config", None)) is not None:  # the folder holds a tower for images, too
            of_text.projection_dim = config.projection_dim
            config = of_text
        self._check(folder, config)
        for name, value in config.to_dict().items():
            if "dropout" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        model = self._load(folder, config) if pretrained else self._random(config)
        depth = len(self.layers(model))
        if not -depth <= layer <= -1:
            raise UserError(f"text encoder: layer must be -{depth} to -1 for {folder}, not {layer}")
        self._shorten(model, depth + 1 + layer)
        self._saved_layer = layer if len(self.layers(model)) == depth else -1
        choose_trained(trainable, model, self.layers(model), self.after_layers(model))
        # In a list: a frozen model is no submodule.
        self._frozen = [model.eval()] if trainable == "none" else []
        if not self._frozen:
            self.model = model
        self.widths, self.pooled_width = (config.hidden_size,), self._pooled_width(config)

    # What a kind of model says about itself

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The layers, first to last."""
        raise NotImplementedError

    def after_layers(self, model: nn.Module) -> list[nn.Module]:
        """What comes behind them, and is trained with the last of them."""
        return []

    def encode(self, codes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) codes and mask of real ones → (B, L, width) states and (B, pooled_width)."""
        # As attention takes it. Of one that has another form `transformers` asks whether there is padding at all, for which a GPU's
        # work would have to end first, in every step.
        seen = mask[:, None, None, :] if self.network.config._attn_implementation == "sdpa" else mask.long()
        states = self.network(input_ids=codes, attention_mask=seen).last_hidden_state
        return states, mean_state(states, mask)

    def _shorten(self, model: nn.Module, depth: int) -> None:
        """Cut off the layers that nothing reads: weights without a gradient would stop DDP."""
        del self.layers(model)[depth:]
        model.config.num_hidden_layers = depth

    def _pooled_width(self, config: Any) -> int:
        return config.hidden_size

    def _as_transformers_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights as `transformers` saves them."""
        return dict(state)

    # What all kinds share

    @property
    def network(self) -> nn.Module:
        """The model of `transformers`, frozen or not."""
        return self._frozen[0] if self._frozen else self.model

    def vocabulary_hash(self) -> str:
        return text_hash(json.dumps(sorted(self._tokenizer.get_vocab().items())))

    def fingerprint(self) -> dict[str, str]:
        return {
            "kind": type(self).__name__,
            "weights": weights_hash(self.network),
            "vocabulary": text_hash(_vocabulary(self._tokenizer)),
            "configuration": text_hash(_settings(self.network.config)),
            "layer": str(self._saved_layer),
            "max_length": str(self.max_length),
            "mask_padding": str(self.mask_padding),
        }

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L) codes and the mask of real ones; L is the longest caption's length, or `max_length`."""
        rows = self._tokenizer(
            [readable(caption) for caption in captions],
            padding="longest" if self.mask_padding else "max_length",
            truncation=True, max_length=self.max_length, return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        self.count(len(captions), sum(bool(encoding.overflowing) for encoding in rows.encodings))
        return rows["input_ids"], rows["attention_mask"].bool()

    def forward(self, captions: list[str]) -> Condition:
        device = next(self.network.parameters()).device
        codes, mask = copied(device, *self.tokenize(captions))
        with torch.set_grad_enabled(not self._frozen and torch.is_grad_enabled()):
            states, pooled = self.encode(codes, mask)
        return Condition((states,), (mask if self.mask_padding else torch.ones_like(mask),), pooled)

    def save_assets(self, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Write into a saved part what its `weights.safetensors` does not hold; the arguments that change thereby.

        That is the configuration and the tokenizer, and a frozen model's weights.
        """
        beside = temporary_name(folder / SAVED)
        try:
            with _quiet_transformers():
                self._tokenizer.save_pretrained(beside)
                if not self._frozen:
                    self.network.config.save_pretrained(beside)
                else:
                    state = {name: value.to(dtype or value.dtype) for name, value in self.network.state_dict().items()}
                    self.network.save_pretrained(beside, state_dict=self._as_transformers_names(state))
            (folder / SAVED).mkdir(exist_ok=True)
            for file in beside.iterdir():
                os.replace(file, folder / SAVED / file.name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return {"folder": SAVED, "pretrained": bool(self._frozen), "layer": self._saved_layer}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PretrainedTextEncoder:
        for model in self._frozen:
            model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # Opening

    def _open(self, folder: str) -> tuple[Any, Any]:
        """The configuration and the tokenizer."""
        import transformers

        # Captions are short; the tokenizer's threads would only make forked data workers complain.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with _readable(folder):
            # What is None here asks whether to run the folder's own code.
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config, tokenizer

    def _check(self, folder: str, config: Any) -> None:
        if config.model_type not in self.model_types:
            raise UserError(f"text encoder: {folder} holds a {config.model_type} model, {type(self).__name__} needs "
                            f"{' or '.join(self.model_types)}")  # fmt: skip
        # Where its files are missing, transformers makes a tokenizer of nothing but marks, and T5's of a blank.
        if len(self._tokenizer) <= len(self._tokenizer.all_special_ids) + 1:
            raise UserError(f"text encoder: {folder} holds no tokenizer's vocabulary")
        if not self._tokenizer.is_fast:
            raise UserError(f"text encoder: the tokenizer in {folder} is none of the tokenizers library, which is needed")
        if len(self._tokenizer) > config.vocab_size:
            raise UserError(f"text encoder: {folder}: the tokenizer has {len(self._tokenizer)} tokens, the model "
                            f"{config.vocab_size}")  # fmt: skip
        longest = getattr(config, "max_position_embeddings", math.inf)
        if not 2 < self.max_length <= longest:
            upper = f"3 to {longest}" if longest < math.inf else "at least 3"
            raise UserError(f"text encoder: max_length must be {upper} for {folder}, not {self.max_length}")

    def _load(self, folder: str, config: Any) -> nn.Module:
        import transformers

        cls = getattr(transformers, self.model_class)
        if (inner := Path(folder, SAVED)).is_dir():
            if not (inner / "model.safetensors").exists():
                return self._trained_weights(Path(folder, WEIGHTS), cls(config, **self.model_arguments))
            folder = str(inner)
        with _readable(folder):
            model, report = cls.from_pretrained(
                folder, config=config, local_files_only=True, dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are told below
                **self.model_arguments,
            )  # fmt: skip
        # Unexpected weights are heads for other tasks, unless they are within the encoder; missing ones would stay random.
        parts = tuple(f"{name}." for name, _ in model.named_children())
        if within := [key for key in map(str, report["unexpected_keys"]) if key.startswith(parts) and "position_ids" not in key]:
            raise UserError(f"text encoder: {folder} is not {self.model_class}'s: it has weights such as {sorted(within)[0]}")
        if missing := report["missing_keys"]:
            raise UserError(f"text encoder: {folder} lacks weights, such as {sorted(map(str, missing))[0]}")
        if other := sorted(report["mismatched_keys"]):
            name, theirs, ours = other[0]
            raise UserError(f"text encoder: {folder}: {name} has the shape {tuple(theirs)}, its config.json says {tuple(ours)}")
        return model

    def _trained_weights(self, path: Path, model: nn.Module) -> nn.Module:
        """The model with weights that were trained with a generator, which lie in the saved part's own file."""
        with _readable(str(path.parent)):
            saved = {name.removeprefix("model."): value for name, value in load_file(path).items()}
            report = model.load_state_dict(self._as_transformers_names(saved), strict=False)
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        if missing := sorted({*report.missing_keys, *report.unexpected_keys} - tied):
            raise UserError(f"text encoder: {path} lacks weights, or has others, such as {missing[0]}")
        return model.eval()

    def _random(self, config: Any) -> nn.Module:
        import transformers

        cls = getattr(transformers, self.model_class)
        if self.trainable == "all":
            return cls(config, **self.model_arguments)
        # Frozen weights are in no checkpoint: a restart must draw the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(config, **self.model_arguments)


def _vocabulary(tokenizer: Any) -> str:
    """All that a tokenizer does, but for the length that its last call asked for."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    rest = {key: value for key, value in told.items() if key not in ("truncation", "padding")}
    return json.dumps([rest, tokenizer.truncation_side, tokenizer.padding_side, tokenizer.pad_token], sort_keys=True)


def _settings(config: Any) -> str:
    """All of a model's configuration that its states depend on."""
    aside = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict")
    told = {key: value for key, value in config.to_dict().items() if key not in aside and "dropout" not in key}
    return json.dumps(told, sort_keys=True, default=str)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without progress bars and reports of weights that are not needed."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _readable(folder: str) -> Iterator[None]:
    """What goes wrong inside is one UserError."""

    try:
        with _quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, ImportError) as error:
        if Path(folder).is_dir():
            reason = " ".join(str(error).split())
            raise UserError(f"text encoder: {folder} is not a whole pretrained model: {reason}") from error
        raise UserError(
            f"text encoder: there is no folder {folder}, and no such model in the local Hugging Face cache; nothing is "
            f"downloaded here, so fetch it first (`hf download {folder}`) or name its folder"
        ) from error
