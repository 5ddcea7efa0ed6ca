"""Blocks and who may write them. Pure: no clock, no memory, no locks of its own.

A block is free, leased (to at least one stream or the prefix index), or quarantined: fenced off from
a writer that may wake up. It is in exactly one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

ANYBODY = "f" * 32  # a writer that is not known: any process that was there before the store


@dataclass(frozen=True)
class Quarantine:
    """Why a block is held back: `writer`, who got it under `epoch`, may still write to it for
    `request_id`."""

    writer: str
    request_id: str
    epoch: int = 0


@dataclass
class BlockPool:
    """All blocks of one arena, by number."""

    total: int
    free: set[int] = field(default_factory=set)
    leases: dict[int, int] = field(default_factory=dict)  # block -> holders
    writers: dict[int, str] = field(default_factory=dict)  # block -> who may write it
    epochs: dict[int, int] = field(default_factory=dict)  # block -> under which epoch or attempt
    quarantined: dict[int, Quarantine] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)  # since the last `drain_changes`
    taken: set[int] = field(default_factory=set)  # of them, newly leased

    def __post_init__(self) -> None:
        if not self.free and not self.leases:
            self.free = set(range(self.total))

    def take(self, count: int, writer: str, epoch: int = 0) -> list[int]:
        """Leases `count` free blocks, neighbours where possible: a run is one transfer frame."""
        assert count <= len(self.free), "the caller checks the room first"
        chosen = self._run(count) or sorted(self.free)[:count]
        for block in chosen:
            self.free.discard(block)
            self.leases[block] = 1
            self.writers[block] = writer
            self.epochs[block] = epoch
        self.changed.update(chosen)
        self.taken.update(chosen)
        return chosen

    def drain_changes(self) -> tuple[set[int], set[int]]:
        """(blocks whose place has changed, those of them that were newly leased) since last asked."""
        changed, taken = self.changed, self.taken & set(self.leases)
        self.changed, self.taken = set(), set()
        return changed, taken

    def _run(self, count: int) -> list[int]:
        """The lowest run of `count` neighbouring free blocks, or nothing."""
        start = length = -1
        for block in sorted(self.free):
            if block == start + length:
                length += 1
            else:
                start, length = block, 1
            if length == count:
                return list(range(start, start + count))
        return []

    def hand_on(self, block: int, writer: str, epoch: int = 0) -> None:
        """Another may write a leased block, once its former writer is gone."""
        assert block in self.leases, f"block {block} is not leased"
        self.writers[block] = writer
        self.epochs[block] = epoch
        self.changed.add(block)
        self.taken.add(block)

    def share(self, block: int) -> None:
        """One more holder of a leased block."""
        assert block in self.leases, f"block {block} is not leased"
        self.leases[block] += 1

    def drop(self, block: int) -> bool:
        """One holder fewer; True when it was the last, and the block is free again."""
        assert self.leases.get(block, 0) > 0, f"block {block} is not leased"
        self.leases[block] -= 1
        if self.leases[block]:
            return False
        del self.leases[block]
        self.writers.pop(block, None)
        self.epochs.pop(block, None)
        self.free.add(block)
        self.changed.add(block)
        return True

    def finish_writing(self, block: int) -> None:
        """The block is sealed: nobody writes it again."""
        self.writers.pop(block, None)
        self.changed.add(block)

    def retire(self, block: int, request_id: str, may_write: Callable[[str], bool]) -> bool:
        """Gives up the only lease on a block; quarantines it if its writer may still be there.

        True when it went into quarantine.
        """
        assert self.leases.get(block) == 1, f"block {block} has other holders"
        writer = self.writers.get(block, "")
        if not writer or not may_write(writer):
            self.drop(block)
            return False
        del self.leases[block]
        del self.writers[block]
        self.quarantined[block] = Quarantine(writer, request_id, self.epochs.pop(block, 0))
        self.changed.add(block)
        return True

    def release_quarantine(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            del self.quarantined[block]
            self.free.add(block)
            self.changed.add(block)

    def check_invariants(self) -> None:
        held = set(self.leases)
        assert not self.free & held, "a block is both free and leased"
        assert not self.free & set(self.quarantined), "a block is both free and quarantined"
        assert not held & set(self.quarantined), "a block is both leased and quarantined"
        assert len(self.free) + len(held) + len(self.quarantined) == self.total, "a block is lost"
        assert all(count > 0 for count in self.leases.values())
        assert set(self.writers) <= held, "a writer without a lease"
