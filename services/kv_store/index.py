"""The prefix index: which sealed block holds which tokens. Pure; keeps least-recently-used order.

A key names a block's tokens and everything before them, so the longest prefix is a walk along the
chain of keys until one is missing. It also knows which blocks the tier below does not have yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile


@dataclass
class PrefixIndex:
    """key -> block, oldest use first. `now` is the time of the present use, in seconds: whoever has a
    clock sets it."""

    blocks: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    keys: dict[int, bytes] = field(default_factory=dict)
    now: float = 0.0
    used: dict[bytes, float] = field(default_factory=dict)
    unwritten: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # oldest use first

    def longest(self, chain: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of this chain; marks them as just used, the last
        one first: without its beginning the rest of a prefix is of no use."""
        found = list(takewhile(lambda key: key in self.blocks, chain))
        for key in reversed(found):
            self.blocks.move_to_end(key)
            self.used[key] = self.now
            if key in self.unwritten:
                self.unwritten.move_to_end(key)
        return [self.blocks[key] for key in found]

    def add(self, key: bytes, block: int) -> bool:
        """False when the key is there already: the first wins."""
        if key in self.blocks:
            return False
        assert block not in self.keys, f"block {block} has a key already"
        self.blocks[key] = block
        self.keys[block] = key
        self.used[key] = self.now
        self.unwritten[key] = None
        return True

    def remove(self, block: int) -> None:
        key = self.keys.pop(block)
        del self.blocks[key], self.used[key]
        self.unwritten.pop(key, None)

    def oldest(self, evictable: Callable[[int], bool]) -> int | None:
        """The least recently used block that nobody holds."""
        return next((block for block in self.blocks.values() if evictable(block)), None)

    def written(self, key: bytes) -> None:
        """The tier below has it, too."""
        self.unwritten.pop(key, None)

    def cold(self, since: float) -> Iterator[tuple[bytes, int]]:
        """What the tier below lacks and nobody has used after `since`, oldest use first. The index may
        not change while this is being gone through."""
        for key in self.unwritten:
            if self.used[key] > since:
                return
            yield key, self.blocks[key]

    def __contains__(self, block: int) -> bool:
        return block in self.keys

    def __len__(self) -> int:
        return len(self.blocks)

    def check_invariants(self) -> None:
        assert {block: key for key, block in self.blocks.items()} == self.keys
        assert set(self.used) == set(self.blocks)
        assert set(self.unwritten) <= set(self.blocks)
        uses = [self.used[key] for key in self.blocks]
        assert uses == sorted(uses), "not in the order of use"
        order = [key for key in self.blocks if key in self.unwritten]
        assert order == list(self.unwritten), "unwritten is not in the order of use"
