"""Images a second and model FLOPs utilisation in training, and what each of its means brings.

    python benchmarks/training.py                 # recipes/emage/346m-256 on one CUDA GPU: minutes
    python benchmarks/training.py --small         # its geometry in small, on any machine

In small it shows that all rows run and agree; what the means bring on a GPU cannot be read off it.

The recipe's network, text encoder (trained along, on captions of 32 words), learning strategy and optimizer take real steps
under the trainer, with the average of the weights and the guard of a run, on cached codes; weights, codes and captions are
random. Leave one out: the first row has every means, each row below it all but one, and one none; on a GPU one has CUDA graphs
as well. The rows stand at a third of the largest micro-batch that fits into memory, so that those that need more fit too, and
one more row has every means at the largest.

Work is what is needed: three times the operations of a forward pass whose head reads hidden slots alone. A row whose head reads
all of them gets no credit for it. Utilisation is of the rate of a large matrix product in the row's own precision, measured in
the same run. Every row must take the losses of the first, before and after updates, or nothing is reported.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from benchmarks import results
from benchmarks.small import SMALL_BERT, SMALL_CODEC, device_for
from benchmarks.timing import free, line
from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.hardware import matrix_rate, operation_counter
from nar_t2i.networks.predictions import Categorical
from nar_t2i.networks.tokens import select
from nar_t2i.noise import Noise
from nar_t2i.parts import build
from nar_t2i.text import BertTextEncoder
from nar_t2i.training import GeneratorModule
from nar_t2i.training.command import quieten
from nar_t2i.training.guard import Guard, GuardConfig
from nar_t2i.training.optim import OptimizerConfig
from nar_t2i.types import Batch, LearningStrategy, Prediction, Term, TokenBatch, TokenCodec, TokenNetwork, TokenState

WORDS = 32
SMALL = {"width": 64, "depth": 2, "heads": 2}
SMALL_VOCABULARY = 1000
WARM_UP = 4  # steps, of which the last two come after updates in every part of the network
MEMORY = "out of memory"
AT_LARGEST = "everything, largest micro-batch"  # the name of a row
TOLERANCE = 0.25  # of what the loss falls by in these steps


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a hundredth of the size, for machines without a GPU")
    parser.add_argument(
        "--micro-batch", type=results.positive, help="images a step; default: a third of the largest, or 8 with --small"
    )
    parser.add_argument("--steps", type=results.positive, help="that are timed, in fp32 on a GPU a third of them; default: 10")
    parser.add_argument("--rounds", type=results.positive, default=1, help="how often all rows are measured in turn; default: 1")
    parser.add_argument("--no-compile", action="store_true", help="leave compilation out of all rows: there is no C++ compiler")
    parser.add_argument("--minutes", type=float, default=60, help="after which no row is begun; default: 60")
    parser.add_argument("--out", default=str(results.FOLDER / "training.json"))
    parsed = parser.parse_args()
    device = device_for(full_size=not parsed.small)
    quieten()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    deadline = time.monotonic() + 60 * parsed.minutes
    results.write(parsed.out, [])  # what is broken off leaves no older file behind
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device, parsed.small, parsed.steps or 10)
        largest = bench.largest() if device.type == "cuda" and not parsed.micro_batch else None
        size = parsed.micro_batch or (largest and max(8, largest // 24 * 8)) or 8
        of_all_rows = {
            "recipe": "emage/346m-256" + ", in small" * parsed.small,
            "parameters": bench.parameters,
            "bf16_matrix_rate": matrix_rate(device, torch.bfloat16),
            "fp32_matrix_rate": matrix_rate(device, torch.float32),
            "forward_flops_an_image": bench.forward_operations(size) / size,
        }

        def save(rows: list[dict[str, Any]], left_out: list[str]) -> None:
            results.write(parsed.out, rows, left_out=left_out, **of_all_rows)

        chosen = variants(device.type == "cuda", not parsed.no_compile)
        try:
            rows = bench.compare(chosen, size, largest, parsed.rounds, deadline, save)
        except UserError as error:  # rows that do not agree are no result
            results.write(parsed.out, [], failed=[str(error)], **of_all_rows)
            raise
    for row in rows:
        print(line(row))
    return 1 if any(row.get("failed", MEMORY) != MEMORY for row in rows) else 0


EVERYTHING = {"masked_head": True, "fused": True, "compile": "kernels", "precision": "bf16-mixed"}
NOTHING = {"masked_head": False, "fused": False, "compile": None, "precision": "32-true"}


def variants(cuda: bool, compiles: bool) -> dict[str, dict[str, Any]]:
    """Each row's means by its name, those first that tell most; graphs last, which take a minute to compile. On a CPU there are
    none.
    """
    everything = EVERYTHING if compiles else EVERYTHING | {"compile": None}
    return {
        "everything": everything,
        "nothing": NOTHING,
        **({"without compile": everything | {"compile": None}} if compiles else {}),
        "head at all slots": everything | {"masked_head": False},
        "unfused optimizer": everything | {"fused": False},
        "fp32": everything | {"precision": "32-true"},
        **({"with graphs": everything | {"compile": "kernels and graphs"}} if compiles and cuda else {}),
    }


class Bench:
    """Trains the recipe for a few steps, in every way that is to be compared. steps: that are timed."""

    def __init__(self, folder: Path, device: torch.device, small: bool, steps: int):
        self.folder, self.device, self.small, self.steps = folder, device, small, steps
        self._counted: dict[int, int] = {}  # operations by micro-batch
        self.codec, self.bert = random_codec(small), random_bert(folder / "bert", small)
        self.parameters = sum(p.numel() for p in self.module(EVERYTHING | {"compile": None}).parameters())

    def module(self, means: dict[str, Any]) -> GeneratorModule:
        """What is trained. means: as in EVERYTHING."""
        of_module = {key: means[key] for key in ("masked_head", "fused", "compile")}
        with self.device:  # where random weights are made quickly
            return random_generator(self.codec, self.bert, self.small, **of_module)

    def compare(
        self,
        chosen: dict[str, dict[str, Any]],
        size: int,
        largest: int | None,
        rounds: int,
        deadline: float,
        save: Callable[[Any, list[str]], None],
    ) -> list[dict[str, Any]]:
        """A row a variant: medians over the rounds. save: is given the rows so far, and the names of those that are not there.
        UserError where losses differ. size, largest: images of a micro-batch. deadline: by time.monotonic.
        """
        of_rounds: dict[str, list[dict[str, Any]]] = {}
        first: list[float] = []
        at_largest: list[dict[str, Any]] = []

        def rows() -> list[dict[str, Any]]:
            return [*(_summary(name, each, of_rounds["everything"]) for name, each in of_rounds.items()), *at_largest]

        def missing() -> list[str]:
            names = [name for name in chosen if name not in of_rounds]
            return names + [AT_LARGEST] * (largest is not None and not at_largest)

        for name, means in [*chosen.items()] * rounds:
            if time.monotonic() > deadline:
                break
            row, losses = self.run(size, means)
            if losses and not first:
                first = losses
                check_learned(first)
            if losses:
                check_losses(name, losses, first)
            of_rounds.setdefault(name, []).append(row)
            save(rows(), missing())
            if largest and not at_largest and len(of_rounds) >= 3 and time.monotonic() < deadline:  # which is compiled once more
                row, losses = self.run(largest, chosen["everything"])
                if losses:
                    check_learned(losses)
                at_largest.append({"row": AT_LARGEST, **row})
                save(rows(), missing())
        return rows()

    def run(self, size: int, means: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
        """A row, and the losses of the first steps. What fails is a row too, with no losses."""
        setting = {"micro_batch": size, **means}
        try:
            slow = self.device.type == "cuda" and means["precision"] == "32-true"
            clock = self.fit(size, means, max(1, self.steps // 3) if slow else self.steps)
        except torch.OutOfMemoryError:
            return {**setting, "failed": MEMORY}, []
        except RuntimeError as error:  # torch.compile's are
            return {**setting, "failed": " ".join(str(error).split())[:300]}, []
        finally:
            free()
        rate = size / clock.seconds
        own = matrix_rate(self.device, torch.bfloat16 if means["precision"] == "bf16-mixed" else torch.float32)
        work = 3 * self.forward_operations(size) / size
        row = {**setting, "images_per_second": rate, "step_ms": 1000 * clock.seconds, "utilisation": work * rate / own}
        if self.device.type == "cuda":
            row["peak_mib"] = clock.peak / 2**20
        return row, [loss.item() for loss in clock.losses]

    def fit(self, size: int, means: dict[str, Any], steps: int) -> Clock:
        """Train for a warm-up and `steps` steps. torch.OutOfMemoryError where micro-batches of that size do not fit."""
        clock = Clock(steps)
        self.train(size, means, WARM_UP + steps, clock)
        return clock

    def train(self, size: int, means: dict[str, Any], max_steps: int, watch: Callback) -> None:
        """Steps on one batch of `size` images under the trainer, with the guard of a run; `watch` looks on."""
        settings = {"max_steps": max_steps, "precision": means["precision"], "accelerator": self.device.type}
        run = trainer(self.folder, [Guard(GuardConfig()), watch], **settings)
        run.fit(self.module(means), datamodule=RandomCodes(self.codec, size, self.device))

    def largest(self) -> int:
        """The largest micro-batch that trains, of multiples of 8: without compilation, which takes less memory, not more. Two
        small ones tell about how many fit."""
        sizes = list(range(8, 1025, 8))
        peaks = []
        for size in sizes[:2]:
            peaks.append(self.fit(size, EVERYTHING | {"compile": None}, 1).peak)
            free()
        an_image = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
        room = torch.cuda.get_device_properties(self.device).total_memory - peaks[0]
        likely = [size for size in sizes if an_image * (size - sizes[0]) < 1.05 * room]
        largest = next((size for size in reversed(likely) if self.fits(size)), None)
        if largest is None:
            raise UserError("no micro-batch of 8 images fits into this GPU's memory")
        return largest

    def fits(self, size: int) -> bool:
        """Whether a step on micro-batches of `size` images finds memory."""
        try:
            self.fit(size, EVERYTHING | {"compile": None}, 1)
        except torch.OutOfMemoryError:
            return False
        finally:
            free()
        return True

    @torch.no_grad()
    def forward_operations(self, size: int) -> int:
        """Floating-point operations of a forward pass of the learning strategy, its head at hidden slots alone."""
        if size not in self._counted:
            module = self.module(EVERYTHING | {"compile": None}).to(self.device)
            counter, batch = operation_counter(), RandomCodes(self.codec, size, self.device).batch
            with counter:
                module._terms(module.transfer_batch_to_device(batch, self.device, 0), module.seed, True, 0.0)
            self._counted[size] = counter.get_total_flops()
            del module
            free()
        return self._counted[size]


def _summary(name: str, of_rounds: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    row = {"row": name, **of_rounds[0]}
    pairs = [(own, other) for own, other in zip(of_rounds, base, strict=False) if "failed" not in own and "failed" not in other]
    if pairs:
        row |= {key: median(own[key] for own, _ in pairs) for key in ("images_per_second", "step_ms", "utilisation")}
        row["over_everything"] = median(own["images_per_second"] / other["images_per_second"] for own, other in pairs)
    return row


class Clock(Callback):
    """Times `steps` steps after a warm-up, whose losses it keeps. A GPU's are timed as a whole, since it runs ahead of the
    host; of a CPU's, which others may be using, the median counts."""

    def __init__(self, steps: int):
        self.losses: list[Tensor] = []
        self.steps, self.peak = steps, 0
        self.marks: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss of a step of the warm-up, and the time after each later one."""
        if batch_idx < WARM_UP:
            self.losses.append(outputs["loss"].detach().clone())
        if pl_module.device.type == "cuda" and batch_idx in (WARM_UP - 1, WARM_UP + self.steps - 1):
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        if batch_idx >= WARM_UP - 1:
            self.marks.append(time.perf_counter())
            self.on_cpu = pl_module.device.type == "cpu"

    @property
    def seconds(self) -> float:
        """Of a step."""
        if self.on_cpu:
            return median(later - earlier for earlier, later in pairwise(self.marks))
        return (self.marks[-1] - self.marks[0]) / self.steps


class RandomCodes(LightningDataModule):
    """One batch of random codes and captions, as it comes from a cache, again and again: so that losses must fall."""

    streams = True  # there is no source to be asked

    def __init__(self, codec: TokenCodec, size: int, device: torch.device, rank: int = 0, ranks: int = 1):
        """size: images of all ranks."""
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(codec.spec.size, (size, codec.spec.length), generator=draw)
        words = torch.randint(500, (size, WORDS), generator=draw).tolist()
        captions = [" ".join(f"word{number}" for number in row) for row in words]
        own = slice(rank * size // ranks, (rank + 1) * size // ranks)
        ids, tokens = torch.arange(size)[own], tokens[own]
        if device.type == "cuda":
            ids, tokens = ids.pin_memory(), tokens.pin_memory()
        self.batch = Batch(ids, [str(i) for i in ids.tolist()], captions[own], None, tokens, {})
        self.size, self.global_batch_size = len(ids), size

    def check_codec(self, codec: TokenCodec) -> None:
        """Codes of no codec."""

    def check_text(self, text: Any) -> None:
        """No states of a cache."""

    def accumulation(self, world: int | None = None) -> int:
        """Micro-batches a step."""
        return 1

    def micro_batch_size(self, world: int | None = None) -> int:
        """Images a step of this rank."""
        return self.size

    def train_dataloader(self) -> Iterator[Batch]:
        """The batch, without end."""
        return _Endless(self.batch)


class _Endless:
    def __init__(self, batch: Batch):
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.batch


class HeadAtAllSlots(LearningStrategy):
    """A learning strategy that has the head evaluated at every slot, and reads of it what it needs."""

    def __init__(self, inner: LearningStrategy):
        super().__init__()
        self.inner, self.passes = inner, inner.passes

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        """The same terms as those of the inner strategy."""
        return self.inner.loss(_Whole(network), batch, noise, progress)  # type: ignore[arg-type]


class _Whole:
    def __init__(self, network: TokenNetwork):
        self.network, self.spec, self.prepare = network, network.spec, network.prepare

    def __call__(self, state: TokenState, prepared: Any, read: Tensor) -> Prediction:
        return Categorical(select(self.network(state, prepared).logits, read))


def random_codec(small: bool) -> TokenCodec:
    """The recipe's tokenizer; of its weights nothing is needed."""
    described = recipe.load("emage/tokenizer").config["model"]["init_args"]["codec"]
    described["init_args"].update(SMALL_CODEC if small else {})
    return build(described)


