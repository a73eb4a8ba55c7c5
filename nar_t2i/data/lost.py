"""Which samples were lost, and how many a run may lose."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from nar_t2i.data.source import LostSample
from nar_t2i.errors import UserError

log = logging.getLogger(__name__)

EXAMPLES = 5  # lost samples that an error names


class LostLedger:
    """Counts unusable samples, names each once in the log, and ends the run when they are too many.

    max_share: of all samples that were tried, how many may be lost. minimum: samples to try before the share counts.
    """

    def __init__(self, max_share: float, minimum: int):
        self._max_share, self._minimum = max_share, minimum
        self.tried = 0
        self.failed = 0
        self.records: dict[tuple[str, str], LostSample] = {}

    def note_unindexed(self, lost_samples: list[LostSample], count: int, total: int) -> None:
        """`count` samples of `total` were known to be unusable before reading. lost_samples: what is known of them, one entry
        for the rest of a damaged shard. Raises UserError when too many.
        """
        self._record(lost_samples)
        if count > self._max_share * total:
            self._refuse(count, total)

    def note(self, tried: int, failed: int, lost_samples: list[LostSample]) -> None:
        """`failed` of `tried` samples were lost. Raises UserError when too many were lost so far."""
        self.tried += tried
        self.failed += failed
        self._record(lost_samples)
        if failed and self.tried >= self._minimum and self.failed > self._max_share * self.tried:
            self._refuse(self.failed, self.tried)

    def refuse_empty(self) -> None:
        """Raise the UserError of a batch for which nothing could be read."""
        raise UserError(f"no readable sample was found; {self._examples()}")

    @property
    def lost_samples(self) -> list[LostSample]:
        """Every sample that was lost so far, once."""
        return list(self.records.values())

    def _record(self, lost_samples: Iterable[LostSample]) -> None:
        for lost in lost_samples:
            if (lost.shard, lost.key) not in self.records:
                self.records[lost.shard, lost.key] = lost
                log.warning("lost sample %s", lost)

    def _refuse(self, failed: int, tried: int) -> None:
        raise UserError(
            f"{failed} of {tried} samples cannot be used, more than max_lost_share = {self._max_share:g} allows; "
            f"{self._examples()}. Repair the data, or raise max_lost_share"
        )

    def _examples(self) -> str:
        return "for example: " + "; ".join(str(lost) for lost in self.lost_samples[:EXAMPLES])
