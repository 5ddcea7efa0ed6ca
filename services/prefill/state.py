"""Which rows a prefill computes next. Pure.

Chunks lie at absolute, fixed positions, so that the same prompt is always cut the same way:

    start          first boundary             prompt_tokens
      | ............ | chunk | chunk | chunk | rest |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Tokens [begin, end) of the prompt."""

    begin: int
    end: int


def chunks(start: int, prompt_tokens: int, chunk_tokens: int) -> Iterator[Chunk]:
    """Cuts [start, prompt_tokens) at multiples of `chunk_tokens`."""
    assert 0 <= start < prompt_tokens
    assert chunk_tokens > 0
    while start < prompt_tokens:
        end = min((start // chunk_tokens + 1) * chunk_tokens, prompt_tokens)
        yield Chunk(start, end)
        start = end
