"""How long an image takes: text encoder, decoder passes and image decoder, of Emage and of its autoregressive twin.

    python benchmarks/decoding.py --out docs/results/bench/decoding.json           # 346M, 1,024 tokens, a CUDA GPU
    python benchmarks/decoding.py --small --out runs/decoding.json                 # the same in small, on any machine
    python benchmarks/decoding.py --floors 788 4300                                # what TFLOP/s and GB/s alone would take

Networks have the geometry of recipes/emage and random weights, in bf16; prompts have 32 words; guidance is on. Every part is
timed by itself, cold (the first timed call; of a graph, the one that records it) and warm (median and 95th percentile), with
and without CUDA graphs, beside its floor: what its operations take at the matrix rate, or its bytes at the copy rate, whichever
is more, both measured in the same run. Then the text encoder and all passes are timed in one, and with the image decoder behind
them. A graph must draw what plain launches draw, or its time is not reported. benchmarks/peers.py sets the same networks beside
those of other libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from benchmarks import results
from benchmarks.small import SMALL_BERT, SMALL_CODEC, device_for
from benchmarks.timing import DTYPES, Budget, Call, Clock, Roofline, Run, compiled, line, share, summary, weight_bytes
from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.hardware import operation_counter
from nar_t2i.inference.graphs import Graphs
from nar_t2i.noise import Noise
from nar_t2i.parts import build
from nar_t2i.schedules import Guidance
from nar_t2i.text.null import NullCaption
from nar_t2i.types import Condition, Decoded, InferenceStrategy, TokenNetwork, TokenSpec

PARALLEL, TWIN = "emage/346m-256", "emage/ar-346m-256"
WORDS = 32
SMALL = {"width": 256, "depth": 4, "heads": 4}
SMALL_CODES = 1024


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a hundredth of the size, for machines without a GPU")
    parser.add_argument("--batch", type=results.positive, nargs="+", default=[1, 16], help="images at once; default: 1 16")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--repeats", type=results.positive, default=20, help="warm calls of each part; default: 20")
    parser.add_argument(
        "--twin-repeats", type=results.whole, default=5, help="of the autoregressive twin, 0 = leave it out; default: 5"
    )
    parser.add_argument("--compile", action="store_true", help="the parallel network's blocks with torch.compile")
    parser.add_argument("--floors", type=float, nargs=2, metavar=("TFLOPS", "GB_S"),
                        help="measure nothing: print the floors of a GPU with these rates")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=60, help="after which nothing more is begun; default: 60")
    parser.add_argument("--out", default="docs/results/bench/decoding.json")
    parsed = parser.parse_args()
    if parsed.floors:
        return print_floors(*parsed.floors, parsed.batch)
    run = Run(Roofline(device_for(full_size=not parsed.small)), Budget(parsed.minutes), parsed.out)
    run.save()
    bench = Bench(run.roofline, parsed.small, parsed.compile, DTYPES[parsed.dtype])
    for batch in parsed.batch:
        add_parts(run, bench, batch, parsed.repeats, parsed.twin_repeats)
    return run.finish()


def add_parts(run: Run, bench: Bench, batch: int, repeats: int, twin_repeats: int) -> None:
    """All that is measured of one batch; the twin is left out where it has no repeats."""
    run.add(f"text encoder, batch {batch}", lambda: [bench.text(batch, repeats)])
    run.add(f"image decoder, batch {batch}", lambda: [bench.image(batch, repeats)])
    run.add(f"{PARALLEL}, batch {batch}", lambda: bench.decoding(PARALLEL, batch, repeats))
    if twin_repeats:
        run.add(f"{TWIN}, batch {batch}", lambda: bench.decoding(TWIN, batch, twin_repeats))


def print_floors(tflops: float, gb_s: float, batches: list[int]) -> int:
    """Of both networks at full size, in bf16, with both roofs given."""
    bench = Bench(Given(tflops, gb_s), False, False, torch.bfloat16)
    for batch in batches:
        floors = {}
        for name in (PARALLEL, TWIN):
            with bench.device:
                network = bench.built(recipe.load(name).config["model"]["init_args"]["network"]).to(torch.bfloat16)
            floors[name] = bench.floor(name, batch, network)
            print(line({"system": name, "batch": batch} | floors[name]))
        print(f"batch {batch}: the twin's is {floors[TWIN]['floor_ms'] / floors[PARALLEL]['floor_ms']:.2f} times the other")
    return 0


class Given(Roofline):
    """A machine that is not at hand."""

    def __init__(self, tflops: float, gb_s: float):
        self.device, self.copy_rate, self._matrix_rate = torch.device("meta"), 1e9 * gb_s, 1e12 * tflops

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second, whatever the type."""
        return self._matrix_rate


