"""Generator training: text encoder, null caption and network under one learning strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.evaluation.detector import MIN_SIDE
from nar_t2i.evaluation.scene_accuracy import verdicts
from nar_t2i.evaluation.scene_prompts import committed, take
from nar_t2i.folders import load_part
from nar_t2i.hashing import weights_hash
from nar_t2i.inference.confidence import Confidence
from nar_t2i.networks import predictions
from nar_t2i.networks.tokens import CodeVectors
from nar_t2i.noise import Noise
from nar_t2i.pipeline import TextToImage
from nar_t2i.pixels import to_arrays, to_float
from nar_t2i.schedules import Guidance
from nar_t2i.text.null import NullCaption
from nar_t2i.training import checkpoints, optim
from nar_t2i.training.base import TrainedModule
from nar_t2i.training.compiling import Compiled, can_compile, compiled, is_watched, longest, of_one_length
from nar_t2i.training.logged_pictures import log_picture, rows_of
from nar_t2i.training.optim import OptimizerConfig
from nar_t2i.types import (
    Batch,
    Condition,
    InferenceStrategy,
    LearningStrategy,
    TextEncoder,
    TokenBatch,
    TokenCodec,
    TokenNetwork,
    TokenSpec,
)

VALIDATION_SEED = 2**31 - 1  # apart from training's, so that validation draws masks of its own


class GeneratorModule(TrainedModule):
    """Trains a generator.

    tokenizer: the folder of a trained codec, or a codec; frozen, never stored in checkpoints. text: the text encoder,
    trained along. network: made from the tokens' spec and the text's widths. learning, inference, guidance: strategies;
    inference and guidance only draw the sample grids and become the exported pipeline's defaults.
    caption_dropout: the probability that an image's caption is replaced by the null caption, for guidance. null_length: its
    tokens, as many as a model has whose weights this starts from (aMUSEd's: 77).
    seed: of masks and caption dropout. sample_prompts: drawn at every validation. scene_prompts: how many scene prompts
    of each category are drawn and scored at every validation, as `validation_scene_accuracy`; the prompts are those that
    travel with the package, of combinations that training has seen.
    text_learning_rate, text_weight_decay: the text encoder's own peak and decay; None: those of the rest. With a peak of
    its own it is trained by AdamW, as pretrained encoders were, whatever trains the rest.
    Logged beside the losses: truncated_captions, the share of captions that did not fit into the text encoder (of all
    captions, where their states come from a cache).
    compile: "kernels" has torch.compile fuse the network's training passes and the cross-entropy; "kernels and graphs" also records
    them as CUDA graphs where there is a GPU, for which captions are padded to the text encoder's longest, and gradients cannot be
    accumulated; what graphs bring at which batch has not been measured. Losses are equal up to rounding; the first step takes
    seconds longer, with graphs a minute, and a C++ compiler is needed. Validation and sampling run as they are; under ZeRO-3
    everything does. optimizer, ema_decay, budget_minutes: see OptimizerConfig and TrainedModule.
    """

    ema_submodules = ("text", "null", "network", "learning")
    on_bar = ("loss",)

    def __init__(
        self,
        tokenizer: str | TokenCodec,
        text: TextEncoder,
        network: Callable[[TokenSpec, Sequence[int]], TokenNetwork],
        learning: LearningStrategy,
        inference: InferenceStrategy = Confidence(),
        guidance: Guidance = Guidance(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        text_learning_rate: float | None = None,
        text_weight_decay: float | None = None,
        caption_dropout: float = 0.1,
        null_length: int = 1,
        ema_decay: float = 0.999,
        seed: int = 0,
        sample_prompts: list[str] | None = None,
        scene_prompts: int = 0,
        budget_minutes: float | None = None,
        compile: Compiled | None = None,
    ):
        super().__init__(optimizer, ema_decay, budget_minutes)
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"caption_dropout must be from 0 to 1, a share of the captions, not {caption_dropout}")
        if scene_prompts < 0:
            raise UserError(f"scene_prompts must be at least 0, not {scene_prompts}")
        codec = load_part(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._codec = [codec.eval().requires_grad_(False)]  # in a list: frozen, so no part of the checkpoint
        self.text = text
        self.null = NullCaption(text.widths, text.pooled_width, null_length)
        self.network = network(codec.spec, text.widths)
        if self.network.causal != learning.causal:
            sees = "only what stands before, which Causal teaches, and Prefixes" if self.network.causal else "all slots at once"
            raise UserError(f"learning {type(learning).__name__} does not teach {type(self.network).__name__}, which sees {sees}")
        if self.network.judges == learning.draws:
            does = "says of each token whether it is wrong, which CriticOf teaches" if self.network.judges else "predicts tokens"
            raise UserError(f"learning {type(learning).__name__} does not teach {type(self.network).__name__}, which {does}")
        if self.network.judges and caption_dropout:
            raise UserError(
                f"caption_dropout {caption_dropout}: a critic is never asked without a caption, and its generator would be "
                "shown a null caption that is not its own; set it to 0"
            )
        if isinstance(getattr(self.network, "codes", None), CodeVectors):
            self.network.codes.adopt(codec.code_vectors())
        self.text_learning_rate, self.text_weight_decay = text_learning_rate, text_weight_decay
        self._compilation = compile
        self._compiled: list[TokenNetwork] = []  # by `setup`; in a list: the same weights, no second part
        self._lengths = longest(text) if compile == "kernels and graphs" else None
        self.learning = learning
        self.inference, self.guidance = inference, guidance
        self.caption_dropout, self.seed = caption_dropout, seed
        self._captions = [0, 0]  # that this process has trained on, and those of them that did not fit
        self._cached_truncated: float | None = None  # share of those in a text cache
        self.sample_prompts = sample_prompts or []
        self.scene_prompts = take(committed("seen"), scene_prompts)
        if scene_prompts and codec.image_size < MIN_SIDE:
            raise UserError(f"scene_prompts: the detector needs {MIN_SIDE} pixels a side, and images have {codec.image_size}")

    @property
    def codec(self) -> TokenCodec:
        return self._codec[0]

    @property
    def saved_parts(self) -> tuple[Any, ...]:
        return self.codec, self.text, self.null, self.network, self.inference, self.guidance

    def setup(self, stage: str) -> None:
        datamodule = self.trainer.datamodule
        datamodule.check_codec(self.codec)
        datamodule.check_text(self.text)
        if self.learning.reads_errors:
            datamodule.check_errors()
        if stage == "fit":
            self._cached_truncated = None if datamodule.streams else datamodule.source("train").truncated
            self.trainer.accumulate_grad_batches = datamodule.accumulation(self.trainer.world_size)
            self.validate_by_steps(self.trainer.accumulate_grad_batches)
            if self._compilation and can_compile(self._compilation, self.trainer):
                self._compiled = [compiled(self.network, self._compilation)]
        self.codec.to(self.trainer.strategy.root_device)  # Lightning moves the module itself only later
        # Lightning's would round sizes in pixels, errors and continuous tokens to a short precision, under ZeRO and in bf16-true.
        # Networks cast what they read.
        self.trainer.precision_plugin.convert_input = lambda batch: batch

    @cached_property
    def reads(self) -> dict[str, str]:
        """What the weights are trained to read, by the keys that say it: of codes and of words they know only the numbers."""
        return {"model.init_args.tokenizer": weights_hash(self.codec), "model.init_args.text": self.text.vocabulary_hash()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[checkpoints.READS] = self.reads

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.check_reads(checkpoint.get(checkpoints.READS, {}))

    def check_reads(self, there: Mapping[str, str]) -> None:
        """UserError where a checkpoint's weights were trained to read other codes or words."""
        for key, what in (("model.init_args.tokenizer", "tokenizer"), ("model.init_args.text", "vocabulary")):
            if there.get(key) and self.reads[key] and there[key] != self.reads[key]:
                raise UserError(
                    f"{key}: the checkpoint is of another {what}; put back the one that it was trained with, or train in "
                    "another run_dir"
                )

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        apart = self.text_learning_rate is not None
        if apart and not config.learning_rate:
            raise UserError("text_learning_rate: is kept as a multiple of optimizer.learning_rate, which is 0")
        scale = self.text_learning_rate / config.learning_rate if apart else 1.0
        text_decay = config.weight_decay if self.text_weight_decay is None else self.text_weight_decay
        groups = optim.parameter_groups([self.null, self.network, self.learning], config.weight_decay)
        groups += optim.parameter_groups(self.text, text_decay, scale, muon=not apart)
        optimizer, scheduler = optim.build(config, groups, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.optimizer_config.clip_norm:
            self.clip_gradients(optimizer, self.optimizer_config.clip_norm, "norm")

    def tokens_of(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(tokens, quantisation error or None), from the cache or from the images."""
        if batch.tokens is not None:
            return batch.tokens, batch.errors
        return self.codec.encode(to_float(batch.images))

    def states_of(self, batch: Batch) -> Condition:
        """From the cache, whatever it is stored as, or from the text encoder."""
        if batch.condition is not None:
            dtype = self.null.states[0].dtype
            return batch.condition.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
        return self.text(batch.captions)

    def dropped(self, noise: Noise) -> Tensor:
        """(B,), True where the caption is dropped."""
        return noise.uniform("caption dropout") < self.caption_dropout

    def _terms(self, batch: Batch, seed: int, training: bool, progress: float) -> dict[str, Any]:
        """training: with captions dropped, and through what is compiled."""
        noise = Noise(seed, batch.ids)
        tokens, error = self.tokens_of(batch)
        condition = self.states_of(batch)._replace(scalars=batch.scalars)
        if training and self._lengths:
            condition = of_one_length(condition, self._lengths)
        nothing = torch.zeros(len(batch.ids), dtype=torch.bool, device=batch.ids.device)
        condition = self.null(condition, self.dropped(noise) if training else nothing)
        fused = training and self._compiled and not is_watched()
        with predictions.compiled_cross_entropy() if fused else nullcontext():
            return self.learning.loss(
                self._compiled[0] if fused else self.network, TokenBatch(tokens, condition, error), noise, progress
            )

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        before = self.text.encoded, self.text.truncated
        terms = self._terms(batch, self.seed, training=True, progress=self.progress)
        self._captions[0] += self.text.encoded - before[0]
        self._captions[1] += self.text.truncated - before[1]
        truncated = self._captions[1] / self._captions[0] if self._captions[0] else self._cached_truncated
        if truncated is not None:
            self.log("truncated_captions", torch.tensor(truncated))
        means = {name: total / weight for name, (total, weight) in terms.items()}
        self.log_of_step(means)
        self.log("learning_rate", torch.tensor(optim.learning_rate(self.trainer.optimizers[0])))
        return means["loss"]

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        # As at the end of training, whatever the strategy's curriculum, so that all validations compare.
        for name, (total, weight) in self._terms(batch, VALIDATION_SEED, training=False, progress=1.0).items():
            self.log(f"validation_{name}", total / weight, batch_size=int(weight), sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        if not self.learning.draws or self.trainer.sanity_checking:
            return
        if self.sample_prompts:
            images = self.pipeline().sample(self.sample_prompts).images
            log_picture(self, "samples", rows_of(images.cpu(), columns=8))
        if self.scene_prompts:
            self.log("validation_scene_accuracy", self._scene_accuracy(), sync_dist=True, prog_bar=True)

    def _scene_accuracy(self) -> float:
        """The mean over the categories. Prompt i is drawn with seed i, by rank i modulo their number."""
        ranks, total = self.trainer.world_size, len(self.scene_prompts)
        # As many on every rank: under ZeRO-3 their passes must meet.
        indices = [i % total for i in range(self.global_rank, -(-total // ranks) * ranks, ranks)]
        if not self.inference.static and getattr(self.trainer.strategy, "stage", 0) == 3:
            indices = list(range(total))  # how many passes it takes may depend on the prompts: every rank draws all of them
        prompts = [self.scene_prompts[i] for i in indices]
        images = self.pipeline().sample([prompt.prompt for prompt in prompts], seed=indices).images
        right = torch.full((total,), -1.0, device=self.device)
        right[indices] = torch.tensor(verdicts(to_arrays(images), prompts), device=self.device).float()
        right = self.all_gather(right).view(ranks, total).amax(0).tolist()
        categories = [prompt.category for prompt in self.scene_prompts]
        of_each = [mean(r for r, c in zip(right, categories, strict=True) if c == known) for known in sorted(set(categories))]
        return mean(of_each)

    def pipeline(self) -> TextToImage:
        """The generator as it stands, as a pipeline that shares its weights."""
        return TextToImage(self.codec, self.text, self.null, self.network, self.inference, self.guidance)

    def write(self, folder: Path) -> None:
        """Save the pipeline folder, with the weights that the module holds."""
        self.pipeline().save_pretrained(folder)
