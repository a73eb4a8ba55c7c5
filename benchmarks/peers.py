"""Decoding beside other libraries, in one run: diffusers' aMUSEd and ours on the same weights; Hugging Face's `generate` on a
Llama as large as our autoregressive twin; that twin; and our parallel network of the same size.

    python benchmarks/peers.py --geometry 256 --out docs/results/bench/peers-256.json      # full size, a CUDA GPU
    python benchmarks/peers.py --small --out docs/results/bench/peers-cpu.json             # minutes on one core
    python benchmarks/peers.py --geometry 256-shallow --systems amused --batch 1           # as wide as aMUSEd, for a CPU

aMUSEd: its geometry with random weights, 12 passes, guidance 10, 77 words; the text encoder and the image decoder are left out on
both sides. Before anything is timed, in whichever precision, the logits of both are compared in fp32, and at small batches the
tokens that both draw from one table of numbers; where they differ, nothing is reported. The logits are compared in bf16 as well,
and again once ours is compiled. Both sides are called in turns, and on a CPU so are both precisions, of the parallel network,
too. Their floor is one and the same: what the function needs when the text's part is computed once. With --compile theirs is
compiled, too, at the smallest batch in bf16, as diffusers' documentation has it, and on a GPU once more with CUDA graphs
(`mode="reduce-overhead"`).

Of the twin's size: 32 words, 1,024 tokens in the full size, guidance on, so two rows an image. Llama takes the words in front
of its tokens instead of by cross-attention; its two rows are combined, and tokens drawn, in a logits processor, which stays on
the device. It is not the same function as the twin's and is compared in size and time alone. Peak memory is a GPU's; a CPU
keeps no count of it by call.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks import results, timing
from benchmarks.amused import GEOMETRIES, STEPS, Amused, one_table
from benchmarks.amused import WORDS as WORDS_READ
from benchmarks.decoding import PARALLEL, TWIN, WORDS, Bench, cache_bytes, recorded, short
from benchmarks.small import device_for
from benchmarks.timing import DTYPES, Budget, Call, Roofline, compiled, free, share, summary, weight_bytes
from nar_t2i import recipe
from nar_t2i.errors import UserError
from nar_t2i.hardware import operation_counter
from nar_t2i.inference.graphs import Graphs
from nar_t2i.networks import UVit
from nar_t2i.noise import Noise

FULL_SIZE = ("256", "512")  # aMUSEd's own geometries
SLOWER = {"bf16": 1, "fp32": 15}  # about, on a GPU
CALLS, CALLS_OF_GRAPH = 8, 6  # of the pipelines that a measurement takes at least
LOGITS = {"fp32": 1e-4, "bf16": 0.03}  # how far logits may differ: root mean square, over their deviation; in bf16 by rounding
TOKENS = 0.99  # how many tokens must be equal in fp32, where a draw may fall on a rounded boundary
FEW = 8  # images at once, up to which tokens are drawn in fp32 to be compared
OPERATIONS: dict[str, float] = {}  # of an image, by geometry
THEIRS, OURS, LLAMA = "diffusers' aMUSEd", "our U-ViT, the same weights", "Hugging Face generate, Llama"


def main() -> int:
    parser = results.parser(__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="256", help="of aMUSEd; default: 256")
    parser.add_argument("--small", action="store_true", help="small networks, and less of everything else that is not told")
    parser.add_argument("--systems", choices=("amused", "size"), nargs="+", default=["amused", "size"],
                        help="amused: diffusers' and ours; size: Llama, the twin, the parallel one; default: both")  # fmt: skip
    parser.add_argument("--batch", type=results.positive, nargs="+", help="images at once; default: 1 8 64, small: 1 8")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bf16", "fp32"], help="of aMUSEd; default: bf16 fp32")
    parser.add_argument("--size-dtypes", choices=DTYPES, nargs="+", help="of the others; default: bf16, small: bf16 fp32")
    parser.add_argument("--repeats", type=results.positive, help="warm calls of each; default: 20, small: 5")
    parser.add_argument("--twin-repeats", type=results.whole, default=2, help="of those that draw token by token; default: 2")
    parser.add_argument("--compile", action="store_true",
                        help="with torch.compile, too: ours in bf16, both at the smallest batch; needs a C++ compiler")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=60, help="after which nothing more is begun; default: 60")
    parser.add_argument("--out", default="runs/peers.json")
    parsed = parser.parse_args()
    geometry = "small" if parsed.small and parsed.geometry in FULL_SIZE else parsed.geometry
    device = device_for(full_size=geometry in FULL_SIZE or ("size" in parsed.systems and not parsed.small))
    batches = parsed.batch or ([1, 8] if parsed.small else [1, 8, 64])
    repeats = parsed.repeats or (5 if parsed.small else 20)
    size_dtypes = parsed.size_dtypes or (["bf16", "fp32"] if parsed.small else ["bf16"])
    run = Run(Roofline(device), Budget(parsed.minutes), parsed.out)
    run.save()
    if "amused" in parsed.systems:
        add_amused(run, Amused(geometry, device), geometry, batches, parsed.dtypes, repeats, parsed.compile)
        free()
    precisions = [[dtype] for dtype in size_dtypes] if run.on_gpu else [size_dtypes]
    for together in precisions if "size" in parsed.systems else ():
        benches = [Bench(run.roofline, parsed.small, False, DTYPES[dtype]) for dtype in together]
        add_sizes(run, benches, batches, repeats, parsed.twin_repeats)
        free()
    return run.finish()


def add_amused(
    run: Run, amused: Amused, geometry: str, batches: list[int], dtypes: list[str], repeats: int, compiles: bool
) -> None:
    """diffusers' aMUSEd and ours; with `compiles` once more with torch.compile: ours in bf16, both at the smallest batch."""
    agreeing: dict[int, bool] = {}  # by batch

    def agrees(batch: int) -> bool:
        if batch not in agreeing:
            pair = Pair(run, amused, geometry, batch, "fp32")
            agreeing[batch] = run.add(f"{named(geometry, batch)}, whether both agree", pair.check)
        return agreeing[batch]

    def add(batch: int, dtypes: Sequence[str]) -> None:
        pairs, smallest = [Pair(run, amused, geometry, batch, dtype) for dtype in dtypes], batch == min(batches)
        in_bf16 = [pair for pair in pairs if pair.dtype == torch.bfloat16]
        to_compile = (pairs if smallest else in_bf16) if compiles else []
        run.add(names(pairs), lambda: rows(pairs, repeats, to_compile))
        for pair in in_bf16:
            if compiles and smallest:
                run.add(f"{THEIRS}, {pair.name}, compiled", lambda: [pair.theirs_compiled(repeats)])
                if run.on_gpu:
                    run.add(
                        f"{THEIRS}, {pair.name}, compiled, as a graph", lambda: [pair.theirs_compiled(repeats, "reduce-overhead")]
                    )

    def slowness(case: tuple[int, Sequence[str]]) -> int:
        return case[0] * max(SLOWER[dtype] for dtype in case[1])

    precisions = [[dtype] for dtype in dtypes] if run.on_gpu else [dtypes]
    for batch, together in sorted(itertools.product(batches, precisions), key=slowness):  # the longest last
        if agrees(batch):
            add(batch, together)
        elif f"{named(geometry, batch)}, whether both agree" in run.budget.left_out:
            run.budget.left_out += [f"{named(geometry, batch)}, {dtype}" for dtype in together]


