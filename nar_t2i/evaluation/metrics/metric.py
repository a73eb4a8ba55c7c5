"""What every metric over features looks like: features in, numbers and a protocol out.

A metric gets the features of all samples at once, in the order of the samples, on one process: however they were batched
and whichever rank made them, they are the same numbers. Sums run in float64, so that another order of the samples changes
the last digits only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from nar_t2i.errors import UserError

BLOCK = 2048  # rows of a matrix of pairs that are in memory at once


class Compared(NamedTuple):
    """Features of all samples. drawn: (n, D). real: (m, D), of other pictures. texts: (n, D), of the captions that were drawn.
    paired: whether real pictures are those of the same captions, in the same order."""

    drawn: Tensor
    real: Tensor | None = None
    texts: Tensor | None = None
    paired: bool = False


@dataclass(frozen=True)
class Metric:
    """A subclass is a dataclass whose fields are its options; all of them are told with the numbers.

    name: on the command line and in results. features: by whose name the features come. needs_real: whether it compares with
    real pictures; needs_texts: whether with captions. about: a sentence of protocol; least: samples of each kind below which
    it has no value.
    """

    name: ClassVar[str]
    features: ClassVar[str]
    about: ClassVar[str]
    needs_real: ClassVar[bool] = True
    needs_texts: ClassVar[bool] = False
    least: ClassVar[int] = 2

    def check(self, drawn: int, real: int | None) -> None:
        """UserError where it has no value of so many samples: known before any is drawn. real: None where it needs none."""
        samples = drawn if real is None else min(drawn, real)
        if samples < self.least:
            raise UserError(f"{self.name} needs at least {self.least} samples, drawn and real; there are {samples}")

    def numbers(self, found: Compared) -> dict[str, float]:
        """ "value" is the number that stands for the metric; others by their names."""
        raise NotImplementedError

    def result(self, found: Compared) -> dict[str, Any]:
        """The numbers, how many samples they are of, and the metric's part of the protocol. UserError for too few samples."""
        counts = {"samples": len(found.drawn)} | ({"real_samples": len(found.real)} if self.needs_real else {})
        self.check(len(found.drawn), counts.get("real_samples"))
        return {**self.numbers(found), **counts, "features": self.features, "protocol": {"about": self.about, **asdict(self)}}


def blocks(rows: Tensor, size: int = BLOCK) -> Iterator[Tensor]:
    """Rows in float64, some at a time."""
    for part in rows.split(size):
        yield part.double()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) float64 → (n, m). By products; what rounding makes negative is 0."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp(min=0)
