"""Prefixes that people want kept: which keys may not be evicted, by name, within a bound. Pure.

A pin names keys, not blocks: it also holds for blocks that come later, from a request or from disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from services.ops.errors import InvalidRequest, Overloaded

PINS_MAX = 64
NAME_CHARS_MAX = 64


@dataclass
class PinTable:
    """name -> keys. At most `blocks_max` different keys."""

    blocks_max: int = 0
    names: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    _holders: Counter[bytes] = field(default_factory=Counter)

    def pin(self, name: str, keys: Sequence[bytes]) -> None:
        """Pins these keys under a name, instead of what it named before. Raises InvalidRequest, and
        Overloaded when they are too many; then nothing has changed."""
        if not name or len(name) > NAME_CHARS_MAX:
            raise InvalidRequest(f"name: 1 to {NAME_CHARS_MAX} characters")
        holders = self._holders - Counter(self.names.get(name, ())) + Counter(keys)
        if len(holders) > self.blocks_max:
            raise Overloaded(
                f"pins_max_bytes: {len(holders)} blocks would be pinned, {self.blocks_max} may be"
            )
        if name not in self.names and len(self.names) >= PINS_MAX:
            raise Overloaded(f"name: {PINS_MAX} pins are there already")
        self.names[name] = tuple(keys)
        self._holders = holders

    def unpin(self, name: str) -> bool:
        """False when there is no such pin."""
        keys = self.names.pop(name, None)
        self._holders -= Counter(keys or ())
        return keys is not None

    def __contains__(self, key: bytes) -> bool:
        return key in self._holders

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._holders)

    def __len__(self) -> int:
        """How many keys are pinned."""
        return len(self._holders)

    def check_invariants(self) -> None:
        assert len(self) <= self.blocks_max or not self.names, "more is pinned than may be"
        assert Counter(key for keys in self.names.values() for key in keys) == self._holders
