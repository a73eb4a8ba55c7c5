"""Tokenizer training: what steps when, that ranks and micro-batches do not matter, and what is logged and exported."""

import csv

import pytest
import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file

from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.errors import UserError
from nar_t2i.folders import load_part
from nar_t2i.pixels import to_float
from nar_t2i.tokenizers import VQGAN, VectorQuantizer
from nar_t2i.tokenizers.losses import PatchDiscriminator, discriminator_loss
from nar_t2i.training import TokenizerModule
from nar_t2i.training.optim import OptimizerConfig
from nar_t2i.training.run_folder import RunLogger
from tests.tokenizers.random_vgg import random_vgg

SIZE = 16


def data(micro=None, **kwargs):
    return CaptionedImages(
        RenderedScenes("train", 512, SIZE), SIZE, global_batch_size=16, micro_batch_size=micro,
        validation=RenderedScenes("validation", 20, SIZE), **kwargs,
    )  # fmt: skip


def made(discriminator=True, start=0.5, weight=0.1, ema_decay=0.5, **kwargs):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, revive_below=0.3)
    codec = VQGAN(SIZE, (16, 16), blocks=1, patch=2, attention=False, quantizer=quantizer)
    # A bias before a norm has no gradient but rounding, which AdamW would take for one: hence the large eps.
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-3)
    return TokenizerModule(
        codec, config, ema_decay=ema_decay, discriminator_start=start,
        discriminator=PatchDiscriminator((8, 16)) if discriminator else None, discriminator_weight=weight, **kwargs,
    )  # fmt: skip


def test_a_discriminator_that_has_begun_goes_on_after_a_restart(tmp_path):
    """Whatever the progress then is, which under a time budget is an estimate."""
    trainer = fit(made(start=0.5), tmp_path, 4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for resume, expected in ((tmp_path / "last.ckpt", [4, 5]), (None, [5])):
        record = Record()
        fit(made(start=1.0), tmp_path, 6, resume=resume, callbacks=[record])
        assert [step for step, _ in record.of("adversarial_weight")] == expected


class Record(Callback):
    """Everything that is logged, by the number of steps finished before, and the weights before each batch."""

    def __init__(self, stop_at=None):
        self.logged, self.stop_at, self.discriminators = [], stop_at, []

    def setup(self, trainer, module, stage):
        log = module.log

        def logged(name, value, **kwargs):
            self.logged.append((module.global_step, name, float(value)))
            log(name, value, **kwargs)

        module.log = logged

    def on_train_batch_start(self, trainer, module, batch, index):
        if module.discriminator is not None:
            self.discriminators.append(module.discriminator.layers[0].weight.detach().clone())

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True

    def of(self, name):
        return [(step, value) for step, key, value in self.logged if key == name]


def fit(module, folder, steps, datamodule=None, resume=None, validate=False, callbacks=(), **kwargs):
    trainer = Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False, callbacks=list(callbacks),
        limit_val_batches=None if validate else 0, val_check_interval=steps, check_val_every_n_epoch=None,
        **{"accelerator": "cpu", **kwargs},
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule or data(), ckpt_path=resume, weights_only=True)
    return trainer


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


