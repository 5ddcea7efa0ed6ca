"""What one round of corruption has changed, what became of it, and whether that is as it must be."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from baton.chaos.asks import PAGE_TOKENS
from baton.chaos.flip import OWN_FIELDS
from baton.chaos.judge import Verdict


@dataclass(frozen=True)
class Damage:
    """What one round has changed, and what the cluster has made of it."""

    where: str
    number: int
    flips: int = 0
    mattering: int = 0  # flips of bytes that a reader relies on, each in a block of its own; on the
    # wire: messages with such bytes
    parts: tuple[tuple[str, int], ...] = ()  # (payload, row_crc or header field, flips)
    corrupt_blocks: int = 0  # that prefill, decode or the tier on disk has found
    headers_mended: int = 0  # by the stores' scrub; of bytes that nobody reads, too
    cached_dropped: int = 0  # by it, before anybody wanted them
    corrupt_messages: int = 0  # that the stores have found on arrival
    dropped: int = 0  # messages with flips of which is not known whether they have arrived
    blocks_repaired: int = 0
    tokens_repaired: int = 0
    repair_mismatches: int = 0
    prompt_tokens_recomputed: int = 0  # where the whole stream was computed again
    kept_elsewhere: bool = False  # another store has whole files of the same blocks
    streams: int = 0
    stalls_ms: tuple[float, ...] = ()  # from the flip on, of each stream that was hit
    verdict: Verdict = dataclasses.field(default_factory=Verdict)
    trouble: str = ""

    @property
    def noticed(self) -> int:
        """Of what matters, what a reader, a receiver or the scrub has seen."""
        on_wire = self.where == "wire"
        return self.corrupt_messages if on_wire else self.corrupt_blocks + self.cached_dropped

    @property
    def label(self) -> str:
        return f"{self.where}-{self.number}"

    @property
    def good(self) -> bool:
        """Nobody got a wrong token; what matters was noticed, and only that was computed again."""
        return self.why() == "clean"

    def why(self) -> str:
        """What is wrong with it, for people."""
        parts = [] if self.verdict.clean else [self.verdict.story()]
        if self.where == "wire" and not 0 <= self.noticed - self.mattering <= self.dropped:
            parts.append(
                f"{self.mattering} messages with bytes that matter, {self.noticed} noticed, "
                f"{self.dropped} perhaps lost, flipped were {dict(self.parts)}"
            )
        if self.where != "wire" and not self._all_noticed():
            parts.append(
                f"{self.mattering} bytes that matter, {self.corrupt_blocks} blocks noticed, "
                f"{self.headers_mended} headers mended, {self.cached_dropped} blocks dropped, "
                f"flipped were {dict(self.parts)}"
            )
        if self.blocks_repaired != self.corrupt_blocks:
            parts.append(f"{self.corrupt_blocks} blocks noticed, {self.blocks_repaired} repaired")
        if self.repair_mismatches:
            parts.append(f"{self.repair_mismatches} blocks repaired to other bytes")
        due = PAGE_TOKENS * self.corrupt_blocks
        least = 0 if self.kept_elsewhere else due
        if self.where == "disk" and not least <= self.tokens_repaired <= due:
            parts.append(f"{self.tokens_repaired} tokens computed for them")
        if again := self.prompt_tokens_recomputed:
            parts.append(f"{again} prompt tokens computed again")
        return "; ".join([*parts, *([self.trouble] if self.trouble else [])]) or "clean"

    def _all_noticed(self) -> bool:
        """Whether each byte that matters was, by a reader or the scrub. The store may have written a
        field of its own anew before anybody looked, with or without having seen that it was flipped."""
        parts = dict(self.parts)
        certain = self.mattering - sum(parts.get(field, 0) for field in OWN_FIELDS)
        return certain <= self.noticed and self.corrupt_blocks <= self.mattering
