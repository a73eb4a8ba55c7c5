"""Four toy networks pass through the trainer, the data cache and the decoders of the real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.inference import Autoregressive, Confidence
from nar_t2i.learning import Causal, Masked
from nar_t2i.noise import Noise
from nar_t2i.pipeline import TextToImage
from nar_t2i.pixels import to_float
from nar_t2i.prepare.tokens import encode_tokens
from nar_t2i.schedules import Guidance
from nar_t2i.training import GeneratorModule
from nar_t2i.training.optim import OptimizerConfig
from nar_t2i.types import Known, TokenBatch, TokenState
from tests.toys import ToyBinary, ToyCausal, ToyCodec, ToyContinuous, ToyMasked, ToyText

TOYS = {
    "masked": (ToyCodec("categorical"), ToyMasked, Masked("cosine"), Confidence(4)),
    "causal": (ToyCodec("categorical"), ToyCausal, Causal(), Autoregressive()),
    "binary": (ToyCodec("binary"), ToyBinary, Masked("linear"), Confidence(3)),
    "continuous": (ToyCodec("continuous"), ToyContinuous, Masked("cosine"), Confidence(2)),
}


def make(name: str) -> GeneratorModule:
    """A toy generator with its first weights."""
    codec, network, learning, inference = TOYS[name]
    torch.manual_seed(0)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    return GeneratorModule(codec, ToyText(), network, learning, inference, Guidance(2.0), optimizer)


def train(name: str, folder: Path, steps: int) -> GeneratorModule:
    """A toy generator after `steps` steps on cached tokens of 64 scenes."""
    source = RenderedScenes("train", 64, image_size=16)
    encode_tokens(TOYS[name][0], source, folder / "cache", batch_size=32)
    data = CaptionedImages(source, image_size=16, global_batch_size=32, micro_batch_size=16, cache=str(folder / "cache"))
    module = make(name)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert trainer.accumulate_grad_batches == 2
    return module


@torch.no_grad()
def loss_of(module: GeneratorModule) -> float:
    """On 64 other scenes, eight times each, with always the same noise."""
    source = RenderedScenes("validation", 64, image_size=16)
    samples = [source.read(index) for index in range(64)] * 8
    images = torch.stack([torch.from_numpy(sample.image).permute(2, 0, 1) for sample in samples])
    condition = module.text([sample.captions[0] for sample in samples])
    batch = TokenBatch(module.codec.encode(to_float(images)).tokens, condition)
    total, weight = module.learning.loss(module.network, batch, Noise(9, torch.arange(len(samples))), 0.0)["loss"]
    return float(total / weight)


@pytest.mark.parametrize("name", TOYS)
def test_trains_from_the_cache_saves_loads_and_decodes(name: str, tmp_path: Path) -> None:
    module = train(name, tmp_path, steps=60)
    assert loss_of(module) < 0.95 * loss_of(make(name)), "the toy does not learn"
    t2i = TextToImage.from_pretrained(tmp_path / "model", trusted=("tests",))
    prompts = ["a red circle", "two blue squares", "a green triangle"]
    sampled = t2i.sample(prompts, seed=5)
    assert sampled.images.shape == (3, 3, 16, 16) and sampled.images.dtype == torch.uint8
    assert sampled.tokens.shape == (3, 4, *t2i.tokenizer.spec.value_shape)
    assert sampled.tokens.dtype == t2i.tokenizer.spec.dtype
    assert sampled.passes == {"masked": 4, "causal": 4, "binary": 3, "continuous": 2}[name]
    assert sampled.rows == 2 * sampled.passes
    alone = t2i.sample(prompts[1], seed=6)
    torch.testing.assert_close(alone.tokens[0], sampled.tokens[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TOYS)
def test_known_tokens_never_change(name: str, tmp_path: Path) -> None:
    codec, network, _, inference = TOYS[name]
    torch.manual_seed(1)
    text, spec = ToyText(), codec.spec
    net = network(spec, text.widths)
    condition = text(["a b", "c"])
    mask = torch.tensor([[True, False, True, False], [False, False, False, True]])
    tokens = codec.encode(torch.rand(2, 3, 16, 16) * 2 - 1).tokens
    decoded = inference.decode(net, condition, condition, Noise(0, torch.arange(2)), Guidance(1.0), Known(mask, tokens))
    assert torch.equal(decoded.tokens[mask], tokens[mask])


def test_cached_and_recomputed_causal_predictions_agree() -> None:
    codec, network, *_ = TOYS["causal"]
    torch.manual_seed(2)
    text = ToyText()
    net = network(codec.spec, text.widths)
    prepared = net.prepare(text(["a b c", "d"]))
    values = torch.randint(4, (2, 4))
    state = TokenState(values, torch.zeros_like(values, dtype=torch.bool))
    whole = net(state, prepared).logits

    from nar_t2i.networks.attention import StaticCache

    cache = StaticCache(4)
    for slot in range(4):
        before = values[:, max(slot - 1, 0) : max(slot, 1)]
        one = TokenState(before, torch.zeros_like(before, dtype=torch.bool), torch.full((2, 1), slot))
        torch.testing.assert_close(net(one, prepared, cache=cache).logits[:, 0], whole[:, slot])
    assert cache.length == 4
    cache.crop(2)
    assert cache.length == 2
    changed = values.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 4
    torch.testing.assert_close(net(TokenState(changed, state.masked), prepared).logits[:, :3], whole[:, :3])
    assert not torch.allclose(net(TokenState(changed, state.masked), prepared).logits[:, 3], whole[:, 3])
