"""What is trained and drawn on a device that is not there (tests/test_far_device.py): `python -m tests.far_cases` runs all of
it, and prints as JSON what each came to.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nar_t2i import cli, inference, learning, networks
from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.editing import Edit, composited, known_outside, known_share
from nar_t2i.evaluation.drawing import draw_prompts
from nar_t2i.evaluation.features import SceneFeatures
from nar_t2i.evaluation.scene_prompts import committed, take
from nar_t2i.evaluation.tokenizer import evaluate_tokenizer
from nar_t2i.noise import Noise
from nar_t2i.prepare.text import encode_text
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.text import (
    BertTextEncoder,
    ClipTextEncoder,
    JointTextEncoder,
    T5TextEncoder,
)
from nar_t2i.tokenizers import VQGAN, VectorQuantizer
from nar_t2i.tokenizers.losses import PatchDiscriminator
from nar_t2i.training import TokenizerModule
from nar_t2i.training.command import RecipeCLI
from nar_t2i.training.guard import Guard, GuardConfig
from nar_t2i.training.monitor import Monitor
from nar_t2i.training.optim import OptimizerConfig
from tests import far_device
from tests.cluster import tiny
from tests.cluster.forks import ROOT
from tests.text.tiny_models import tiny_bert, tiny_clip, tiny_t5
from tests.tiny_pipeline import tiny_pipeline
from tests.tokenizers.random_vgg import random_vgg
from tests.toys import ToyBinary, ToyCodec, ToyContinuous, ToyText

STEPS = 3
ENDED = "ended: "  # before each line that says how a case did
TOKENS = tempfile.TemporaryDirectory()  # of all cases, by kind
Case = Callable[[Path], Any]


def trained(module: LightningModule, data: LightningDataModule, folder: Path, strategy: Any, **settings: Any) -> dict[str, Tensor]:
    """The weights after some steps, with a validation between them."""
    trainer = Trainer(
        strategy=strategy,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        default_root_dir=folder,
        log_every_n_steps=1,
        callbacks=[Guard(GuardConfig()), Monitor(folder)],
        **settings,
    )
    trainer.fit(module, datamodule=data)
    return {name: value.cpu() for name, value in module.state_dict().items()}


def both(make: Callable[[Path], tuple[LightningModule, LightningDataModule]], folder: Path) -> None:
    """Training on the far device, and that its weights are those of training on the CPU."""
    with far_device.present(), mock.patch("nar_t2i.training.monitor.matrix_rate", lambda device, dtype: 1e12):
        far = trained(*make(folder / "far"), folder / "far", far_device.strategy())
    with torch.autograd.set_multithreading_enabled(False):
        near = trained(*make(folder / "near"), folder / "near", "auto", accelerator="cpu", devices=1)
    for name, value in near.items():
        torch.testing.assert_close(far[name], value, rtol=2e-3, atol=2e-4, msg=lambda told, name=name: f"{name}: {told}")


def codec() -> VQGAN:
    """4 × 4 tokens of 16 codes."""
    torch.manual_seed(0)
    return VQGAN(tiny.SIZE, (8, 16), blocks=1, patch=2, attention=False, quantizer=VectorQuantizer(16, 4))


def generator(text: Callable[[Path], nn.Module], **settings: Any) -> Case:
    """settings: of the module, beside `text`, which is made in a folder."""

    def make(folder: Path) -> tuple[LightningModule, LightningDataModule]:
        folder.mkdir()
        tokenizer = settings.get("tokenizer") or codec()
        scenes, tokens = RenderedScenes(count=64, image_size=tiny.SIZE), Path(TOKENS.name, tokenizer.spec.kind)
        encode_tokens(tokenizer, scenes, tokens, 16, errors=tokenizer.spec.kind == "categorical")
        data = CaptionedImages(scenes, tiny.SIZE, tiny.GLOBAL_BATCH, tiny.GLOBAL_BATCH // 2, cache=str(tokens),
                               validation=RenderedScenes("validation", 16, image_size=tiny.SIZE))  # fmt: skip
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-3, fused=True)
        defaults = {"tokenizer": tokenizer, "text": text(folder), "caption_dropout": 0.2, "optimizer": optimizer}
        return tiny.Generator(**{**defaults, **settings}), data

    return partial(both, make)


def tokenizer(folder: Path) -> tuple[LightningModule, LightningDataModule]:
    folder.mkdir()
    save_file({f"features.{name}": value for name, value in random_vgg().items()}, folder / "vgg.safetensors")
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, revive_below=0.3)
    module = TokenizerModule(
        VQGAN(tiny.SIZE, (16, 16), blocks=1, patch=2, attention=False, quantizer=quantizer),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-3), ema_decay=0.5, discriminator_start=0.3,
        discriminator=PatchDiscriminator((8, 16)), discriminator_weight=0.1, perceptual_weights=str(folder / "vgg.safetensors"),
    )  # fmt: skip
    return module, tiny.data()


def scratch(folder: Path) -> nn.Module:
    return tiny_pipeline(folder).text


def bert(folder: Path) -> nn.Module:
    return BertTextEncoder(tiny_bert(folder / "bert"), trainable="all", max_length=16)


def t5(folder: Path) -> nn.Module:
    return T5TextEncoder(tiny_t5(folder / "t5"), trainable="last_1", max_length=24, mask_padding=False)


def clip(folder: Path) -> nn.Module:
    return ClipTextEncoder(tiny_clip(folder / "clip"), trainable="none", max_length=16)


def joint(folder: Path) -> nn.Module:
    return JointTextEncoder([t5(folder), clip(folder)])


def net(made: Any, **settings: Any) -> Callable[[Any, Any], nn.Module]:
    return lambda spec, widths: tiny.with_head(made(spec, widths, **{"width": 16, "depth": 1, "heads": 2, **settings}))


def critic() -> dict[str, Any]:
    torch.manual_seed(1)
    text = ToyText().requires_grad_(False)
    drafted = net(networks.EncoderDecoder)(codec().spec, text.widths)
    return dict(
        learning=learning.CriticOf(drafted), network=partial(networks.TokenCritic, width=16, depth=1, heads=2), caption_dropout=0.0
    )


def frozen(folder: Path) -> nn.Module:
    torch.manual_seed(1)
    return ToyText().requires_grad_(False)


def resumed(*settings: str, then: Sequence[str] = ()) -> Case:
    """A run of the real command that was saved on the far device, and goes on there: with the weights of one that was not
    stopped. then: settings that change with it.
    """

    def run(run_dir: Path, *more: str) -> None:
        given = [f"--run_dir={run_dir}", "--trainer.max_steps=6", "--trainer.val_check_interval=4", *settings, *more]
        with mock.patch.object(RecipeCLI, "_instantiate_trainer", on_the_device):
            assert cli.main(["fit", "--config", str(ROOT / "tests/cluster/tiny.yaml"), *given]) == 0

    def on_the_device(self: RecipeCLI, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        return instantiate(self, {**config, "strategy": far_device.strategy(), "accelerator": "auto"}, callbacks)

    def case(folder: Path) -> None:
        with far_device.present(), mock.patch("nar_t2i.training.monitor.matrix_rate", lambda device, dtype: 1e12):
            run(folder / "whole")
            run(folder / "parts", f"--ckpt_path={folder}/whole/checkpoints/step-00000003.ckpt", *then)
        whole, parts = (load_file(folder / name / "model/network/weights.safetensors") for name in ("whole", "parts"))
        with open(folder / "parts/metrics.csv", newline="") as file:
            assert min(int(row["step"]) for row in csv.DictReader(file)) >= 3  # it did not begin anew
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, **({"rtol": 1e-4, "atol": 1e-6} if then else {"rtol": 0, "atol": 0}))

    return case


instantiate = RecipeCLI._instantiate_trainer
PROMPTS = ["a red star", "two green circles above a square", ""]


def drawn(strategy: Callable[[Any], inference.InferenceStrategy], made: Any = None, edited: bool = False, **settings: Any) -> Case:
    """Drawing on the far device, and that its tokens are those that are drawn on the CPU. strategy: of a critic's network.
    made: of the network. settings: of `sample`.
    """

    def case(folder: Path) -> None:
        t2i = tiny_pipeline(folder)
        torch.manual_seed(0)
        if made is not None:
            t2i.network = made(t2i.tokenizer.spec, t2i.text.widths)
        critic = networks.TokenCritic(t2i.tokenizer.spec, t2i.text.widths, width=16, depth=1, heads=2)
        t2i.inference = strategy(critic)
        image = torch.arange(3 * tiny.SIZE**2).reshape(3, tiny.SIZE, tiny.SIZE).byte()
        edit = Edit(image, torch.arange(tiny.SIZE) < 8 * torch.ones(tiny.SIZE, 1))

        def draw() -> Tensor:
            known = known_outside(t2i.tokenizer, edit, len(PROMPTS)) if edited else None
            sampled = t2i.sample(PROMPTS, seed=3, known=known, **settings)
            shown = composited(sampled.images, edit) if edited else sampled.images
            assert shown.shape == (len(PROMPTS), 3, tiny.SIZE, tiny.SIZE)
            return sampled.tokens

        near = draw()
        with far_device.present():
            t2i.to("far")
            critic.to("far")
            far = draw()
            assert far.device.type == "far" and torch.equal(far.cpu(), near)

    return case


def varied(folder: Path) -> None:
    codec, image = tiny_pipeline(folder).tokenizer, torch.zeros(3, tiny.SIZE, tiny.SIZE, dtype=torch.uint8)
    near = known_share(codec, image, 0.5, Noise(0, torch.arange(2)))
    with far_device.present():
        far = known_share(codec.to("far"), image, 0.5, Noise(0, torch.arange(2).to("far")))
    assert torch.equal(far.mask.cpu(), near.mask) and torch.equal(far.tokens.cpu(), near.tokens)


def encoded(folder: Path) -> None:
    """Both caches."""
    scenes, text = RenderedScenes(count=32, image_size=tiny.SIZE), scratch(folder)
    text.requires_grad_(False)
    written = {}
    for device in ("cpu", "far"):
        with far_device.present() if device == "far" else nullcontext():
            encode_tokens(codec().to("cpu"), scenes, folder / device / "tokens", 16, device=device, errors=True)
            encode_text(text, scenes, folder / device / "text", device=device)
        text.to("cpu")
        written[device] = {
            path.name: path.read_bytes() for path in (folder / device).rglob("*") if path.suffix in (".npy", ".safetensors")
        }
    assert written["far"].keys() == written["cpu"].keys() and written["cpu"]
    for name, near in written["cpu"].items():
        if name.endswith(".tokens.npy"):
            assert written["far"][name] == near
        elif name.endswith(".npy"):
            torch.testing.assert_close(*(torch.from_numpy(np.load(BytesIO(written[device][name]))) for device in ("far", "cpu")))
        else:
            far, here = (load(written[device][name]) for device in ("far", "cpu"))
            assert far.keys() == here.keys()
            for key, value in here.items():
                torch.testing.assert_close(far[key].float(), value.float(), rtol=2e-3, atol=2e-3)
    assert any(name.endswith(".errors.npy") for name in written["cpu"]) and any(
        name.endswith(".text.safetensors") for name in written["cpu"]
    )


def judged(folder: Path) -> None:
    """Features of pictures."""
    images = torch.stack(
        [torch.from_numpy(RenderedScenes(count=4, image_size=64).read(i).image).permute(2, 0, 1) for i in range(4)]
    )
    near = SceneFeatures(torch.device("cpu")).of_images(images)
    with far_device.present():
        far = SceneFeatures(torch.device("far", 0)).of_images(images)
    torch.testing.assert_close(far, near)


def scored(folder: Path) -> None:
    """A tokenizer's scores, and pictures of prompts."""
    torch.manual_seed(0)
    tokenizer, t2i = VQGAN(64, (8, 16), 1, 4, quantizer=VectorQuantizer(16, 4)), tiny_pipeline(folder)
    prompts, found = take(committed("seen"), 1), {}
    for device in ("cpu", "far"):
        with far_device.present() if device == "far" else nullcontext():
            scores = evaluate_tokenizer(tokenizer.to(device), 8, batch_size=4)
            found[device] = scores, draw_prompts(t2i.to(device), prompts, steps=2, batch_size=4).images
    (near, here), (far, there) = found["cpu"], found["far"]
    torch.testing.assert_close(far, near)
    assert here.shape == (len(prompts), 16, 16, 3) and np.array_equal(here, there)


