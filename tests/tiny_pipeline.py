"""A whole pipeline small enough to build and run in an instant: 16 px, 4 × 4 tokens of 16 codes, untrained."""

from __future__ import annotations

from pathlib import Path

import torch

from nar_t2i.inference import Confidence
from nar_t2i.networks import EncoderDecoder
from nar_t2i.pipeline import TextToImage
from nar_t2i.prepare.sentencepiece import train_sentencepiece
from nar_t2i.schedules import Guidance
from nar_t2i.text.null import NullCaption
from nar_t2i.text.scratch import ScratchTextEncoder
from nar_t2i.tokenizers.quantizers import VectorQuantizer
from nar_t2i.tokenizers.vqgan import VQGAN

CAPTIONS = ["a red star above a blue square", "two green circles", "a photo of a yellow triangle"]


def tiny_pipeline(folder: Path, steps: int = 4, seed: int = 0) -> TextToImage:
    """The vocabulary is written into `folder`. The head is drawn at random, so that prompts make a difference."""
    vocabulary = folder / "tiny.model"
    train_sentencepiece(CAPTIONS * 4, vocabulary, 300)
    torch.manual_seed(seed)
    codec = VQGAN(16, (8, 16), blocks=1, patch=2, attention=False, quantizer=VectorQuantizer(16, 4))
    text = ScratchTextEncoder(str(vocabulary), width=16, depth=1, heads=2, max_length=24)
    network = EncoderDecoder(codec.spec, text.widths, width=16, depth=1, heads=2)
    torch.nn.init.normal_(network.head.logits.weight, std=0.3)
    for part in (text.embedding.weight, text.position):
        torch.nn.init.normal_(part, std=1.0)
    null = NullCaption(text.widths, text.pooled_width)
    return TextToImage(codec, text, null, network, Confidence(steps), Guidance(3.0))
