"""Tokenizer training: a VQGAN under DDP, with manual optimisation, since it has two optimizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torchmetrics.functional.image import structural_similarity_index_measure

from nar_t2i.errors import UserError
from nar_t2i.folders import save_part
from nar_t2i.pixels import to_float, to_uint8
from nar_t2i.tokenizers.losses import (
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    edge_loss,
)
from nar_t2i.tokenizers.vqgan import VQGAN
from nar_t2i.training import optim
from nar_t2i.training.base import TrainedModule
from nar_t2i.training.logged_pictures import log_picture, rows_of
from nar_t2i.training.optim import OptimizerConfig
from nar_t2i.types import Batch

DISCRIMINATING = "discriminating"  # of a checkpoint: see TokenizerModule.discriminating
# What is said where a step is refused at one of the two optimizers.
UPDATES = "Its update was not made", "The codec's update was made, the discriminator's was not; neither is saved"


class TokenizerModule(TrainedModule):
    """Trains a VQGAN (Esser et al., arXiv 2012.09841).

    codec: the model. optimizer: of the codec; the discriminator's is AdamW (β 0.5 and 0.9, VQGAN's) at
    `discriminator_learning_rate` throughout.
    l1, l2, edge: weights of the reconstruction losses. perceptual: weight of the perceptual loss; perceptual_weights: a local
    VGG-16 file for it, None = no such loss.
    discriminator: None trains without. discriminator_start: the share of training (`progress`) from which on it takes
    part, in both its roles. discriminator_weight: multiplies the adaptive weight λ. ema_decay, budget_minutes: see
    TrainedModule. The averaged codec holds the averaged codebook, too: encoder, codebook and decoder lag alike.
    """

    ema_submodules = ("codec",)
    on_bar = ("reconstruction_loss", "batch_codebook_use")

    def __init__(
        self,
        codec: VQGAN,
        optimizer: OptimizerConfig = OptimizerConfig(),
        l1: float = 1.0,
        l2: float = 2.0,
        edge: float = 1.0,
        perceptual: float = 1.0,
        perceptual_weights: str | None = None,
        discriminator: PatchDiscriminator | None = None,
        discriminator_start: float = 0.5,
        discriminator_weight: float = 0.1,
        discriminator_learning_rate: float = 5e-4,
        ema_decay: float = 0.995,
        budget_minutes: float | None = None,
    ):
        super().__init__(optimizer, ema_decay, budget_minutes)
        self.automatic_optimization = False
        self.codec = codec
        self.discriminator = discriminator
        self.l1, self.l2, self.edge, self.perceptual = l1, l2, edge, perceptual
        # In a list: a frozen network has no place in the checkpoint.
        self._perceptual = [PerceptualLoss(perceptual_weights)] if perceptual_weights else []
        self.discriminator_start, self.discriminator_weight = discriminator_start, discriminator_weight
        self.discriminator_learning_rate = discriminator_learning_rate
        self._accumulated = 0
        self._discriminating = False

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if (check := getattr(self.trainer.datamodule, "check_size", None)) is not None:
            check(self.codec)
        if stage == "fit":
            # Which Lightning would not be told before: it divides nothing where a module steps by itself, but counts steps by it.
            self.trainer.accumulate_grad_batches = self.trainer.datamodule.accumulation(self.trainer.world_size)
            # It would also write metrics after each micro-batch of a step whose metrics are written.
            connector, loop = self.trainer._logger_connector, self.trainer.fit_loop.epoch_loop
            write = type(connector).update_train_step_metrics
            connector.update_train_step_metrics = lambda: None if loop._should_accumulate() else write(connector)
            self.validate_by_steps(self.trainer.accumulate_grad_batches)
        if isinstance(strategy, DeepSpeedStrategy):
            raise UserError("trainer.strategy: a tokenizer has two optimizers, which DeepSpeed cannot train; use ddp")
        if getattr(strategy.precision_plugin, "scaler", None) is not None:
            raise UserError(
                "trainer.precision: a tokenizer has two optimizers, which a scaler for fp16 does not serve; use bf16-mixed or "
                "32-true"
            )
        if isinstance(strategy, DDPStrategy) and self.discriminator is not None:
            # Each of the two backward passes leaves the other's parameters without a gradient.
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        if not self._perceptual:
            self.print("perceptual loss: off (no perceptual_weights given)")
        for network in self._perceptual:
            network.to(strategy.root_device)  # the module itself is moved only after this hook

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        optimizer, scheduler = optim.build(config, optim.parameter_groups([self.codec], config.weight_decay), self.total_steps)
        if self.discriminator is None:
            return [optimizer], [scheduler]
        other = torch.optim.AdamW(self.discriminator.parameters(), self.discriminator_learning_rate, (0.5, 0.9))
        return [optimizer, other], [scheduler, optim.Schedule(other, lambda step: 1.0)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[DISCRIMINATING] = self._discriminating

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._discriminating = checkpoint.get(DISCRIMINATING, False)

    def on_train_start(self) -> None:
        self._accumulated = 0

    def discriminating(self) -> bool:
        """Whether the discriminator takes part in the present step: decided at its first micro-batch, and never undone
        (under a time budget, progress is an estimate that may fall again)."""
        if self.discriminator is not None and self._accumulated == 0:
            self._discriminating = self._discriminating or self.progress >= self.discriminator_start
        return self._discriminating

    def reconstruction_loss(self, images: Tensor, targets: Tensor) -> Tensor:
        loss = self.l1 * F.l1_loss(images, targets) + self.l2 * F.mse_loss(images, targets)
        if self.edge:
            loss = loss + self.edge * edge_loss(images, targets)
        for network in self._perceptual:
            loss = loss + self.perceptual * network(images, targets)
        return loss

    @property
    def saved_parts(self) -> tuple[Any, ...]:
        return (self.codec,)

    def training_step(self, batch: Batch, batch_index: int) -> None:
        images = to_float(batch.images)
        accumulation = self.trainer.datamodule.accumulation()
        step, discriminating = self.trainer.global_step, self.discriminating()
        self._accumulated = (self._accumulated + 1) % accumulation
        last = self._accumulated == 0

        reconstruction, quantized = self.codec(images)
        reconstruction = reconstruction.float()
        loss = self.reconstruction_loss(reconstruction, images)
        self.log_of_step({"reconstruction_loss": loss, "quantizer_loss": quantized.loss})
        total = loss + quantized.loss
        if discriminating:
            self.discriminator.requires_grad_(False)
            adversarial = -self.discriminator(reconstruction).mean()
            self.discriminator.requires_grad_(True)
            weight = self.discriminator_weight * adaptive_weight(loss, adversarial, self.codec.decoder.last_weight)
            total = total + weight * adversarial
            self.log_of_step({"adversarial_weight": weight})
        self._backward_and_step(0, total / accumulation, step, last)
        if last:
            used = self.codec.quantizer.step()
            self.log("batch_codebook_use", (used > 0).float().mean())
        if discriminating:
            self._train_discriminator(images, reconstruction.detach(), accumulation, step, last)

    def _train_discriminator(self, images: Tensor, reconstruction: Tensor, accumulation: int, step: int, last: bool) -> None:
        real, fake = self.discriminator(images), self.discriminator(reconstruction)
        loss = discriminator_loss(real, fake)
        self.log_of_step({"discriminator_loss": loss, "discriminator_real": real.mean(), "discriminator_fake": fake.mean()}, step)
        self._backward_and_step(1, loss / accumulation, step, last)

    def _backward_and_step(self, index: int, loss: Tensor, step: int, last: bool) -> None:
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        self.manual_backward(loss)
        if not last:
            return
        self.check(optimizer.optimizer, step, UPDATES[index])
        parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        norm = clip_grad_norm_(parameters, self.optimizer_config.clip_norm or math.inf)
        if index == 0:
            self.gradient_norm = norm
            optimizer.step()
            schedulers = self.lr_schedulers()
            (schedulers[0] if isinstance(schedulers, list) else schedulers).step()
        else:
            # Past Lightning's wrapper, which would count this step, too, as one of `trainer.max_steps`.
            optimizer.optimizer.step()
        optimizer.optimizer.zero_grad(set_to_none=True)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        images = to_float(batch.images)
        encoded = self.codec.encode(images)
        decoded = self.codec.decode(encoded.tokens).float().clamp(-1, 1)
        mse = (decoded - images).square().mean((1, 2, 3))
        self.log("psnr", (10 * torch.log10(4 / mse)).mean(), batch_size=len(images), sync_dist=True, prog_bar=True)
        ssim = structural_similarity_index_measure(decoded, images, data_range=2.0)
        self.log("ssim", ssim, batch_size=len(images), sync_dist=True)
        self._used += torch.bincount(encoded.tokens.flatten(), minlength=self.codec.spec.size)
        if batch_index == 0:
            pairs = torch.stack([to_uint8(images[:16]), to_uint8(decoded[:16])], dim=1).flatten(0, 1)
            log_picture(self, "reconstructions", rows_of(pairs.cpu(), columns=16))

    def on_validation_epoch_start(self) -> None:
        self._used = torch.zeros(self.codec.spec.size, dtype=torch.int64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        used = self.trainer.strategy.reduce(self._used, reduce_op="sum").double()
        share = used / used.sum()
        perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum())
        self.log("codebook_use", (used > 0).double().mean().float())
        self.log("codebook_perplexity", perplexity.float())

    def write(self, folder: Path) -> None:
        """Save the codec as a part folder, with the weights that the module holds."""
        save_part(self.codec, folder)