def add_sizes(run: Run, benches: Sequence[Bench], batches: list[int], repeats: int, twin_repeats: int) -> None:
    """The networks of the 346M recipe's size, each bench in its precision: in parallel, its twin, and a Llama."""

    def add(batch: int) -> None:
        dtypes = [short(bench.dtype) for bench in benches]
        if len(benches) == 1:
            run.add(f"{PARALLEL}, batch {batch}, {dtypes[0]}", lambda: benches[0].decoding(PARALLEL, batch, repeats))
        else:
            run.add(f"{PARALLEL}, batch {batch}, {' and '.join(dtypes)}", lambda: in_turns(benches, batch, repeats))
        for bench, dtype in zip(benches, dtypes, strict=True):
            add_twin_and_llama(bench, f"batch {batch}, {dtype}", batch)

    def add_twin_and_llama(bench: Bench, case: str, batch: int) -> None:
        run.add(f"{TWIN}, {case}", lambda: bench.decoding(TWIN, batch, twin_repeats))
        run.add(f"{LLAMA}, {case}", lambda: Llama(bench).rows(batch, twin_repeats))

    for batch in batches:
        add(batch)


@torch.no_grad()
def in_turns(benches: Sequence[Bench], batch: int, repeats: int) -> Iterator[dict[str, Any]]:
    """The rows of the parallel network in several precisions, launched plainly, whose calls are made in turns."""
    decoders = [bench.decoder(PARALLEL, batch) for bench in benches]
    firsts = [bench.first(PARALLEL, batch, decoder, Graphs()) for bench, decoder in zip(benches, decoders, strict=True)]
    warm = benches[0].clock.warm({number: decoder.plain for number, decoder in enumerate(decoders)}, repeats)
    for number, (bench, decoder, (cold, _, known)) in enumerate(zip(benches, decoders, firsts, strict=True)):
        times = bench.of_calls(cold, warm[number], bench.floor(PARALLEL, batch, decoder.network), batch)
        yield known | {"launched": "plainly"} | times


