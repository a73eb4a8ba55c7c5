"""`nar-t2i evaluate`: how well a model draws, by as many metrics as are asked for, on as many ranks as there are.

    OUT.json         the numbers, each with the protocol that it was made by
    OUT.work/        settings.json, and what is drawn, in pieces (see nar_t2i.evaluation.pieces): features and what the detector
                     found; sheet-NAME.png, the first pictures. It can be deleted when OUT.json is there

Sample i is drawn with seed + i. Every sample is drawn by one rank; the first computes the numbers from the features of all,
so that they are the same on any number of ranks. Nothing stands in for weights that are missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nar_t2i import __version__
from nar_t2i.errors import UserError
from nar_t2i.evaluation import scene_accuracy
from nar_t2i.evaluation.chosen import RESIZE, Chosen, open_data
from nar_t2i.evaluation.detector import MIN_SIDE, DetectedObject, Detection
from nar_t2i.evaluation.drawing import Sampler
from nar_t2i.evaluation.features import ClipFeatures, Features, InceptionFeatures, SceneFeatures
from nar_t2i.evaluation.metrics import Compared
from nar_t2i.evaluation.pieces import Piece, Pieces, work_folder
from nar_t2i.evaluation.protocol import NEEDS, Protocol, chosen_metrics, read_protocol
from nar_t2i.evaluation.ranks import Ranks, ranks
from nar_t2i.evaluation.scene_prompts import ScenePrompt, committed, load, take
from nar_t2i.files import file_to_write, read_json, write_json
from nar_t2i.folders import check_same
from nar_t2i.hardware import describe_machine, exact_fp32
from nar_t2i.hashing import text_hash
from nar_t2i.pictures import contact_sheet, save_whole
from nar_t2i.pipeline import TextToImage
from nar_t2i.pixels import to_arrays, to_pil
from nar_t2i.training.models import EXPORTED, Opened, open_models

FORMAT = 1
SHOWN = 32  # pictures of a sheet
SUITE = "suite"  # a key that the settings of a suite's pictures have
SHUFFLED = "shuffled"  # the control, beside the sets of prompts


def main(arguments: argparse.Namespace) -> int:
    protocol = read_plan(arguments)
    exact_fp32()
    with ranks() as group:
        evaluation = Evaluation(arguments, protocol, group)
        try:
            evaluation.work()
        except UserError:
            evaluation.leave_nothing()
            raise
        group.on_first(evaluation.write)
    return 0


def read_plan(arguments: argparse.Namespace) -> Protocol:
    """What the command line asks for. UserError where options are missing, or say what the protocol says already."""
    given = [name for name in ("metrics", "count", "seed") if getattr(arguments, name) is not None]
    if arguments.protocol is not None:
        if given:
            raise UserError(f"--{given[0]}: is fixed by the protocol {arguments.protocol}; leave one of them out")
        protocol = read_protocol(arguments.protocol)
    else:
        metrics, accuracy = chosen_metrics(
            ["scene_accuracy"] if arguments.metrics is None else [name.strip() for name in arguments.metrics.split(",")]
        )
        protocol = Protocol(None, metrics, accuracy, arguments.count, arguments.seed or 0)
    for metric in protocol.metrics:
        if metric.features in NEEDS and getattr(arguments, metric.features) is None:
            raise UserError(f"{metric.name} needs {NEEDS[metric.features]}; nothing stands in for its weights")
        if arguments.data is None:
            raise UserError(f"{metric.name} needs --data: captions to draw, and their pictures to compare with")
    used = {metric.features for metric in protocol.metrics}
    for name, value, has_use in (("data", arguments.data, used), ("count", arguments.count, used),
                                 *((kind, getattr(arguments, kind), kind in used) for kind in NEEDS)):  # fmt: skip
        if value is not None and not has_use:
            raise UserError(f"--{name}: none of the metrics uses it; name others with --metrics")
    if not protocol.scene_accuracy and (arguments.prompts or arguments.per_category):
        raise UserError("--prompts and --per-category are for scene_accuracy, which is none of the metrics")
    if arguments.per_category is not None and arguments.per_category < 1:
        raise UserError(f"--per-category must be at least 1, not {arguments.per_category}")
    for name in ("batch_size", "count"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return protocol


class Evaluation:
    """What is evaluated, and how far it is."""

    def __init__(self, arguments: argparse.Namespace, protocol: Protocol, group: Ranks):
        self.arguments, self.protocol, self.group = arguments, protocol, group
        self.out = file_to_write("--out", arguments.out, "evaluation")
        self.folder = work_folder(self.out)
        self._made = False  # whether this process made the folder
        self.models: list[Opened] = []
        self.decoding: dict[str, dict[str, Any]] = {}
        self.pieces: dict[str, Pieces] = {}
        self.prompts: dict[str, list[ScenePrompt]] = _scene_prompts(arguments) if protocol.scene_accuracy else {}
        self.features: list[Features] = []
        self.drawn: Chosen | None = None
        self.real: Chosen | None = None
        self.image_size: int | None = None  # of what is drawn, and compared with

    def work(self) -> None:
        """Draw all that is missing. All ranks must call it."""
        self.group.on_first(self._make_folder)
        self.models = open_models(Path(self.arguments.model), self.arguments.weights, self.folder, self.group)
        self.features = self.group.together(self._open_features)
        for number, model in enumerate(self.models):
            t2i = self.group.together(lambda: TextToImage.from_pretrained(model.folder)).to(self.group.device)
            draw = self.group.together(lambda: self._sampler(t2i))
            self.decoding[model.name] = draw.settings(self.protocol.seed)
            if number == 0:
                self.group.together(lambda: self._open_data(t2i.tokenizer.image_size))
                self.group.on_first(self._check_settings)
                if self.real is not None:
                    self._work("real", self.real, lambda samples: self._real_piece(samples, t2i.tokenizer.image_size))
            for name, prompts in self.prompts.items():
                self._work(
                    f"{model.name}-scenes-{name}", prompts, lambda samples: self._scene_piece(draw, prompts, samples, model.name)
                )
            if self.drawn is not None:
                self._work(f"{model.name}-captions", self.drawn, lambda samples: self._caption_piece(draw, samples, model.name))

    def leave_nothing(self) -> None:
        """Take away the folder that this command made, where it could not begin."""
        if self._made and not self._holds_pieces():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _holds_pieces(self) -> bool:
        return any(not file.parent.name.startswith(EXPORTED) for file in self.folder.glob("*/*.safetensors"))

    def write(self) -> None:
        """Compute the numbers and write them."""
        results = {model.name: self._results(model.name) for model in self.models}
        content: dict[str, Any] = {
            "format": FORMAT, "kind": "evaluation", "settings": _hash(self._settings()),
            "model": {"path": str(self.arguments.model), **{model.name: model.facts for model in self.models}},
            "protocol": self._told(), "results": results, "machine": describe_machine(),
            "versions": {"nar_t2i": __version__, "torch": torch.__version__},
        }  # fmt: skip
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.out, content)
        for name, result in results.items():
            print("\n".join(f"{name}: {line}" for line in lines(result)))
        print(f"written to {self.out}")

    # Opening

    def _open_features(self) -> list[Features]:
        device, arguments = self.group.device, self.arguments
        kinds = {
            "inception": lambda: InceptionFeatures(arguments.inception, device, **self.protocol.inception),
            "clip": lambda: ClipFeatures(arguments.clip, device),
            "scene": lambda: SceneFeatures(device),
        }
        return [kinds[name]() for name in self.protocol.features]

    def _open_data(self, image_size: int) -> None:
        if self.prompts and image_size < MIN_SIDE:
            raise UserError(f"scene_accuracy: the detector needs {MIN_SIDE} px a side, and the model draws {image_size}")
        if not self.protocol.metrics:
            return
        protocol = self.protocol
        self.image_size = image_size
        source = open_data(self.arguments.data, protocol.count, image_size)
        self.drawn = Chosen(source, protocol.count, protocol.choice_seed, protocol.caption)
        if any(metric.needs_real for metric in protocol.metrics):
            self.real = self.drawn if protocol.reference == "same" else Chosen(source, None)
        for metric in protocol.metrics:
            metric.check(len(self.drawn), len(self.real) if metric.needs_real else None)

    def _settings(self) -> dict[str, Any]:
        """What the pieces depend on."""
        arguments = self.arguments
        return {
            "model": self.models[0].identity, "steps": arguments.steps, "guidance_scale": arguments.guidance_scale,
            "candidates": arguments.candidates, "precision": arguments.precision, "batch_size": arguments.batch_size,
            "seed": self.protocol.seed,
            "prompts": {name: text_hash(repr(prompts)) for name, prompts in self.prompts.items()},
            "data": self.drawn and self.drawn.identity(), "reference": self.protocol.reference,
            "features": {features.name: features.protocol for features in self.features},  # all of what each can say is kept
        }  # fmt: skip

    def _make_folder(self) -> None:
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)

    def _check_settings(self) -> None:
        path, settings = self.folder / "settings.json", self._settings()
        before = read_json(self.out) if self.out.is_file() and self.out.stat().st_size else {}
        if path.exists() and SUITE in read_json(path):
            raise UserError(f"--out {self.out}: {path} is of a suite's pictures; name another file")
        if self._holds_pieces():  # something was drawn by them
            check_same(path, settings)
        elif before.get("settings") not in (None, _hash(settings)):
            raise UserError(f"--out {self.out}: holds an evaluation of something else; name another file, or delete it")
        else:
            write_json(path, settings)
        if others := sorted({*before.get("results", {})} - {model.name for model in self.models}):
            raise UserError(
                f"--out {self.out}: holds numbers of the {others[0]} weights, which would be lost; name another file, or take "
                "--weights both"
            )

    # Drawing

    def _work(self, name: str, samples: Sequence[Any] | Chosen, make: Any) -> None:
        self.pieces[name] = Pieces(self.folder / name, len(samples), self.arguments.batch_size, make)
        self.pieces[name].work(self.group)

    def _sampler(self, t2i: TextToImage) -> Sampler:
        asked = self.arguments
        bf16 = asked.precision == "bf16-mixed"
        return Sampler(t2i, asked.steps, asked.guidance_scale, asked.candidates, bf16, asked.batch_size)

    def _draw(self, draw: Sampler, prompts: Sequence[str], samples: range) -> tuple[torch.Tensor, dict[str, Any]]:
        """Pictures (B, 3, S, S) uint8 of samples by number, and facts for the notes."""
        text = draw.t2i.text
        encoded, truncated = text.encoded, text.truncated
        drawn = draw(prompts, [self.protocol.seed + i for i in samples])
        facts = {
            "passes": drawn.passes,
            "rows": drawn.rows,
            "encoded": text.encoded - encoded,
            "truncated": text.truncated - truncated,
        }
        return drawn.images, facts

    def _scene_piece(self, draw: Sampler, prompts: list[ScenePrompt], samples: range, name: str) -> Piece:
        texts = [prompts[i].prompt for i in samples]
        images, facts = self._draw(draw, texts, samples)
        self._sheet(name, "scenes", images, texts, samples)
        found = scene_accuracy.detect_all(to_arrays(images))
        return Piece({"samples": torch.tensor(samples)}, {**facts, "found": [asdict(detection) for detection in found]})

    def _caption_piece(self, draw: Sampler, samples: range, name: str) -> Piece:
        texts = self.drawn.captions(samples)
        images, facts = self._draw(draw, texts, samples)
        self._sheet(name, "captions", images, texts, samples)
        tensors = {features.name: features.of_images(images) for features in self.features}
        tensors |= {f"{features.name}-texts": features.of_texts(texts) for features in self.features if features.has_texts}
        return Piece(tensors, facts)

    def _real_piece(self, samples: range, size: int) -> Piece:
        images = self.real.images(samples, size)
        return Piece({features.name: features.of_images(images) for features in self.features}, {})

    def _sheet(self, name: str, kind: str, images: torch.Tensor, texts: list[str], samples: range) -> None:
        if samples.start == 0:
            save_whole(contact_sheet(to_pil(images[:SHOWN]), texts[:SHOWN]), self.folder / f"sheet-{name}-{kind}.png")

    # Numbers

    def _results(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = {"decoding": self.decoding[name]}
        notes: list[dict[str, Any]] = []
        if self.prompts:
            scores: dict[str, Any] = {}
            for number, (which, prompts) in enumerate(self.prompts.items()):
                _, facts = self.pieces[f"{name}-scenes-{which}"].gathered()
                found = [_detection(value) for piece in facts for value in piece["found"]]
                scores[which] = scene_accuracy.score(found, prompts)
                if number == 0:
                    shuffled = {**scene_accuracy.shuffled(found, prompts), "chance": scene_accuracy.chance(prompts)}
                notes += facts
            result["scene_accuracy"] = {**scores, SHUFFLED: shuffled}
        if self.drawn is not None:
            tensors, facts = self.pieces[f"{name}-captions"].gathered()
            real = self.pieces["real"].gathered()[0] if self.real is not None else {}
            notes += facts
            device = self.group.device
            for metric in self.protocol.metrics:
                kinds = (tensors[metric.features], real.get(metric.features), tensors.get(f"{metric.features}-texts"))
                of_kinds = (kind if kind is None else kind.to(device) for kind in kinds)
                result[metric.name] = metric.result(Compared(*of_kinds, paired=self.protocol.reference == "same"))
        result["decoding"] |= {
            "decoder_passes": max(piece["passes"] for piece in notes), "decoder_rows": max(piece["rows"] for piece in notes),
            "truncated_prompts": sum(piece["truncated"] for piece in notes) / max(1, sum(piece["encoded"] for piece in notes)),
        }  # fmt: skip
        return result

    def _told(self) -> dict[str, Any]:
        """How the pictures were chosen and compared, for the reader of the numbers."""
        protocol = self.protocol
        told: dict[str, Any] = {"name": protocol.name, "seed": protocol.seed}
        if self.drawn is not None:
            told["data"] = self.drawn.identity()
            told["real"] = (
                {"which": protocol.reference, "resize": RESIZE, "pixels": self.image_size} if self.real is not None else None
            )
            told["features"] = {features.name: features.protocol for features in self.features}
        if self.arguments.prompts or self.arguments.per_category:
            told["scene_prompts"] = {name: text_hash(repr(prompts)) for name, prompts in self.prompts.items()}
            told["scene_prompts"][SHUFFLED] = next(iter(told["scene_prompts"].values()))  # whose captions it shuffles
        return told


def lines(result: dict[str, Any]) -> list[str]:
    """The numbers of one kind of weights, in words."""
    accuracy = result.get("scene_accuracy", {})
    told = [f"scene_accuracy {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items() if isinstance(v, float))
            for name, scores in accuracy.items() if name != SHUFFLED]  # fmt: skip
    for name, numbers in result.items():
        if name not in ("scene_accuracy", "decoding"):
            told.append(f"{name}: " + ", ".join(f"{k} {v:.5g}" for k, v in numbers.items() if isinstance(v, (int, float))))
    return told


def _hash(settings: dict[str, Any]) -> str:
    """Of what the pieces depend on."""
    return text_hash(json.dumps(settings, sort_keys=True))


def _scene_prompts(arguments: argparse.Namespace) -> dict[str, list[ScenePrompt]]:
    if arguments.prompts:
        name = Path(arguments.prompts).stem
        if name == SHUFFLED:
            raise UserError(
                f"--prompts {arguments.prompts}: {SHUFFLED} is what the control is called in the results; name the file otherwise"
            )
        sets = {name: load(arguments.prompts)}
    else:
        sets = {"seen": committed("seen"), "held_out": committed("held_out")}
    return sets if arguments.per_category is None else {k: take(v, arguments.per_category) for k, v in sets.items()}


def _detection(value: dict[str, Any]) -> Detection:
    return Detection(tuple(DetectedObject(**found) for found in value["objects"]), tuple(value["flaws"]))
