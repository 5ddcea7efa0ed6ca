"""Who a page's content is: fingerprints, chained block keys and row seeds.

A key names 64 tokens *and everything before them*, for one set of weights, layout, codec, numerics
class and tenant. A row's seed names the tokens up to and including it, so a checksum over foreign or
stale bytes fails even when those bytes are intact (design.md section 4, "Key").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services._native import row_seeds
from services.kv.layout import PAGE_TOKENS

KEY_BYTES = 16


def _digest(*parts: bytes) -> bytes:
    h = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def fingerprint(weights: str, layout: str, codec: str, prefill: str, decode: str) -> str:
    """32 hexadecimal digits; equal only where KV is bit-identical and may be shared."""
    return _digest(*(part.encode() for part in (weights, layout, codec, prefill, decode))).hex()


def root_key(fingerprint: str, tenant: str) -> bytes:
    """The parent of every first block of one tenant."""
    return _digest(bytes.fromhex(fingerprint), tenant.encode())


def block_keys(root: bytes, tokens: NDArray[np.int32] | Sequence[int]) -> list[bytes]:
    """The keys of the complete blocks of `tokens`: h_i = H(h_{i-1}, tokens_i)."""
    ids = np.ascontiguousarray(tokens, np.int32)
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
        parent = next_key(parent, ids[start : start + PAGE_TOKENS])
        keys.append(parent)
    return keys


def next_key(parent: bytes, block: NDArray[np.int32]) -> bytes:
    """The key of one complete block after `parent`."""
    assert len(block) == PAGE_TOKENS
    return _digest(parent, np.ascontiguousarray(block, np.int32).tobytes())


class RowIdentity:
    """The key chain and row seeds of one growing token sequence.

    `seeds[p]` (uint32) identifies the tokens 0..p; `parents[b]` is the key of block b - 1.
    """

    def __init__(self, root: bytes, tokens: NDArray[np.int32], capacity: int) -> None:
        assert len(tokens) <= capacity
        self._tokens = np.zeros(capacity, np.int32)
        self.seeds = np.zeros(capacity, np.uint32)
        self.parents = [root]
        self.length = 0
        self.extend(tokens)

    def extend(self, tokens: NDArray[np.int32]) -> None:
        """Adds tokens at the end."""
        end = self.length + len(tokens)
        self._tokens[self.length : end] = tokens
        while self.length < end:
            block, row = divmod(self.length, PAGE_TOKENS)
            stop = min(end, (block + 1) * PAGE_TOKENS)
            before = (
                int(self.seeds[self.length - 1])
                if row
                else int.from_bytes(self.parents[block][:4], "little")
            )
            self.seeds[self.length : stop] = row_seeds(before, self._tokens[self.length : stop])
            self.length = stop
            if stop % PAGE_TOKENS == 0:
                whole = self._tokens[stop - PAGE_TOKENS : stop]
                self.parents.append(next_key(self.parents[block], whole))

    def key(self, block: int) -> bytes:
        """The key of a complete block."""
        return self.parents[block + 1]

    def keys(self, begin: int, end: int) -> bytes:
        """The keys of the complete blocks [begin, end), one behind the other."""
        return b"".join(self.parents[begin + 1 : end + 1])