def named(geometry: str, batch: int) -> str:
    """What the measurements of aMUSEd at one batch are called where they are left out or fail."""
    return f"aMUSEd {geometry}, batch {batch}"


class Run(timing.Run):
    """Of peers: each row also says how much faster it is."""

    @property
    def on_gpu(self) -> bool:
        return self.roofline.device.type == "cuda"

    def save(self) -> None:
        """As every run; ratios are those of the rows so far."""
        for row in self.rows:
            row |= self.faster(row)
        super().save()

    def faster(self, row: dict[str, Any]) -> dict[str, float]:
        """How many times faster a row is than the peer's, and than itself in fp32."""
        ratios, own = {}, row["p50_ms"]
        theirs = self.like(row, system=THEIRS, launched="plainly")
        if theirs and theirs is not row:
            ratios["times_diffusers"] = theirs["p50_ms"] / own
        theirs_compiled = [self.like(row, system=THEIRS, launched=way) for way in ("compiled", "compiled, as a graph")]
        if row["system"] != THEIRS and (times := [theirs["p50_ms"] for theirs in theirs_compiled if theirs]):
            ratios["times_diffusers_compiled"] = min(times) / own
        if row["system"] in (PARALLEL, TWIN):
            llamas = [self.like(row, system=LLAMA, launched=way) for way in ("plainly", "compiled")]
            if times := [llama["p50_ms"] for llama in llamas if llama]:
                ratios["times_generate"] = min(times) / own
        in_fp32 = self.like(row, dtype="fp32")
        if in_fp32 and row["dtype"] == "bf16":
            ratios["times_fp32"] = in_fp32["p50_ms"] / own
        return ratios

    def like(self, row: dict[str, Any], **changes: Any) -> dict[str, Any] | None:
        """The row of the same system, geometry, batch, precision and way to launch, but for the changes; None if there is none."""
        keys = {key: row.get(key) for key in ("system", "geometry", "batch", "dtype", "launched")} | changes
        return next((other for other in self.rows if all(other.get(key) == value for key, value in keys.items())), None)