def equal(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("micro, start, first", [(16, 0.5, 5), (8, 0.5, 5), (8, 0.0, 0), (16, 1.0, 9)])
def test_the_discriminator_starts_exactly_where_it_is_told_to(tmp_path, micro, start, first):
    module, record = made(start=start), Record()
    trainer = fit(module, tmp_path, 10, data(micro), callbacks=[record])
    assert trainer.global_step == 10, "the second optimizer's steps are counted, too"
    expected = [step for step in range(first, 10) for _ in range(16 // micro)]
    assert [step for step, _ in record.of("adversarial_weight")] == expected
    assert len(record.of("discriminator_loss")) == len(expected)  # both roles in the same micro-batches
    before = [torch.equal(w, record.discriminators[0]) for w in record.discriminators]
    window = 16 // micro
    assert all(before[: (first + 1) * window]) and not any(before[(first + 1) * window :])


class ByHand(Callback):
    """The first batch with the discriminator, done by hand beforehand."""

    def __init__(self):
        self.weight = self.total = self.after = None

    def on_train_batch_start(self, trainer, module, batch, index):
        if self.after is None and module.progress >= module.discriminator_start:
            images = to_float(batch.images)
            codec, discriminator = module.codec, module.discriminator
            codec.quantizer.eval()
            made, quantized = codec(images)
            codec.quantizer.train()
            loss = module.reconstruction_loss(made, images)
            adversarial = -discriminator(made).mean()
            last = codec.decoder.last_weight
            norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (loss, adversarial)]
            self.weight = float(module.discriminator_weight * norms[0] / (norms[1] + 1e-4))
            self.total = float(loss + quantized.loss + self.weight * adversarial)
            # A fresh AdamW on a copy, with the gradient of the discriminator's own loss and nothing else.
            copy = PatchDiscriminator((8, 16))
            copy.load_state_dict(discriminator.state_dict())
            discriminator_loss(copy(images), copy(made.detach())).backward()
            torch.nn.utils.clip_grad_norm_(copy.parameters(), module.optimizer_config.clip_norm)
            torch.optim.AdamW(copy.parameters(), module.discriminator_learning_rate, (0.5, 0.9)).step()
            self.after = copy

    def on_train_batch_end(self, trainer, module, *args):
        if self.after is not None and not hasattr(self, "found"):
            self.found = {k: v.clone() for k, v in module.discriminator.state_dict().items()}


def test_adaptive_weight_and_gradients_by_hand(tmp_path):
    module, record, hand = made(), Record(), ByHand()
    losses = []
    step = module._backward_and_step
    module._backward_and_step = lambda index, loss, *more: (losses.append((index, float(loss))), step(index, loss, *more))
    fit(module, tmp_path, 7, callbacks=[hand, record])
    assert record.of("adversarial_weight")[0][1] == pytest.approx(hand.weight, rel=1e-4)
    first = next(i for i, (index, _) in enumerate(losses) if index == 1)
    assert losses[first - 1] == (0, pytest.approx(hand.total, rel=1e-4))
    for name, value in hand.after.state_dict().items():
        torch.testing.assert_close(hand.found[name], value, rtol=1e-4, atol=1e-6)  # the codec's loss leaves no trace


def test_micro_batches_do_not_matter(tmp_path):
    whole, divided = made(discriminator=False), made(discriminator=False)
    fit(whole, tmp_path, 3)
    fit(divided, tmp_path, 3, data(8))
    assert_close(whole.codec, divided.codec)
    assert whole.codec.quantizer.updates == divided.codec.quantizer.updates == 3


def test_curves_count_optimizer_steps_and_are_of_the_global_batch(tmp_path):
    curves = []
    for micro in (16, 4):
        trainer = Trainer(
            max_steps=3,
            log_every_n_steps=1,
            accelerator="cpu",
            logger=RunLogger(tmp_path / str(micro)),
            enable_checkpointing=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(made(discriminator=False), datamodule=data(micro))
        with open(tmp_path / str(micro) / "metrics.csv", newline="") as file:
            curves.append(
                [
                    (int(row["step"]), float(row["reconstruction_loss"]))
                    for row in csv.DictReader(file)
                    if row["reconstruction_loss"]
                ]
            )
    assert [step for step, _ in curves[0]] == [0, 1, 2]
    assert [x for row in curves[1] for x in row] == pytest.approx([x for row in curves[0] for x in row], rel=1e-4)


def test_two_ranks_train_what_one_does(tmp_path):
    """With a discriminator that trains, but moves the codec not at all: its adaptive weight is a rank's own."""
    one, two = made(weight=0.0), made(weight=0.0)
    alone = fit(one, tmp_path / "one", 5, validate=True).callback_metrics
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    trainer = fit(two, tmp_path / "two", 5, data(8), validate=True, strategy=strategy, devices=2)
    assert trainer.world_size == 2
    for name in ("psnr", "codebook_use", "codebook_perplexity"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(alone[name]), rel=1e-3), name
    assert_close(one.codec, two.codec, 1e-3, 1e-4)
    assert_close(one.discriminator, two.discriminator, 1e-3, 1e-4)
    assert not equal(one.discriminator, made().discriminator)
    assert_close(load_part(tmp_path / "one/model"), load_part(tmp_path / "two/model"), 1e-3, 1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = made(start=0.3)
    fit(whole, tmp_path, 6, data(8))
    fit(made(start=0.3), tmp_path, 6, data(8), callbacks=[Record(3)]).save_checkpoint(tmp_path / "half.ckpt")
    resumed = made(start=0.3)
    assert fit(resumed, tmp_path, 6, data(8), tmp_path / "half.ckpt").global_step == 6
    assert equal(whole, resumed) and resumed.codec.quantizer.updates == 6


def test_a_run_that_goes_on_takes_the_rate_of_its_recipe(tmp_path):
    fit(made(start=0.0), tmp_path, 6, data(8), callbacks=[Record(3)]).save_checkpoint(tmp_path / "half.ckpt")
    rates = {}
    for rate in (5e-4, 0.0):
        resumed = made(start=0.0, discriminator_learning_rate=rate)
        fit(resumed, tmp_path, 6, data(8), tmp_path / "half.ckpt")
        rates[rate] = resumed.discriminator.layers[0].weight.detach()
    before = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]["discriminator.layers.0.weight"]
    assert torch.equal(rates[0.0], before) and not torch.equal(rates[5e-4], before)


def test_a_scaler_of_gradients_is_refused(tmp_path):
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match="trainer.precision: .* use bf16-mixed"):
        fit(made(), tmp_path, 2, plugins=[precision])


def test_the_checkpoint_holds_the_codebook(tmp_path):
    fit(made(), tmp_path, 2).save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {f"codec.quantizer.{name}" for name in ("codebook", "sums", "counts", "updates")} <= set(names)


def test_the_average_is_whole_where_the_module_moves_at_the_end(tmp_path, monkeypatch):
    """From a GPU to the CPU buffers become new tensors; the codebook is one."""
    monkeypatch.setattr(_DeviceDtypeModuleMixin, "cpu", lambda module: module._apply(torch.clone))
    module = made()
    before = module.codec.quantizer.codebook
    fit(module, tmp_path, 4)
    assert module.codec.quantizer.codebook is not before, "it did not move"
    codebook = load_part(tmp_path / "model").quantizer.codebook
    assert torch.equal(codebook, module.ema.average["codec.quantizer.codebook"].to(codebook))
    assert not torch.equal(codebook, module.codec.quantizer.codebook)


@pytest.mark.parametrize("micro", [16, 4])
def test_validation_comes_after_as_many_steps_whatever_the_micro_batches(tmp_path, micro):
    steps = []

    class Validated(Callback):
        def on_validation_start(self, trainer, module):
            steps.append(trainer.global_step)

    trainer = Trainer(
        max_steps=6,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        use_distributed_sampler=False,
        callbacks=[Validated()],
    )
    trainer.fit(made(discriminator=False), datamodule=data(micro))
    assert steps == [2, 4, 6]


def test_what_validation_logs_writes_and_exports(tmp_path):
    module = made()
    datamodule = data()
    trainer = fit(module, tmp_path, 4, datamodule, validate=True)
    codec = load_part(tmp_path / "model")
    with module.ema.applied(module):
        assert equal(codec, module.codec), "the exported codec is not the average"
    assert not equal(codec, module.codec)
    assert not torch.equal(codec.quantizer.codebook, module.codec.quantizer.codebook)

    images = torch.cat([to_float(batch.images) for batch in datamodule.val_dataloader()])
    assert len(images) == 20
    tokens = codec.encode(images).tokens
    mse = (codec.decode(tokens).clamp(-1, 1) - images).square().mean((1, 2, 3))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    share = torch.bincount(tokens.flatten(), minlength=32).double() / tokens.numel()
    assert metrics["psnr"] == pytest.approx(float((10 * torch.log10(4 / mse)).mean()), rel=1e-4)
    assert metrics["codebook_use"] == pytest.approx(float((share > 0).double().mean()))
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    assert metrics["codebook_perplexity"] == pytest.approx(float(entropy.exp()), rel=1e-4)
    assert -1 <= metrics["ssim"] <= 1
    assert {"reconstruction_loss", "quantizer_loss", "batch_codebook_use", "adversarial_weight"} <= set(metrics)
    assert {"discriminator_loss", "discriminator_real", "discriminator_fake"} <= set(metrics)
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["reconstructions-00000004.png"]


def test_perception_is_off_and_said_so(tmp_path, capsys):
    fit(made(discriminator=False), tmp_path, 1)
    assert "perceptual loss: off" in capsys.readouterr().out


def test_perception_with_local_weights(tmp_path, capsys):
    save_file(random_vgg(), tmp_path / "vgg.safetensors")
    module, record = made(discriminator=False, perceptual_weights=str(tmp_path / "vgg.safetensors")), Record()
    fit(module, tmp_path, 1, callbacks=[record]).save_checkpoint(tmp_path / "a.ckpt")
    without = Record()
    fit(made(discriminator=False), tmp_path, 1, callbacks=[without])
    assert record.of("reconstruction_loss")[0][1] > without.of("reconstruction_loss")[0][1]
    assert "off" not in capsys.readouterr().out.split("perceptual")[0]
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("codec.") for name in names), "a frozen network is in the checkpoint"