class Decoder(NamedTuple):
    """What `Graphs.decode` takes."""

    inference: InferenceStrategy
    network: TokenNetwork
    condition: Condition
    null: Condition
    noise: Noise
    guidance: Guidance

    def plain(self) -> Decoded:
        """Decode without a graph."""
        return self.inference.decode(*self[1:])


class Bench:
    """The parts, made when they are asked for, and how they are timed."""

    def __init__(self, roofline: Roofline, small: bool, compile: bool, dtype: torch.dtype):
        self.device, self.small, self.compile, self.dtype = roofline.device, small, compile, dtype
        self.roofline, self.clock = roofline, Clock(roofline.device)
        self._operations: dict[str, float] = {}
        codec = recipe.load("emage/tokenizer").config["model"]["init_args"]["codec"]
        if small:
            codec["init_args"].update(SMALL_CODEC)
            codec["init_args"]["quantizer"]["init_args"]["codes"] = SMALL_CODES
        self.codec = self.place(build(codec))
        self.spec: TokenSpec = self.codec.spec
        config = transformers.BertConfig(**(SMALL_BERT if small else {}))
        self.bert = self.place(transformers.BertModel(config, add_pooling_layer=False))
        self.null = self.place(NullCaption((config.hidden_size,)))

    def place(self, module: Any) -> Any:
        """The module on the device and in the type that are measured, for inference."""
        return module.to(self.device, self.dtype).eval().requires_grad_(False)

    def sizes(self, described: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a network that a recipe describes, in small where that is asked for."""
        return {**described["init_args"], **(SMALL if self.small else {})}

    def network(self, described: dict[str, Any]) -> TokenNetwork:
        """With random weights, ready to be measured."""
        torch.manual_seed(0)
        network = self.built(described)
        torch.nn.init.normal_(network.head.logits.weight, std=0.02)  # which starts at zero: all codes alike
        return self.place(network)

    def built(self, described: dict[str, Any], spec: TokenSpec | None = None) -> TokenNetwork:
        """On torch's default device, as it is before training. spec: default: the codec's."""
        spec_and_text = {"spec": spec or self.spec, "text_widths": (self.bert.config.hidden_size,)}
        return build({"class_path": described["class_path"], "init_args": self.sizes(described) | spec_and_text})

    def condition(self, batch: int) -> Condition:
        """(batch, WORDS, width) states of as many captions without padding."""
        words = torch.arange(batch * WORDS, device=self.device).view(batch, WORDS) % self.bert.config.vocab_size
        mask = torch.ones(batch, WORDS, dtype=torch.bool, device=self.device)
        return Condition((self.bert(words, mask.long()).last_hidden_state,), (mask,))

    def conditions(self, batch: int) -> tuple[Condition, Condition]:
        """That of the captions, and that of the null caption."""
        condition = self.condition(batch)
        return condition, self.null(condition)

    def decoder(self, name: str, batch: int) -> Decoder:
        """A recipe's, with random weights, and what it decodes."""
        model = recipe.load(name).config["model"]["init_args"]
        network, noise = self.network(model["network"]), Noise(0, torch.arange(batch, device=self.device))
        return Decoder(build(model["inference"]), network, *self.conditions(batch), noise, Guidance(**model["guidance"]))

    def first(self, name: str, batch: int, decoder: Decoder, graphs: Graphs) -> tuple[Call, Decoded, dict[str, Any]]:
        """Its first call as it comes, what that draws, and what every row of it says."""
        drawn: list[Decoded] = []
        cold = self.clock.once(lambda: drawn.append(graphs.decode(*decoder)))
        network = decoder.network
        known = {
            "system": name, "batch": batch, "dtype": short(self.dtype), "compiled": self.compile and not network.causal,
            "parameters": sum(p.numel() for p in network.parameters()), "passes": drawn[0].passes,
        }  # fmt: skip
        return cold, drawn[0], known

    @torch.no_grad()
    def decoding(self, name: str, batch: int, repeats: int) -> Iterator[dict[str, Any]]:
        """The decoder alone, plainly launched, and on a GPU as a graph as well; then from the text on, and to the image."""
        graphs, arguments = Graphs(), self.decoder(name, batch)
        inference, network, _, _, noise, guidance = arguments
        with compiled(network.stack if self.compile and not network.causal else ()):
            cold, expected, known = self.first(name, batch, arguments, graphs)
            floor = self.floor(name, batch, network)
            yield known | {"launched": "plainly"} | self.timed(arguments.plain, repeats, cold, floor, batch)
            if self.device.type == "cuda":
                row = recorded(self, graphs, arguments, expected, repeats, floor, name)
                yield known | row
                known["launched"], held = "as a graph", row["peak_mib"]  # by the graph, which later calls do not count

                def from_text() -> Decoded:
                    return graphs.decode(inference, network, *self.conditions(batch), noise, guidance)

                yield known | self.part(f"{name}, from the text", batch, repeats, from_text, held)

                def to_image() -> Tensor:
                    return self.codec.decode(from_text().tokens)

                yield known | self.part(f"{name}, from the text to the image", batch, repeats, to_image, held)

    def floor(self, name: str, batch: int, network: TokenNetwork) -> dict[str, float]:
        """What its operations take at the matrix rate, or its bytes at the copy rate. Weights are read in each pass, but for
        those that prepare the text, which are read once, and for tables, of which a row is looked up here and there.
        """
        model = recipe.load(name).config["model"]["init_args"]
        sizes = self.sizes(model["network"])
        passes = self.spec.length if network.causal else model["inference"]["init_args"]["steps"]
        if name not in self._operations:
            self._operations[name] = self.operations(model, network.causal)
        of_text = weight_bytes(network.text, *(block.cross_attention.kv for block in network.blocks))
        tables = weight_bytes(network.embedding.value) + network.embedding.position.numel() * self.dtype.itemsize
        moved = of_text + passes * (weight_bytes(network) - of_text - tables)
        if network.causal:
            moved += cache_bytes(sizes["width"], sizes["depth"], self.spec.length, 2 * batch, self.dtype)
        return self.roofline.floor(batch * self._operations[name], moved, self.dtype)

    def operations(self, model: dict[str, Any], causal: bool) -> float:
        """Of one image, counted on a device without memory, where nothing is compiled. Token by token they grow with the square
        of the length, so that three short sequences tell of one for which counting would take a minute.
        """
        if not causal:
            return self.counted(model, self.spec)
        short = [self.counted(model, TokenSpec((1, length), self.spec.kind, self.spec.size)) for length in (4, 8, 12)]
        n, first, second = self.spec.length, short[1] - short[0], short[2] - 2 * short[1] + short[0]
        return short[0] + first * (n - 4) / 4 + second * (n - 4) * (n - 8) / 32

    @torch.no_grad()
    def counted(self, model: dict[str, Any], spec: TokenSpec) -> float:
        """Operations of a decoding of one image of that many tokens, by torch's counter."""
        meta = torch.device("meta")
        with meta:
            network = self.built(model["network"], spec).to(self.dtype)
        inference, guidance = build(model["inference"]), Guidance(**model["guidance"])
        states = torch.empty(1, WORDS, self.bert.config.hidden_size, dtype=self.dtype, device=meta)
        condition = Condition((states,), (torch.ones(1, WORDS, dtype=torch.bool, device=meta),))
        null = NullCaption((self.bert.config.hidden_size,)).to(meta, self.dtype)(condition)
        with operation_counter() as counter:
            inference.decode(network, condition, null, Noise(0, torch.zeros(1, dtype=torch.long, device=meta)), guidance)
        return counter.get_total_flops()

    @torch.no_grad()
    def text(self, batch: int, repeats: int) -> dict[str, Any]:
        """The row of the text encoder."""
        return self.part("text encoder", batch, repeats, lambda: self.condition(batch))

    @torch.no_grad()
    def image(self, batch: int, repeats: int) -> dict[str, Any]:
        """The row of the image decoder, of tokens that are all alike."""
        tokens = self.spec.blank(batch, self.device)
        return self.part("image decoder", batch, repeats, lambda: self.codec.decode(tokens))

    def part(self, name: str, batch: int, repeats: int, run: Callable[[], Any], held_mib: float = 0.0) -> dict[str, Any]:
        """A row without a floor. held_mib: see `timing.summary`."""
        known = {"system": name, "batch": batch, "dtype": short(self.dtype)}
        return known | self.timed(run, repeats, self.clock.once(run), None, batch, held_mib)

    def timed(
        self,
        run: Callable[[], Any],
        repeats: int,
        cold: Call,
        floor: dict[str, float] | None,
        batch: int,
        held_mib: float = 0.0,
    ) -> dict[str, Any]:
        """What a row says of its times. cold: the first call, which has been."""
        return self.of_calls(cold, self.clock.warm({"": run}, repeats)[""], floor, batch, held_mib)

    def of_calls(
        self, cold: Call, warm: list[Call], floor: dict[str, float] | None, batch: int, held_mib: float = 0.0
    ) -> dict[str, Any]:
        """The same of calls that were made."""
        times = summary(cold, warm, held_mib=held_mib)
        times["images_per_s"] = 1000 * batch / times["p50_ms"]
        return times | (self.roofline.rates(self.dtype) | share(floor, times) if floor else {})


def recorded(
    bench: Any, graphs: Graphs, arguments: tuple[Any, ...], expected: Decoded, repeats: int, floor: dict[str, float], name: str
) -> dict[str, Any]:
    """A decoding as a graph: timed as `bench` times (Bench, or one of its like). UserError where it draws otherwise than
    `expected`; cold is the call that records it. graphs: have decoded this once, as it comes."""
    drawn: list[Decoded] = []
    cold = bench.clock.once(lambda: drawn.append(graphs.decode(*arguments)))
    if not graphs.recordings:
        raise UserError(f"{name}, batch {len(expected.tokens)}: could not be recorded as a graph")
    equal = (drawn[0].tokens == expected.tokens).float().mean().item()
    if equal < 0.99:
        raise UserError(f"{name}, batch {len(expected.tokens)}: the graph draws {1 - equal:.1%} of the tokens otherwise")
    timed = bench.timed(lambda: graphs.decode(*arguments), repeats, cold, floor, len(expected.tokens))
    return {"launched": "as a graph", "equal_to_plain": equal} | timed


def cache_bytes(width: int, depth: int, length: int, rows: int, dtype: torch.dtype) -> int:
    """What a key-value cache is read for, over all passes."""
    return rows * depth * 2 * width * dtype.itemsize * length * (length + 1) // 2


def short(dtype: torch.dtype) -> str:
    """Its name in DTYPES."""
    return next(name for name, value in DTYPES.items() if value == dtype)


if __name__ == "__main__":
    results.program(main)
