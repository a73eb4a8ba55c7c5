"""A generator on real rendered scenes that takes milliseconds a step, with the real masked loss."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer

from nar_t2i.data import CaptionedImages
from nar_t2i.data.captions import RenderedScenes
from nar_t2i.inference import Confidence
from nar_t2i.learning import CriticOf, Masked, Prefixes
from nar_t2i.networks import EncoderDecoder, PrefixDecoder, TokenCritic, UVit
from nar_t2i.schedules import Guidance
from nar_t2i.training import GeneratorModule
from nar_t2i.training.optim import OptimizerConfig
from tests.toys import WIDTH, ToyCodec, ToyText

SIZE = 16
GLOBAL_BATCH = 16


class Generator(GeneratorModule):
    """sgd: plain gradient descent, whose updates show a gradient's size, which AdamW hides."""

    def __init__(self, sgd: bool = False, **kwargs: Any) -> None:
        torch.manual_seed(0)
        # The bias of attention's keys has no gradient but rounding, which AdamW would take for one: hence the large eps.
        defaults: dict[str, Any] = dict(
            tokenizer=ToyCodec(), text=ToyText(), network=network, learning=Masked(), inference=Confidence(2),
            guidance=Guidance(2.0), optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-3), ema_decay=0.9,
        )  # fmt: skip
        super().__init__(**{**defaults, **kwargs})
        self.sgd = sgd

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5) if self.sgd else super().configure_optimizers()


def network(spec: Any, widths: Any) -> EncoderDecoder:
    return with_head(EncoderDecoder(spec, widths, width=16, depth=1, heads=2))


def with_head(net: Any) -> Any:
    """Its head starts at zero, where most weights have no gradient."""
    torch.nn.init.normal_(net.head.logits.weight, std=0.3)
    return net


def critic() -> dict[str, Any]:
    """What makes it the training of a critic, beside the frozen text encoder of a frozen generator."""
    torch.manual_seed(1)
    text, spec = ToyText().requires_grad_(False), ToyCodec().spec
    made = partial(TokenCritic, width=16, depth=1, heads=2)
    return dict(text=text, learning=CriticOf(network(spec, text.widths)), network=made, caption_dropout=0.0)


def prefixes() -> dict[str, Any]:
    """What makes it the training of a network that reads prefixes."""
    made = partial(PrefixDecoder, width=16, depth=2, heads=2, grid_convolution=True, stages=[1, 2])
    return dict(learning=Prefixes(), network=made)


def uvit() -> dict[str, Any]:
    """What makes it the training of aMUSEd's network, each layer of which is computed once more in the backward pass."""
    made = partial(
        UVit,
        pooled_width=WIDTH,
        width=16,
        depth=1,
        heads=2,
        mlp_width=32,
        channels=16,
        channel_heads=2,
        stages=1,
        embedding_width=8,
        halving=True,
        micro_width=4,
        activation_checkpointing=True,
    )
    return dict(network=lambda spec, widths: with_head(made(spec, widths)), null_length=3)


def data(micro_batch_size: int | None = None) -> CaptionedImages:
    scenes = RenderedScenes(count=200, image_size=SIZE)
    return CaptionedImages(
        scenes, SIZE, GLOBAL_BATCH, micro_batch_size, validation=RenderedScenes("validation", 8, image_size=SIZE)
    )


def trainer(strategy: Any, ranks: int, steps: int, **kwargs: Any) -> Trainer:
    settings = dict(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    return Trainer(accelerator="cpu", devices=ranks, strategy=strategy, max_steps=steps, **{**settings, **kwargs})
