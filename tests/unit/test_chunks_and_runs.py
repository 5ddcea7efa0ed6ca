"""How prefill cuts a prompt, and how blocks become frames."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kv.runs import runs
from services.prefill.state import Chunk, chunks


@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(1, 700))
def test_chunks_cover_the_prompt_at_fixed_places(start: int, more: int, size: int) -> None:
    """From `start` to the end without gap or overlap; every border is an absolute multiple, so a
    prompt is cut the same way wherever its computation begins."""
    prompt = start + more
    cut = list(chunks(start, prompt, size))
    assert (cut[0].begin, cut[-1].end) == (start, prompt)
    assert all(a.end == b.begin for a, b in pairwise(cut))
    assert all(0 < c.end - c.begin <= size for c in cut)
    assert all(c.end % size == 0 for c in cut[:-1])
    assert {c.end for c in cut} <= {c.end for c in chunks(0, prompt, size)}


def test_chunks_of_a_cached_prompt() -> None:
    """The first may be shorter, and so may the last."""
    assert list(chunks(64, 600, 256)) == [Chunk(64, 256), Chunk(256, 512), Chunk(512, 600)]
    assert list(chunks(0, 256, 256)) == [Chunk(0, 256)]


@pytest.mark.parametrize(
    ("start", "prompt", "size"), [(5, 5, 64), (6, 5, 64), (-1, 5, 64), (0, 5, 0)]
)
def test_chunks_of_nothing_are_a_mistake(start: int, prompt: int, size: int) -> None:
    """There is always the last token to compute."""
    with pytest.raises(AssertionError):
        list(chunks(start, prompt, size))


@given(st.lists(st.integers(0, 12)))
def test_runs_are_the_blocks_in_order(blocks: list[int]) -> None:
    """Joined they give the blocks back; no run could be joined with the next."""
    found = list(runs(np.array(blocks, np.uint32)))
    assert [block for start, count in found for block in range(start, start + count)] == blocks
    assert all(count > 0 for _, count in found)
    assert all(a + n != b for (a, n), (b, _) in pairwise(found))


def test_runs_at_the_ends_of_the_numbers() -> None:
    """Block 0 and the greatest block number are blocks like others."""
    assert list(runs(np.array([0, 1, 2**32 - 2, 2**32 - 1], np.uint32))) == [(0, 2), (2**32 - 2, 2)]
    assert list(runs(np.array([], np.uint32))) == []