class Pair:
    """diffusers' pipeline and ours in one geometry, batch and precision."""

    def __init__(self, run: Run, amused: Amused, geometry: str, batch: int, dtype: str):
        self.run, self.amused, self.clock, self.batch, self.dtype = run, amused, run.clock, batch, DTYPES[dtype]
        self.take()
        self.texts, self.noise = amused.texts(batch), amused.noise(batch)
        self.geometry, self.batch_name = geometry, named(geometry, batch)
        self.name = f"{self.batch_name}, {dtype}"
        self.drawn: Tensor | None = None  # by theirs, from the table
        self.known = {"geometry": geometry, "batch": batch, "dtype": dtype, "passes": STEPS, "launched": "plainly"}

    @torch.no_grad()
    def check(self) -> tuple[()]:
        """No rows; UserError where the two sides differ."""
        self.take()
        self.logits()
        if self.batch <= FEW:
            self.tokens()
        return ()

    def take(self) -> None:
        """Its precision for the weights of both, and back: those that were rounded to bf16 are as good as others."""
        if self.amused.dtype != self.dtype:
            self.amused.to(self.dtype)

    def runs(self) -> dict[str, Callable[[], Any]]:
        """What each side does."""
        return {THEIRS: lambda: self.amused.theirs(self.texts), OURS: lambda: self.amused.ours(self.texts, self.noise)}

    def sides(self, cold: dict[str, Call], warm: dict[str, list[Call]], agreement: dict[str, float]) -> Iterator[dict[str, Any]]:
        """The rows of both, launched plainly, of what `runs` took."""
        floor, unet, network = self.floor(), self.amused.unet, self.amused.network
        for system, own, other in ((THEIRS, unet, network), (OURS, network, unet)):
            times = summary(cold[system], warm[system], weight_bytes(other) / 2**20)
            row = {"system": system, **self.known, "parameters": parameters(own), **agreement}
            yield row | self.beside_floor(times, floor)

    def others(self, row: dict[str, Any], repeats: int, compile: bool) -> Iterator[dict[str, Any]]:
        """Rows of ours launched otherwise, as far as there is time. row: that of plain launches."""
        self.take()
        floor, allows, (_, run) = self.floor(), self.run.budget.allows, self.runs().values()
        graph = CALLS_OF_GRAPH * self.guess()
        if self.run.on_gpu and allows(f"{self.name}, as a graph", graph):
            yield row | self.as_graph(repeats, floor)
        if compile and allows(f"{self.name}, compiled"):
            with compiled(self.amused.network.stack):
                cold = self.clock.once(run)
                row |= self.logits() | self.tokens()
                yield row | {"launched": "compiled"} | self.timed(run, repeats, cold, floor, self.batch)
                if self.run.on_gpu and allows(f"{self.name}, compiled, as a graph", graph):
                    yield row | self.as_graph(repeats, floor) | {"launched": "compiled, as a graph"}

    def guess(self) -> float:
        """Seconds that a call may take."""
        return 2 * self.floor()["floor_ms"] / 1000

    def as_graph(self, repeats: int, floor: dict[str, float]) -> dict[str, Any]:
        """What a row of ours says of a graph: its times, and how many tokens are those of theirs."""
        graphs = Graphs(round_to=WORDS_READ)  # no padding, so that it does what plain launches do
        arguments = (self.amused.inference, self.amused.network, *self.texts, self.noise, self.amused.guidance)
        times = recorded(self, graphs, arguments, graphs.decode(*arguments), repeats, floor, self.name)
        return times | self.equal(graphs.decode(*arguments).tokens)

    @torch.no_grad()
    def theirs_compiled(self, repeats: int, mode: str | None = None) -> dict[str, Any]:
        """The row of theirs by torch.compile, whose logits must be the same as before. mode: torch.compile's."""
        self.take()
        unet, agreement = self.amused.unet, self.logits() | self.tokens()  # of theirs as it comes

        def theirs() -> Tensor:
            return self.amused.theirs(self.texts)

        with compiled([unet], mode):
            cold = self.clock.once(theirs)
            agreement |= self.logits()
            launched = "compiled" if mode is None else "compiled, as a graph"
            row = {"system": THEIRS, **self.known, "launched": launched, "parameters": parameters(unet), **agreement}
            return row | self.timed(theirs, repeats, cold, self.floor(), self.batch)

    def timed(self, run: Callable[[], Any], repeats: int, cold: Call, floor: dict[str, float], batch: int) -> dict[str, Any]:
        """As Bench times. Of the memory, the weights of the other side are not counted, which are as large as its own."""
        times = summary(cold, self.clock.warm({"": run}, repeats)[""], weight_bytes(self.amused.unet) / 2**20)
        return self.beside_floor(times, floor)

    def beside_floor(self, times: dict[str, Any], floor: dict[str, float]) -> dict[str, Any]:
        """Times (see `timing.summary`), images a second, the rates of the machine, and the floor."""
        rates = self.run.roofline.rates(self.dtype)
        return times | {"images_per_s": 1000 * self.batch / times["p50_ms"]} | rates | share(floor, times)

    def logits(self) -> dict[str, float]:
        """logits_differ: root mean square over the logits' deviation, of tokens half masked. UserError beyond LOGITS."""
        state = self.amused.state(self.batch)
        theirs, ours = self.amused.theirs_once(state, self.texts).float(), self.amused.ours_once(state, self.texts)
        differ = (ours.sub_(theirs).square_().mean().sqrt() / theirs.std()).item()
        if not differ <= LOGITS[self.known["dtype"]]:
            raise UserError(f"{self.name}: the logits differ by {differ:.2g} of their deviation, so no time is reported")
        return {"logits_differ": differ}

    def tokens(self) -> dict[str, float]:
        """equal_tokens: the share that both draw from one table. UserError where it is small in fp32; in bf16 the draws of 12
        passes go apart, and the share is only told."""
        if self.drawn is None:
            with one_table(self.noise, self.amused.network.spec.length):
                self.drawn = self.amused.theirs(self.texts)
        return self.equal(self.amused.ours(self.texts, self.noise).tokens)

    def equal(self, tokens: Tensor) -> dict[str, float]:
        """The same of (B, N) tokens that are drawn already."""
        equal = (tokens == self.drawn).float().mean().item()
        if self.dtype == torch.float32 and not equal >= TOKENS:
            raise UserError(f"{self.name}: {1 - equal:.1%} of the tokens differ, drawn from one table, so no time is reported")
        return {"equal_tokens": equal}

    def floor(self) -> dict[str, float]:
        """Of what ours computes: with the text's part once, and its padding from 77 words to 80 (0.3% of all). Counted for one
        image on a device without memory, so that the first call of all is yet to come."""
        amused, meta = self.amused, torch.device("meta")
        if self.geometry not in OPERATIONS:
            self.take()
            with meta:
                network = UVit(**amused.network._described_args).to(self.dtype)
            condition, null = (texts.map(lambda x: x.to(meta)) for texts in amused.texts(1))
            noise = Noise(0, torch.zeros(1, dtype=torch.long, device=meta))
            with operation_counter() as counter:
                amused.inference.decode(network, condition, null, noise, amused.guidance)
            OPERATIONS[self.geometry] = counter.get_total_flops()
        moved = STEPS * parameters(amused.network) * self.dtype.itemsize
        return self.run.roofline.floor(self.batch * OPERATIONS[self.geometry], moved, self.dtype)