plain = net(networks.EncoderDecoder)
CASES: dict[str, Case] = {
    "masked": generator(
        scratch, learning=learning.Masked(regions=0.5, everything=0.3, curriculum=0.5, label_smoothing=0.1), network=plain
    ),
    "masked, Muon": generator(
        scratch, network=plain, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, kind="muon", eps=1e-3)
    ),
    "masked, layers computed twice": generator(
        scratch, network=net(networks.EncoderDecoder, activation_checkpointing=True, grid_convolution=True)
    ),
    "two ways": generator(scratch, network=net(networks.TwoWayDecoder)),
    "text reader": generator(
        scratch, learning=learning.Masked(everything=1.0), network=lambda spec, widths: networks.TextReader(spec, widths, 16, 2)
    ),
    "U-ViT": generator(lambda folder: ToyText(), **tiny.uvit()),
    "BERT": generator(bert, network=plain),
    "T5": generator(t5, network=plain),
    "CLIP": generator(clip, network=plain),
    "T5 and CLIP": generator(joint, network=plain),
    "replaced": generator(scratch, learning=learning.Replaced(visible_weight=0.5), network=plain),
    "self-conditioned": generator(
        scratch, learning=learning.SelfConditioned(), network=net(networks.EncoderDecoder, self_conditioning=True)
    ),
    "unrolled": generator(scratch, learning=learning.Unrolled(3), network=plain),
    "unrolled, modes": generator(scratch, learning=learning.Unrolled(2, "mode", "masked"), network=plain),
    "progressive": generator(scratch, learning=learning.Progressive(3), network=plain, inference=inference.ProgressiveStages(3)),
    "causal": generator(
        scratch, learning=learning.Causal(), network=net(networks.CausalDecoder), inference=inference.Autoregressive()
    ),
    "prefixes": generator(scratch, **tiny.prefixes(), inference=inference.Particles(3)),
    "critic": generator(frozen, **critic()),
    "bits": generator(scratch, tokenizer=ToyCodec("binary"), network=ToyBinary),
    "continuous": generator(scratch, tokenizer=ToyCodec("continuous"), network=ToyContinuous),
    "tokenizer": partial(both, tokenizer),
    "resumed": resumed("--model.init_args.optimizer.fused=true"),
    "resumed, Muon": resumed("--model.init_args.optimizer.kind=muon"),
    "resumed, now fused": resumed("--model.init_args.optimizer.fused=false", then=["--model.init_args.optimizer.fused=true"]),
    "drawn by confidence": drawn(lambda critic: inference.Confidence(4, top_k=3, final_temperature=0.3)),
    "drawn by confidence, top_p": drawn(lambda critic: inference.Confidence(4, top_p=0.8)),
    "drawn as aMUSEd": drawn(lambda critic: inference.AmusedConfidence(4)),
    "drawn at random": drawn(lambda critic: inference.RandomOrder(4)),
    "drawn in Halton's order": drawn(lambda critic: inference.Halton(4)),
    "drawn by purity": drawn(lambda critic: inference.Purity(4)),
    "drawn by moments": drawn(lambda critic: inference.Moment(4)),
    "drawn in one step": drawn(lambda critic: inference.OneStep()),
    "drawn by entropy": drawn(lambda critic: inference.EntropyBounded(1.5)),
    "drawn by sweeps": drawn(lambda critic: inference.GibbsSweeps(inference.Confidence(3), sweeps=2, block=5)),
    "drawn in stages": drawn(lambda critic: inference.ProgressiveStages(3)),
    "drawn with a critic": drawn(lambda critic: inference.CriticGuided(critic, 4)),
    "best by likelihood": drawn(lambda critic: inference.BestOf(inference.Confidence(3), 3)),
    "best by a critic": drawn(lambda critic: inference.BestOf(inference.Halton(3), 2, inference.CriticScore(critic))),
    "drawn by next tokens": drawn(lambda critic: inference.Autoregressive(), net(networks.CausalDecoder)),
    "drawn by particles": drawn(lambda critic: inference.Particles(3), tiny.prefixes()["network"]),
    "drawn two ways": drawn(lambda critic: inference.Confidence(4), net(networks.TwoWayDecoder)),
    "drawn with a negative prompt": drawn(lambda critic: inference.Confidence(4), negative_prompts="a blue square"),
    "edited": drawn(lambda critic: inference.Confidence(4), edited=True),
    "edited token by token": drawn(lambda critic: inference.Autoregressive(), net(networks.CausalDecoder), edited=True),
    "varied": varied,
    "encoded": encoded,
    "judged": judged,
    "scored": scored,
}


def main() -> int:
    """The cases named, or all; of each a line of JSON: its name, and what went wrong, or null."""
    warnings.filterwarnings("ignore")
    logging.disable()
    far_device.register()
    torch.set_num_threads(1)
    save = PreTrainedModel.save_pretrained

    # transformers tells weights that are one from copies by their storage, which the device has none of.
    def near(self, folder, state_dict=None):
        save(self, folder, state_dict={name: value.cpu() for name, value in (state_dict or self.state_dict()).items()})

    with mock.patch.object(PreTrainedModel, "save_pretrained", near):
        for name in sys.argv[1:] or CASES:
            problem, said = None, StringIO()
            with tempfile.TemporaryDirectory() as folder, redirect_stderr(said):
                try:
                    CASES[name](Path(folder))
                except Exception:
                    problem = said.getvalue()[-1000:] + traceback.format_exc()
            print(f"{ENDED}{json.dumps([name, problem])}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
