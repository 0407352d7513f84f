"""JobCallback follows a PrecompressJob. Light to import, so that --help stays fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sac_rag.precompress.estimate import Estimate
    from sac_rag.reports import BadRecord, PrecompressReport

Step = Literal["count", "read", "index", "compress"]


class JobCallback:
    """Follows a job; a subclass overrides what it needs, the other methods do nothing."""

    def on_step(self, step: Step, total: int | None) -> None:
        """A step begins: "count" and "read" in documents, "index" in chunks, "compress" in tokens.

        Args:
            step: Which one. "count" reads everything for the estimate alone.
            total: How many there will be; None if that is not known.
        """

    def on_progress(self, count: int) -> None:
        """Documents or chunks finished in this step since the last call, except in "compress"."""

    def on_compressed(self, report: PrecompressReport) -> None:
        """Counts of "compress" since the last call."""

    def on_estimate(self, expected: Estimate) -> None:
        """The estimate is there; nothing is stored yet."""

    def on_bad(self, record: BadRecord) -> None:
        """A record or chunk is left out."""