@torch.no_grad()
def rows(pairs: Sequence[Pair], repeats: int, compile: Sequence[Pair] = ()) -> Iterator[dict[str, Any]]:
    """The rows of one batch in all precisions that are given, whose calls are made in turns; none where there would not be the
    time. compile: with torch.compile as well."""
    if not pairs[0].run.budget.allows(names(pairs), CALLS * sum(pair.guess() for pair in pairs)):
        return
    clock, colds, agreements = pairs[0].clock, [], []
    for pair in pairs:
        pair.take()
        colds.append({system: clock.once(run) for system, run in pair.runs().items()})
        agreements.append(pair.logits() | pair.tokens())
    runs = {(number, system): run for number, pair in enumerate(pairs) for system, run in pair.runs().items()}
    warm = clock.warm(runs, repeats, before=lambda key: pairs[key[0]].take())
    for number, pair in enumerate(pairs):
        pair.take()
        for row in pair.sides(colds[number], {system: warm[number, system] for system in pair.runs()}, agreements[number]):
            yield row
        yield from pair.others(row, repeats, pair in compile)


def names(pairs: Sequence[Pair]) -> str:
    """What is left out, or fails, of several precisions of one batch."""
    return f"{pairs[0].batch_name}, {' and '.join(short(pair.dtype) for pair in pairs)}"


