"""aMUSEd twice on the same random weights: diffusers' pipeline around its own class, and our network and decoder.

The pipeline is the real one (AmusedPipeline, UVit2DModel, AmusedScheduler), given text states in place of a text encoder and
asked for tokens in place of pixels, on both sides alike.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from nar_t2i.inference import AmusedConfidence
from nar_t2i.networks import UVit
from nar_t2i.networks.uvit_weights import load_amused, settings_of
from nar_t2i.noise import Noise, gumbel
from nar_t2i.schedules import Guidance, mask_ratio
from nar_t2i.types import Condition, Decoded, TokenState

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel
    from diffusers.schedulers import scheduling_amused
    from diffusers.utils import logging

logging.set_verbosity_error()

STEPS, SCALE, TEMPERATURE = 12, 10.0, 2.0  # the pipeline's own
WORDS = 77  # CLIP's texts, padding included, which aMUSEd reads
PEAKED = 2.5  # the deviation of guided logits: as a trained network's, they leave a few codes likely

_SMALL = dict(
    hidden_size=192, in_channels=128, block_out_channels=128, block_num_heads=2, num_attention_heads=3, num_hidden_layers=4,
    intermediate_size=512, num_res_blocks=2, codebook_size=1024, vocab_size=1088, cond_embed_dim=128, encoder_hidden_size=128,
)  # fmt: skip
_TINY = dict(
    hidden_size=32, in_channels=24, block_out_channels=24, block_num_heads=2, num_attention_heads=2, num_hidden_layers=2,
    intermediate_size=64, num_res_blocks=1, codebook_size=64, vocab_size=72, cond_embed_dim=16, encoder_hidden_size=16,
    micro_cond_encode_dim=8, micro_cond_embed_dim=40,
)  # fmt: skip
_HALVING = dict(downsample=True, upsample=True)
# Arguments of UVit2DModel, whose defaults are those of 256 px.
GEOMETRIES = {
    "256": dict(sample_size=16),
    "512": dict(sample_size=32, **_HALVING),
    "256-shallow": dict(sample_size=16, num_hidden_layers=2, num_res_blocks=1),  # as wide, for a CPU
    "small": dict(sample_size=16, **_SMALL),
    "tiny": dict(sample_size=6, **_TINY),
    "tiny-512": dict(sample_size=12, **_TINY, **_HALVING),
}


class ConfidenceOf(AmusedConfidence):
    """AmusedConfidence whose cosines are a device's own, as AmusedScheduler's are: their last digits may differ."""

    def __init__(self, device: torch.device):
        super().__init__(STEPS, choice_temperature=TEMPERATURE)
        self._ratios = mask_ratio("cosine", torch.arange(1, STEPS + 1, device=device) / STEPS).cpu()

    def ratios(self) -> Tensor:
        """(STEPS,) shares of the tokens that stay masked after each step."""
        return self._ratios


class Amused:
    """Both sides, in evaluation mode, without gradients. `to` changes the type of both."""

    def __init__(self, geometry: str, device: torch.device, seed: int = 0):
        torch.manual_seed(seed)
        with device:
            self.unet = UVit2DModel(**GEOMETRIES[geometry]).eval().requires_grad_(False)
        self.device, self.config = device, self.unet.config
        for name, p in self.unet.named_parameters():
            if name.endswith((".gamma", ".beta")):  # which start at zero
                torch.nn.init.normal_(p, std=0.1)
        with torch.device("meta"):
            self.network = UVit(**settings_of(self.config))
        self.network.to_empty(device=device)
        self.mask = self.config.vocab_size - 1
        self.pipeline = AmusedPipeline(None, None, None, self.unet, AmusedScheduler(mask_token_id=self.mask))
        self.pipeline.vae_scale_factor = 16  # that of its VQGAN, which is not here
        self.pipeline.set_progress_bar_config(disable=True)
        self.inference, self.guidance = ConfidenceOf(device), Guidance(SCALE)
        prompts, empty = self.theirs_once(self.state(1), self.texts(1))
        self.unet.mlm_layer.conv2.weight.mul_(PEAKED / (empty + SCALE * (prompts - empty)).std())
        load_amused(self.network, self.unet.state_dict()).eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights of both."""
        return self.unet.dtype

    def to(self, dtype: torch.dtype) -> None:
        """Change the type of the weights of both, in place."""
        self.unet.to(dtype)
        self.network.to(dtype)

    def texts(self, batch: int) -> tuple[Condition, Condition]:
        """Random states of prompts, (batch, WORDS, width) and pooled (batch, width), and of the empty prompt beside each."""
        draw = torch.Generator().manual_seed(1)
        shapes = (2 * batch, WORDS, self.config.encoder_hidden_size), (2 * batch, self.config.cond_embed_dim)
        states, pooled = (torch.randn(shape, generator=draw).to(self.device, self.dtype) for shape in shapes)
        mask = torch.ones(batch, WORDS, dtype=torch.bool, device=self.device)
        return tuple(Condition((states[rows],), (mask,), pooled[rows]) for rows in (slice(batch), slice(batch, None)))

    def state(self, batch: int) -> TokenState:
        """(batch, N) tokens of which a bit more than half are masked, the same for both rows of an image."""
        draw, shape = torch.Generator().manual_seed(2), (batch, self.config.sample_size**2)
        values, masked = torch.randint(self.config.codebook_size, shape, generator=draw), torch.rand(shape, generator=draw) < 0.6
        return TokenState(values.to(self.device), masked.to(self.device))

    @torch.no_grad()
    def theirs_once(self, state: TokenState, texts: tuple[Condition, Condition]) -> Tensor:
        """(2B, N, V) logits of diffusers' class: of the prompts, then of the empty ones."""
        side = self.config.sample_size
        tokens = torch.where(state.masked, self.mask, state.values).view(-1, side, side).repeat(2, 1, 1)
        micro = torch.tensor([list(self.network.micro_conditions.values())], device=self.device, dtype=self.dtype)
        states, pooled = (torch.cat(parts) for parts in ([t.states[0] for t in texts], [t.pooled for t in texts]))
        return self.unet(tokens, states, pooled, micro.expand(len(tokens), -1)).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def ours_once(self, state: TokenState, texts: tuple[Condition, Condition]) -> Tensor:
        """The same of our network, in fp32."""
        (states, masks, pooled, _), null = texts
        both = Condition(
            (torch.cat([*states, *null.states]),), (torch.cat([*masks, *null.masks]),), torch.cat([pooled, null.pooled])
        )
        twice = TokenState(state.values.repeat(2, 1), state.masked.repeat(2, 1))
        return self.network(twice, self.network.prepare(both)).logits

    def theirs(self, texts: tuple[Condition, Condition]) -> Tensor:
        """(B, N) tokens of the pipeline, drawn by torch's generator."""
        prompts, null = texts
        side = 16 * self.config.sample_size
        images = self.pipeline(
            prompt_embeds=prompts.pooled, encoder_hidden_states=prompts.states[0], negative_prompt_embeds=null.pooled,
            negative_encoder_hidden_states=null.states[0], height=side, width=side, num_inference_steps=STEPS, guidance_scale=SCALE,
            output_type="latent",
        ).images  # fmt: skip
        return images.flatten(1)

    def ours(self, texts: tuple[Condition, Condition], noise: Noise) -> Decoded:
        """(B, N) tokens of our network and decoder, drawn by `noise`."""
        return self.inference.decode(self.network, *texts, noise, self.guidance)

    def noise(self, batch: int) -> Noise:
        """Of the samples 0 to batch − 1."""
        return Noise(0, torch.arange(batch, device=self.device))


@contextlib.contextmanager
def one_table(noise: Noise, length: int) -> Iterator[None]:
    """AmusedScheduler takes its draws from `noise`, where our decoder takes them: tokens by the inverse of the distribution
    function, and the luck of each choice."""
    slots, step = torch.arange(length, device=noise.ids.device).expand(len(noise.ids), -1), -1

    def multinomial(probabilities: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        nonlocal step
        step += 1
        mass = probabilities.float().cumsum(-1)
        drawn = noise.at(step, slots).uniform("value").flatten()[:, None] * mass[:, -1:]
        return (mass < drawn).sum(-1, keepdim=True)

    def luck(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return gumbel(noise.at(step, slots).uniform("choice"))

    with mock.patch.object(torch, "multinomial", multinomial), mock.patch.object(scheduling_amused, "gumbel_noise", luck):
        yield
