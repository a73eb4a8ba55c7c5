"""Pictures, and captions, as the features that metrics compare. Each kind tells its protocol: weights, their hash, the resize.

Weights are files of the user's; nothing is downloaded, and none stands in for another.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from nar_t2i.errors import UserError
from nar_t2i.evaluation.scene_features import SIDE, shipped_network
from nar_t2i.files import read_json
from nar_t2i.hashing import file_hash, text_hash, weights_hash
from nar_t2i.pixels import to_arrays

PROBES = "red", "two"  # captions of the same length that a tokenizer must tell apart
FILTERS = {name: getattr(Image.Resampling, name.upper()) for name in ("bilinear", "bicubic", "lanczos")}


class Features:
    """A network that turns pictures, and perhaps captions, into vectors.

    name: by which metrics ask for it. protocol: plain values. has_texts: whether captions have such features, too.
    """

    name: str
    protocol: dict[str, Any]
    has_texts = False

    def of_images(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 → (B, D) float32, on the CPU."""
        raise NotImplementedError

    def of_texts(self, texts: list[str]) -> Tensor:
        """B captions → (B, D) float32, on the CPU."""
        raise NotImplementedError


class SceneFeatures(Features):
    """Of the network that travels with the package; see `nar_t2i.evaluation.scene_features`."""

    name = "scene"

    def __init__(self, device: torch.device):
        self._network, self._device = shipped_network().to(device), device
        self.protocol = {
            "network": "nar_t2i scene features, 64 numbers; not Inception", "weights_hash": weights_hash(self._network),
            "resize": f"bilinear with antialiasing to {SIDE} px, where they have another size",
        }  # fmt: skip

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        return self._network(images.to(self._device)).float().cpu()