class GuidedDraw(transformers.LogitsProcessor):
    """Two rows an image, the second told nothing: combines them and draws a token, as a row of scores that only it can win."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (2B, V) logits of prompts, then of their null rows. Returns the same rows twice, whose largest is the token."""
        conditional, unconditional = scores.float().chunk(2)
        luck = torch.empty_like(conditional).exponential_().log_()
        return (unconditional + self.scale * (conditional - unconditional) - luck).repeat(2, 1)


class Llama:
    """As wide and deep as the twin: a layer of it has as many weights as one of the twin's with its cross-attention."""

    def __init__(self, bench: Bench):
        self.bench, model = bench, recipe.load(TWIN).config["model"]["init_args"]
        self.sizes, self.scale = bench.sizes(model["network"]), model["guidance"]["scale"]
        self.length, width = bench.spec.length, self.sizes["width"]
        config = transformers.LlamaConfig(
            vocab_size=bench.spec.size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=self.sizes["depth"],
            num_attention_heads=self.sizes["heads"], max_position_embeddings=WORDS + self.length, bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        with bench.device:
            self.model = bench.place(transformers.LlamaForCausalLM(config))

    @torch.no_grad()
    def rows(self, batch: int, repeats: int) -> list[dict[str, Any]]:
        """On a GPU `generate` compiles the network by itself; where that fails, and on a CPU, it is launched plainly."""
        bench = self.bench
        operations, moved = self.work(batch)
        floor = bench.roofline.floor(operations, moved, bench.dtype)
        known = {
            "system": LLAMA,
            "batch": batch,
            "dtype": short(bench.dtype),
            "parameters": parameters(self.model),
            "passes": self.length,
        }
        if bench.device.type == "cuda":
            try:
                return [known | {"launched": "compiled"} | self.timed(batch, False, repeats, floor)]
            except UserError:
                raise
            except Exception as error:  # no compiler, or one that fails: of many kinds
                print(f"{LLAMA} is not compiled: {error}", file=sys.stderr)
        return [known | {"launched": "plainly"} | self.timed(batch, True, repeats, floor)]

    def timed(self, batch: int, plain: bool, repeats: int, floor: dict[str, float]) -> dict[str, Any]:
        """As Bench times. plain: without what `generate` compiles."""

        def run() -> None:
            self.generate(batch, plain)

        return self.bench.timed(run, repeats, self.bench.clock.once(run), floor, batch)

    def generate(self, batch: int, plain: bool) -> Tensor:
        """(batch, length) tokens. UserError where the two rows of an image have not got the same ones."""
        words = torch.arange(2 * batch * WORDS, device=self.bench.device).view(2 * batch, WORDS) % self.bench.spec.size
        tokens = self.model.generate(
            words, attention_mask=torch.ones_like(words), max_new_tokens=self.length, min_new_tokens=self.length, do_sample=False,
            cache_implementation="static", disable_compile=plain, logits_processor=[GuidedDraw(self.scale)],
        )[:, WORDS:]  # fmt: skip
        if tokens.shape != (2 * batch, self.length) or not torch.equal(tokens[:batch], tokens[batch:]):
            raise UserError(f"{LLAMA}, batch {batch}: the rows of an image went apart, so no time is reported")
        return tokens[:batch]

    def work(self, batch: int) -> tuple[float, float]:
        """Operations and bytes of all passes: two an entry of a matrix and token, and attention over what stands before."""
        width, depth, length = self.sizes["width"], self.sizes["depth"], self.length
        embeddings = self.model.get_input_embeddings()  # of which a row is looked up
        matrices = sum(p.numel() for p in self.model.parameters() if p.ndim == 2) - embeddings.weight.numel()
        attention = 4 * width * depth * sum(range(WORDS, WORDS + length))
        moved = length * (weight_bytes(self.model) - weight_bytes(embeddings))
        moved += cache_bytes(width, depth, length, 2 * batch, self.bench.dtype)
        return 2 * batch * (2 * matrices * (WORDS + length) + attention), moved


def parameters(network: torch.nn.Module) -> int:
    """How many weights it has."""
    return sum(p.numel() for p in network.parameters())


if __name__ == "__main__":
    results.program(main)