def random_bert(folder: Path, small: bool) -> str:
    """The configuration of BERT-base and a vocabulary of as many words; of weights nothing is needed."""
    config = transformers.BertConfig(**(SMALL_BERT | {"vocab_size": SMALL_VOCABULARY} if small else {}))
    config.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"word{number}" for number in range(config.vocab_size - len(words))]
    transformers.BertTokenizer(vocab={word: code for code, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


def random_generator(
    codec: TokenCodec, bert: str, small: bool, masked_head: bool = True, fused: bool = True, compile: Any = None, **network: Any
) -> GeneratorModule:
    """recipes/emage/346m-256 with random weights; at its peak learning rate, so that updates can be seen."""
    model = recipe.load("emage/346m-256").config["model"]["init_args"]
    arguments = {**model["network"]["init_args"], **(SMALL if small else {}), **network}
    torch.manual_seed(0)
    learning = build({"init_args": {}, **model["learning"]})
    text = {**model["text"]["init_args"], "folder": bert, "pretrained": False}

    def made(spec: Any, widths: Any) -> TokenNetwork:
        of_parts = {"spec": spec, "text_widths": tuple(widths)}
        return build({"class_path": model["network"]["class_path"], "init_args": arguments | of_parts})

    module = GeneratorModule(
        codec, BertTextEncoder(**text), made, learning if masked_head else HeadAtAllSlots(learning),
        optimizer=OptimizerConfig(**model["optimizer"] | {"warmup_steps": 0, "schedule": "constant", "fused": fused}),
        text_learning_rate=model["text_learning_rate"], caption_dropout=model["caption_dropout"], ema_decay=model["ema_decay"],
        compile=compile,
    )  # fmt: skip
    # It starts at zero, where every network has the same loss and most weights no gradient.
    torch.nn.init.normal_(module.network.head.logits.weight, std=0.02)
    module.write = lambda folder: None  # type: ignore[method-assign]
    return module


def trainer(folder: Path, callbacks: list[Callback], **settings: Any) -> Trainer:
    """Lightning's, on one device unless `settings` say otherwise, without validation, checkpoints and output."""
    return Trainer(
        default_root_dir=folder, callbacks=callbacks, **{"devices": 1, "logger": False, "enable_checkpointing": False} | settings,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
        num_sanity_val_steps=0,
    )  # fmt: skip


def check_learned(losses: list[float]) -> None:
    """UserError where losses stand still, or are no numbers: they would then be equal whatever the updates were."""
    if not losses[0] - losses[-1] > 2e-3 * losses[0]:
        raise UserError(f"the loss does not fall ({losses[0]:.5f} to {losses[-1]:.5f}): nothing can be compared")


def check_losses(name: str, losses: list[float], expected: list[float]) -> None:
    """UserError where a row takes other losses than the first, apart from rounding, and the draws of the second pass that
    follow it: by a part of what the loss falls by, so that an update that is left out or of another size is noticed."""
    fall = expected[0] - expected[-1]
    if not all(abs(a - b) <= TOLERANCE * fall for a, b in zip(losses, expected, strict=True)):
        raise UserError(f"the row {name!r} takes other losses than the first: {losses}, not {expected}")


if __name__ == "__main__":
    results.program(main)
