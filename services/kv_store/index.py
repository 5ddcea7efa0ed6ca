"""The prefix index: which sealed block holds which tokens. Pure; keeps least-recently-used order.

A key names a block's tokens and everything before them, so the longest prefix is a walk along the
chain of keys until one is missing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass
class PrefixIndex:
    """key -> block, oldest use first."""

    blocks: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    keys: dict[int, bytes] = field(default_factory=dict)

    def longest(self, chain: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of this chain; marks them as just used."""
        found: list[int] = []
        for key in chain:
            block = self.blocks.get(key)
            if block is None:
                break
            self.blocks.move_to_end(key)
            found.append(block)
        return found

    def add(self, key: bytes, block: int) -> bool:
        """False when the key is there already: the first wins."""
        if key in self.blocks:
            return False
        assert block not in self.keys, f"block {block} has a key already"
        self.blocks[key] = block
        self.keys[block] = key
        return True

    def remove(self, block: int) -> None:
        del self.blocks[self.keys.pop(block)]

    def oldest(self, evictable: Callable[[int], bool]) -> int | None:
        """The least recently used block that nobody holds."""
        return next((block for block in self.blocks.values() if evictable(block)), None)

    def __contains__(self, block: int) -> bool:
        return block in self.keys

    def __len__(self) -> int:
        return len(self.blocks)