class InceptionFeatures(Features):
    """Of a TorchScript file that maps images to (B, D): FID's Inception, as the user has it.

    file: where a module's forward has an argument `return_features`, as that of StyleGAN's inception-2015-12-05.pt, it is True.
    input: what it takes: "uint8", "unit" (float32 in [0, 1]) or "symmetric" (in [−1, 1]). resize: pixels a side to which
    pictures are brought before, in float32 and a channel at a time, as clean-fid does (arXiv 2104.11222); None leaves it to
    the module. filter: of the resize, antialiased. Raises UserError where the file is no such module.
    """

    name = "inception"

    def __init__(
        self,
        file: str | Path,
        device: torch.device,
        input: Literal["uint8", "unit", "symmetric"] = "uint8",
        resize: int | None = None,
        filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic",
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch recommends other files; FID's weights are spread as these
                self._module = torch.jit.load(str(file), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"--inception {file}: not a TorchScript file: {str(error).strip().splitlines()[0]}") from error
        names = [argument.name for argument in self._module.forward.schema.arguments]
        self._arguments = {"return_features": True} if "return_features" in names else {}
        self._file, self._device, self._input, self._resize, self._filter = file, device, input, resize, filter
        how = f"{filter} with antialiasing to {resize} px, float32, each channel by itself" if resize else "left to the module"
        self.protocol = {
            "file": Path(file).name, "sha256": file_hash(file), "input": input, "resize": how, "arguments": self._arguments,
        }  # fmt: skip

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        pixels = images if self._resize is None else resized(images, self._resize, self._filter)
        if self._input == "uint8":
            pixels = pixels.round().clamp(0, 255).byte() if pixels.is_floating_point() else pixels
        else:
            pixels = pixels.float() / 255
            pixels = pixels if self._input == "unit" else 2 * pixels - 1
        try:
            features = self._module(pixels.to(self._device), **self._arguments)
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"--inception {self._file}: does not take {self._input} images {tuple(pixels.shape)}: {reason}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"--inception {self._file}: must give (B, D) features, and gives {shape} for {len(images)} images")
        return _finite(features.float().cpu(), f"--inception {self._file}")


class ClipFeatures(Features):
    """Embeddings of unit length of a local folder of transformers' CLIPModel: both towers, its tokenizer, its preprocessing.

    Raises UserError where the folder is missing or not whole. Only safetensors are read. Of captions that are too long the
    first words count.
    """

    name = "clip"
    has_texts = True

    def __init__(self, folder: str | Path, device: torch.device):
        from transformers import AutoTokenizer, CLIPModel

        folder = self._folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"--clip {folder}: no such folder; it is one that transformers saved, with both towers of CLIP")
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise UserError(f"--clip {folder}: holds no .safetensors")
        # As CLIPImageProcessor saves it, or CLIPProcessor with the tokenizer's settings beside it.
        older = folder / "preprocessor_config.json"
        how = read_json(older if older.exists() else folder / "processor_config.json")
        try:
            how = how.get("image_processor", how)
            self._size = _side(how["crop_size"])
            self._shorter, self._resample = _side(how["size"]), Image.Resampling(how.get("resample", 3))
            self._mean, self._std = (torch.tensor(how[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
            model, report = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are told below
            )  # fmt: skip
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--clip {folder}: not a whole folder of a CLIPModel: {reason}") from error
        vocabulary, reads = self._tokenizer.get_vocab(), self._tokenizer(list(PROBES))["input_ids"]
        most = model.config.text_config.vocab_size
        if len({tuple(ids) for ids in reads}) < len(PROBES) or max(vocabulary.values()) >= most:
            # Where its files are missing, transformers makes one up that knows no word.
            raise UserError(f"--clip {folder}: not a whole folder of a CLIPModel: its tokenizer is not that of its {most} words")
        # What is missing would be drawn at random, on each rank anew; the scale of logits is not asked.
        absent = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
        if wrong := sorted(name for name in map(str, absent) if name != "logit_scale" and "position_ids" not in name):
            raise UserError(
                f"--clip {folder}: not a whole folder of a CLIPModel: has no {wrong[0]} as its config.json describes it"
            )
        self._model = model.to(device).eval()
        self._length, self._device = self._model.config.text_config.max_position_embeddings, device
        self.protocol = {
            "folder": folder.resolve().name, "sha256": {file.name: file_hash(file) for file in weights},
            "resize": f"shorter side to {self._shorter} px, {self._resample.name.lower()}, centre crop of {self._size} px",
            "pixels": f"less {_listed(self._mean)}, over {_listed(self._std)}",
            "towers": {tower: f"{config.hidden_act}, {config.num_attention_heads} heads, epsilon {config.layer_norm_eps}"
                       for tower, config in (("text", model.config.text_config), ("vision", model.config.vision_config))},
            "captions": f"the first {self._length} tokens", "precision": "fp32",
            "vocabulary": text_hash(json.dumps([sorted(vocabulary.items()), reads])),
        }  # fmt: skip

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        rows = [self._seen(image) for image in to_arrays(images)]
        pixels = (torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
        states = self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
        return _finite(F.normalize(self._model.visual_projection(states), dim=-1).cpu(), f"--clip {self._folder}")

    def _seen(self, image: np.ndarray) -> np.ndarray:
        side = self._shorter
        image = Image.fromarray(image).resize((side, side), self._resample)
        corner = (side - self._size) // 2
        return np.asarray(image.crop((corner, corner, corner + self._size, corner + self._size)))

    @torch.no_grad()
    def of_texts(self, texts: list[str]) -> Tensor:
        codes = self._tokenizer(texts, padding=True, truncation=True, max_length=self._length, return_tensors="pt").to(self._device)
        states = self._model.text_model(input_ids=codes["input_ids"], attention_mask=codes["attention_mask"]).pooler_output
        return _finite(F.normalize(self._model.text_projection(states), dim=-1).cpu(), f"--clip {self._folder}")


def _listed(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())


def _finite(features: Tensor, option: str) -> Tensor:
    if not torch.isfinite(features).all():
        raise UserError(f"{option}: gives features that are not finite; does it take other pixels than these?")
    return features


def resized(images: Tensor, side: int, filter: str) -> Tensor:
    """(B, 3, S, S) uint8 → (B, 3, side, side) float32, 0 to 255 and a little beyond; Pillow's filters, unrounded."""
    planes = images.cpu().flatten(0, 1).numpy().astype(np.float32)
    rows = [np.asarray(Image.fromarray(plane).resize((side, side), FILTERS[filter])) for plane in planes]
    return torch.from_numpy(np.stack(rows)).view(len(images), 3, side, side)


def _side(size: Any) -> int:
    """Of a preprocessor's sizes, which are numbers or {"shortest_edge": n} or {"height": n, "width": n}."""
    return int(size.get("shortest_edge", size.get("height"))) if isinstance(size, dict) else int(size)
