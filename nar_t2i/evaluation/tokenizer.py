"""How much of a scene a tokenizer keeps: pixels, codes, and what the detector still finds."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from nar_t2i.data.captions import RenderedScenes
from nar_t2i.data.scenes import render
from nar_t2i.evaluation.detector import matches
from nar_t2i.evaluation.scene_accuracy import detect_all
from nar_t2i.pixels import to_arrays, to_float, to_uint8
from nar_t2i.types import TokenCodec


@torch.no_grad()
def evaluate_tokenizer(codec: TokenCodec, count: int = 1000, batch_size: int = 50, workers: int = 1) -> dict[str, Any]:
    """Scores on `count` validation scenes, which no training saw.

    psnr: dB, the mean over images. codebook_use: share of codes that occur, 0 to 1. codebook_perplexity.
    detector_ratio: images whose reconstruction passes the detector, over images that pass themselves.
    """
    source = RenderedScenes("validation", count, image_size=codec.image_size)
    scenes = [source.scene(index) for index in range(count)]
    originals = torch.stack([torch.from_numpy(render(s, codec.image_size)).permute(2, 0, 1) for s in scenes])
    codec.eval()
    device = next(codec.parameters()).device
    decoded, psnr = [], []
    counts = torch.zeros(codec.spec.size, dtype=torch.float64)
    for rows in tqdm(originals.split(batch_size), desc="tokenizer", unit="batch", mininterval=0.5):
        images = to_float(rows.to(device))
        tokens = codec.encode(images).tokens
        output = codec.decode(tokens).float().clamp(-1, 1)
        psnr.append(10 * torch.log10(4 / (output - images).square().mean((1, 2, 3))).cpu())
        counts += torch.bincount(tokens.flatten().cpu(), minlength=codec.spec.size)
        decoded.append(to_uint8(output).cpu())
    pictures = [to_arrays(torch.cat(decoded)), to_arrays(originals)]
    kept, found = (
        sum(matches(d, s.groups, s.relation) for d, s in zip(detect_all(p, workers), scenes, strict=True)) for p in pictures
    )
    share = counts / counts.sum()
    return {
        "psnr": float(torch.cat(psnr).mean()),
        "codebook_use": float((counts > 0).double().mean()),
        "codebook_perplexity": float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum())),
        "detector_ratio": kept / found,
        "detector_accuracy": kept / count,
        "images": count,
    }
