"""The types that every part speaks: tokens, conditions, predictions, and the four kinds of strategy.

Shapes: B images, N token slots an image, M slots that were read, L text positions, D text width, V codes.
They admit categorical, binary and continuous tokens; grids and sequences; masked, causal, permuted and
windowed networks; one text stream or many; captions as tokens and images as the condition.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nar_t2i.errors import UserError

if TYPE_CHECKING:
    from nar_t2i.noise import Noise, SlotNoise
    from nar_t2i.schedules import Guidance


_COUNTING = threading.Lock()


@dataclass(frozen=True)
class TokenSpec:
    """What one image is, as tokens.

    shape: (32, 32) for a grid, (128,) for a sequence.
    kind: "categorical" (values are codes), "binary" (bits), "continuous" (real vectors).
    size: number of codes, bits a token, or channels a token.
    """

    shape: tuple[int, ...]
    kind: Literal["categorical", "binary", "continuous"]
    size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON has lists

    @property
    def length(self) -> int:
        """N, the number of token slots an image."""
        return math.prod(self.shape)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of one token's value: () for a code, (size,) for bits and channels."""
        return () if self.kind == "categorical" else (self.size,)

    @property
    def dtype(self) -> torch.dtype:
        """int64 codes, uint8 bits (0 or 1), float32 channels."""
        return {"categorical": torch.int64, "binary": torch.uint8, "continuous": torch.float32}[self.kind]

    def blank(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """(B, N, *value_shape) zeros: the values of slots that are still masked, which no network may read."""
        return torch.zeros(batch, self.length, *self.value_shape, dtype=self.dtype, device=device)


class Condition(NamedTuple):
    """All that a generator is told.

    states: one (B, L, D) a stream (two text encoders) or a layer (an LLM's).
    masks: one (B, L) a stream, True = real, False = padding.
    pooled: (B, D) or None.
    scalars: (B,) each: original size, crop, score.
    """

    states: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    pooled: Tensor | None = None
    scalars: Mapping[str, Tensor] = {}

    def map(self, f: Callable[[Tensor], Tensor]) -> Condition:
        """The same condition with `f` applied to every tensor (move, cast, slice rows)."""
        return Condition(
            tuple(f(s) for s in self.states),
            tuple(f(m) for m in self.masks),
            None if self.pooled is None else f(self.pooled),
            {name: f(value) for name, value in self.scalars.items()},
        )


class TokenState(NamedTuple):
    """Tokens on their way from all unknown to all known.

    values: (B, N) codes | (B, N, bits) | (B, N, channels); meaningless where `masked`.
    masked: (B, N), True = not known yet. MASK is never a code.
    positions: (B, N) where a permuted or windowed order puts each slot; None = in order.
    targets: (B, N) the site that each slot predicts (RAR); None = its own.
    time: (B,) diffusion time or mask rate; None where the network does not use it.
    guess: (B, N) codes that an earlier pass drew for masked slots, −1 = none (self-conditioning); None where there is none,
    or where the network does not read it.
    """

    values: Tensor
    masked: Tensor
    positions: Tensor | None = None
    targets: Tensor | None = None
    time: Tensor | None = None
    guess: Tensor | None = None


class Sampled(NamedTuple):
    """Draws for the slots that were read.

    values: (*slots, *value_shape).
    log_prob: (*slots) log-probability of each draw under the untempered prediction; None where a prediction has none.
    """

    values: Tensor
    log_prob: Tensor | None


class Prediction(Protocol):
    """What a network says at the slots that were read: categorical logits, Bernoulli logits, or a head's hidden state."""

    logits: Tensor | None

    def __getitem__(self, rows: slice) -> Prediction:
        """The prediction of some rows of the batch."""
        ...

    def nll(self, target: Tensor, noise: SlotNoise | None = None) -> Tensor:
        """(*slots) negative log-likelihood of `target` in nats, or the loss that bounds it (`noise` feeds a diffusion head)."""
        ...

    def guide(self, unconditional: Prediction, scale: float | Tensor) -> Prediction:
        """`u + s·(c − u)` in the prediction's own parameters; s = 1 is this prediction."""
        ...

    def tempered(self, temperature: float) -> Prediction:
        """The prediction from which `sample` draws at this temperature, above 0. Where likelihoods are known."""
        ...

    def sample(self, noise: SlotNoise, temperature: float | Tensor = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampled:
        """One draw a slot; every random number comes from `noise`. Temperature 0 takes the mode. top_k, top_p: see `Categorical`,
        for tokens that are codes.
        """
        ...


class KVCache(Protocol):
    """Self-attention keys and values of tokens that were already read."""

    length: int

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, heads, new, d) and return all keys and values of the layer so far."""
        ...

    def append_states(self, layer: int, x: Tensor) -> Tensor:
        """Store (B, new, D), such as what a convolution reads beside attention, and return all of the layer so far."""
        ...

    def crop(self, length: int) -> None:
        """Forget what lies behind `length`."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        ...


def grid_places(shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """(N, dimensions) where each slot of a grid, or of a sequence, lies."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in shape)).view(-1, len(shape))


def over_values(of_slots: Tensor, values: Tensor) -> Tensor:
    """What is said of slots, (…), so that it broadcasts over their values, (…, *value_shape)."""
    return of_slots.view(*of_slots.shape, *[1] * (values.ndim - of_slots.ndim))


class TokenNetwork(nn.Module):
    """Tokens + text → a prediction.

    spec: of the tokens.
    causal: whether slot i sees only slots before it.
    judges: whether it says of each token if it is wrong, instead of which it is.
    staged: whether it draws in stages, each from those before it, and has a `lesson` of all of them.
    self_conditioning: whether it reads `TokenState.guess`.
    static: whether its shapes follow from those of its inputs, so that a call can be recorded (see InferenceStrategy).
    """

    spec: TokenSpec
    causal: bool = False
    judges: bool = False
    staged: bool = False
    self_conditioning: bool = False
    static: bool = True

    @property
    def stack(self) -> Sequence[nn.Module]:
        """The layers that a pass calls one after the other, and that are nearly all of its work: what is compiled. Empty where
        it has none such; then all of it is."""
        return ()

    def prepare(self, condition: Condition) -> Any:
        """Everything that depends on the text alone (cross-attention keys and values): once a generation."""
        raise NotImplementedError

    def forward(self, state: TokenState, prepared: Any, read: Tensor | None = None, cache: KVCache | None = None) -> Prediction:
        """Predict the slots in `read`.

        read: the slots for which alone the head is evaluated, in one of four forms (`nar_t2i.networks.tokens.select`):
            None            all slots, (B, N)
            integers (B, M) those slots of each row
            booleans (B, N) the True ones, flattened in row order to (R,)
            integers (R,)   places in the flattened (B, N), for which no device is asked how many they are (`SlotNoise.places`)

        A causal network shifts by itself: slot i is predicted from the values before it. With `cache`, `state` holds
        only new slots: `positions` says which are predicted, `values` what stands before each (slot 0: anything).
        """
        raise NotImplementedError


def beside(network: TokenNetwork, condition: Condition) -> TokenNetwork:
    """A network that was loaded apart, moved to where the text states are, and, without autocast, to their precision."""
    states = condition.states[0]
    autocast = torch.is_autocast_enabled(states.device.type)
    return network.to(states.device, None if autocast else states.dtype)


class TokenCodec(nn.Module):
    """Images ↔ tokens. Images are float in [−1, 1], (B, 3, H, W)."""

    spec: TokenSpec
    image_size: int

    def encode(self, images: Tensor) -> Encoded:
        """(B, 3, H, W) in [−1, 1], H = W = `image_size` → tokens and the error of each."""
        raise NotImplementedError

    def decode(self, tokens: Tensor, size: int | None = None, condition: Condition | None = None) -> Tensor:
        """(B, N, …) → (B, 3, H, W), about [−1, 1]. `size`: output pixels a side where the codec can choose."""
        raise NotImplementedError

    def code_vectors(self) -> Tensor:
        """(K, D), what is known of each code, for networks with a `code_width`. UserError where nothing is."""
        raise UserError(f"code_width: a {type(self).__name__} has no vectors of its codes; set it to 0")


class Encoded(NamedTuple):
    """tokens: (B, N, *value_shape). error: (B, N) squared quantisation error of each token, None where there is none."""

    tokens: Tensor
    error: Tensor | None


class TextEncoder(nn.Module):
    """Captions → Condition. `widths`: one a stream; `pooled_width`: 0 where there is no pooled state.

    `encoded`, `truncated`: captions so far, and how many of them did not fit.
    """

    widths: tuple[int, ...]
    pooled_width: int
    encoded: int = 0
    truncated: int = 0

    def count(self, encoded: int, truncated: int) -> None:
        """Add to the counts of captions."""
        with _COUNTING:  # threads may draw side by side
            self.encoded += encoded
            self.truncated += truncated

    def vocabulary_hash(self) -> str:
        """Of what makes codes of captions; "" where nothing does. Learned embeddings of words mean nothing beside another one."""
        return ""

    def fingerprint(self) -> dict[str, str]:
        """All that its states depend on, by name: a cache of states that were made by another one is refused by it."""
        raise UserError(f"{type(self).__name__} has no fingerprint, so that its states cannot be cached")

    def forward(self, captions: list[str]) -> Condition:
        """B captions → states (B, L, widths[i]) and a mask (B, L) of each stream, and (B, pooled_width) or None."""
        raise NotImplementedError


class Batch(NamedTuple):
    """What the data module yields.

    ids: (B,) int64, the ordinal of each sample in the run's data order: the key of all its random choices.
    keys: the samples' names, for messages.
    captions: one chosen caption a sample.
    images: (B, 3, H, W) uint8, or None when tokens come from a cache.
    tokens: (B, N, …) from a cache, or None.
    scalars: (B,) each: original size, crop, scores.
    errors: (B, N) squared quantisation errors of the tokens, where a cache holds them.
    condition: the captions' states, where a cache holds them.
    """

    ids: Tensor
    keys: list[str]
    captions: list[str]
    images: Tensor | None
    tokens: Tensor | None
    scalars: dict[str, Tensor]
    errors: Tensor | None = None
    condition: Condition | None = None


class TokenBatch(NamedTuple):
    """What a learning strategy sees. tokens: (B, N, …); condition: text with captions already dropped; error: see Encoded."""

    tokens: Tensor
    condition: Condition
    error: Tensor | None = None


class Term(NamedTuple):
    """One part of a loss. total: the sum of per-image means over this micro-batch; weight: the number of its images, all of them,
    since the means of micro-batches and of ranks are averaged as they are."""

    total: Tensor
    weight: Tensor


class LearningStrategy(nn.Module):
    """How a network learns to fill tokens. Frozen helpers come in __init__. Buffers are saved as the first rank has them: a
    strategy that updates one sums over the ranks itself, as `VectorQuantizer.step` does.

    passes: forward passes of the network in a training step, by which ablations equalise cost; one without a gradient counts a
    third. draws: whether the network that it teaches draws pictures; a critic does not. causal: whether it teaches causal
    networks, or all others. reads_errors: whether it needs `TokenBatch.error`.
    """

    passes: float = 1
    draws: bool = True
    causal: bool = False
    reads_errors: bool = False

    def loss(self, network: TokenNetwork, batch: TokenBatch, noise: Noise, progress: float) -> dict[str, Term]:
        """Named terms, of which "loss" is minimised and the others are logged. progress: 0 to 1 through training."""
        raise NotImplementedError


class Step(NamedTuple):
    """What `on_step` is told after each decoding step.

    step: from 0. tokens: (B, N, …). masked: (B, N), what is still unknown after the step.
    """

    step: int
    tokens: Tensor
    masked: Tensor


class Decoded(NamedTuple):
    """tokens: (B, N, …). passes: network calls an image, guided rows included in one. rows: row evaluations an image."""

    tokens: Tensor
    passes: int
    rows: int


class Known(NamedTuple):
    """Tokens that are given and never change: editing is this one primitive. mask: (B, N), True = given; tokens: (B, N, …)."""

    mask: Tensor
    tokens: Tensor


class InferenceStrategy:
    """How tokens are decoded. Critics, drafters and scorers come in __init__.

    static: with nothing known ahead, all shapes and the number of passes follow from the arguments alone, and nothing is
    read from the device or copied to it, so that a decoding can be recorded (`nar_t2i.inference.graphs`).
    """

    static: bool = False

    def decode(
        self,
        network: TokenNetwork,
        condition: Condition,
        null: Condition,
        noise: Noise,
        guidance: Guidance,
        known: Known | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Decoded:
        """Fill all unknown tokens of B images.

        condition, null: B rows each, the captions and what guidance leads away from. noise: of B sample ids. known: tokens that
        are given and never change; None = all are unknown. on_step: called after every step. Raises UserError where the network
        is not of a kind that this strategy decodes.
        """
        raise NotImplementedError
