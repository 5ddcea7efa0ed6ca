"""The arena file: where everything lies, who sees what, and which files are refused."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kv.arena import FREE, HEADER, PAGE_MAGIC, Arena, create_arena, plan_arena, read_plan
from services.kv.layout import PAGE_TOKENS, KvLayout, blocks_for
from services.kv.record import record_dtype
from services.ops.errors import ConfigError, LayoutMismatch, Unavailable
from tests.support import arenas

layouts = st.builds(
    lambda groups, per, heads, dim, dtype: KvLayout(groups * per, per, heads, 8 * dim, dtype),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 16),
    st.sampled_from(["bf16", "f32"]),
)  # fmt: skip


@given(layouts, st.integers(0, 1 << 24), st.integers(1, 200), st.integers(1, 5000))
def test_a_plan_uses_the_bytes_it_was_given(
    layout: KvLayout, arena_bytes: int, streams: int, max_context: int
) -> None:
    """Parts follow one another on cache lines and fit; one more block would not. Too few bytes are a
    ConfigError that names the option."""
    record = record_dtype(layout, max_context).itemsize
    least = 4096 + streams * record + 2 * layout.groups * (layout.page_bytes + HEADER.itemsize)
    give = partial(
        plan_arena, layout, arena_bytes=arena_bytes, streams=streams, record_bytes=record,
        max_context=max_context, fingerprint="00", store_id="s",
    )  # fmt: skip
    if arena_bytes < least:
        with pytest.raises(ConfigError, match=r"^arena_bytes: "):
            give()
        return
    if arena_bytes < least + 3 * 4096:
        return  # it depends on the rounding
    plan = give()
    assert plan.headers_offset + plan.pages * HEADER.itemsize <= plan.records_offset
    assert plan.records_offset + streams * record <= plan.pages_offset
    assert plan.pages_offset + plan.pages * layout.page_bytes == plan.total_bytes <= arena_bytes
    assert plan.records_offset % 64 == plan.pages_offset % 64 == record % 64 == 0
    assert replace(plan, blocks=plan.blocks + 1).total_bytes > arena_bytes
    assert plan.max_blocks * PAGE_TOKENS >= max_context > (plan.max_blocks - 1) * PAGE_TOKENS


@given(layouts)
def test_a_layout_covers_each_layer_once(layout: KvLayout) -> None:
    """Groups follow one another without gap; only the last may be shorter."""
    layers = [layer for group in range(layout.groups) for layer in layout.layers_of(group)]
    assert layers == list(range(layout.layers))
    assert layout.page_bytes % 64 == 0
    assert layout.token_bytes * PAGE_TOKENS <= layout.groups * layout.page_bytes


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2)]
)
def test_blocks_hold_64_tokens(tokens: int, blocks: int) -> None:
    """The last block may be partly used."""
    assert blocks_for(tokens) == blocks


def test_a_layout_that_cannot_be_is_refused() -> None:
    """An unknown dtype, no layers in a group, or more than there are; the field is named."""
    with pytest.raises(ValueError, match="kv_dtype"):
        replace(arenas.LAYOUT, kv_dtype="int8")
    for per_group in (0, 4):
        with pytest.raises(ValueError, match="layers_per_group"):
            replace(arenas.LAYOUT, layers_per_group=per_group)


def test_layouts_that_differ_describe_themselves_differently() -> None:
    """Every field is part of the text that goes into a fingerprint."""
    changes: dict[str, Any] = {
        "layers": 4, "layers_per_group": 1, "kv_heads": 4, "head_dim": 32, "kv_dtype": "f32"
    }  # fmt: skip
    texts = {
        replace(arenas.LAYOUT, **{field: value}).describe() for field, value in changes.items()
    }
    assert len(texts | {arenas.LAYOUT.describe()}) == len(changes) + 1


def test_every_mapping_has_the_same_plan(tmp_path: Path) -> None:
    """The superblock gives back the plan, field by field."""
    arena = arenas.small_arena(tmp_path)
    assert read_plan(tmp_path / "arena") == Arena(tmp_path).plan == arena.plan
    assert arena.plan.layout == arenas.LAYOUT


def test_two_mappings_see_each_others_writes(tmp_path: Path) -> None:
    """Pages, headers and frames are the file's memory, not copies."""
    one, other = arenas.small_arena(tmp_path), Arena(tmp_path)
    one.page(3)[0, 1, 1, 63, 15] = 77
    other.headers["tokens"][3] = 12
    assert other.page(3)[0, 1, 1, 63, 15] == 77
    assert one.headers["tokens"][3] == 12
    frame = other.run(0, 3, 1)
    assert np.frombuffer(frame, one.layout.dtype)[one.page(3).size // 2 - 1] == 77


def test_neighbouring_blocks_are_one_frame(tmp_path: Path) -> None:
    """Pages run group by group, so a run of blocks of one group is contiguous."""
    arena = arenas.small_arena(tmp_path)
    for page in range(arena.plan.pages):
        arena.page(page)[...] = page
    run = np.frombuffer(arena.run(1, 2, 3), arena.layout.dtype).reshape(3, -1)
    pages = [arena.page_id(block, 1) for block in (2, 3, 4)]
    assert (run == np.array(pages)[:, None]).all()
    table = arena.table(np.array([2, 4], np.uint32))
    assert table.tolist() == [[arena.page_id(b, g) for g in range(2)] for b in (2, 4)]


def test_a_fresh_arena_is_all_free(tmp_path: Path) -> None:
    """Every header names its place and says FREE; no record is in use."""
    headers = arenas.small_arena(tmp_path).headers.reshape(2, -1)
    assert (headers["state"] == FREE).all()
    assert (headers["magic"] == PAGE_MAGIC).all()
    assert (headers["group"] == [[0], [1]]).all()
    assert (headers["block"] == range(headers.shape[1])).all()


def test_an_arena_appears_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that looks too early finds no arena, never an unfinished one."""
    rename, seen = Path.rename, []

    def look(path: Path, to: Path) -> Path:
        seen.append((read_plan(path), path.read_bytes()[4096 : 4096 + HEADER.itemsize]))
        with pytest.raises(Unavailable, match="arena_dir"):
            Arena(tmp_path)
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", look)
    arena = arenas.small_arena(tmp_path)
    [(plan, first_header)] = seen
    assert plan == arena.plan
    assert np.frombuffer(first_header, HEADER)["magic"] == PAGE_MAGIC


def test_a_replaced_arena_stays_for_those_who_map_it(tmp_path: Path) -> None:
    """A new arena is a new file: whoever maps the old one cannot write into the new one."""
    old = arenas.small_arena(tmp_path)
    new = arenas.small_arena(tmp_path)
    old.page(0)[...] = 9
    assert not new.page(0).any()


def test_a_small_file_system_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All memory is reserved at the start: too little is a ConfigError, never a SIGBUS later, and
    nothing is left behind."""
    plan = arenas.small_arena(tmp_path / "enough").plan

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"^arena_bytes: .*No space"):
        create_arena(tmp_path / "small", plan)
    assert [path for path in (tmp_path / "small").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("content", [b"", b"BATONKV1" + bytes(5000), b"\0" * 5000])
def test_a_file_that_is_no_arena_is_refused(tmp_path: Path, content: bytes) -> None:
    """An older version or anything else: LayoutMismatch that names the file."""
    (tmp_path / "arena").write_bytes(content)
    with pytest.raises(LayoutMismatch, match=r"arena_dir: .*/arena "):
        Arena(tmp_path)


def test_no_file_is_unavailable(tmp_path: Path) -> None:
    """Whoever waits for the store can tell this from a wrong arena."""
    with pytest.raises(Unavailable, match="arena_dir"):
        Arena(tmp_path)


def test_a_process_of_another_layout_or_model_is_refused_by_name(tmp_path: Path) -> None:
    """`require` says which of the two differs, and both values."""
    arena = arenas.small_arena(tmp_path)
    arena.require(arenas.LAYOUT, arenas.FINGERPRINT)
    with pytest.raises(LayoutMismatch, match=r"^layout: .*bf16.*f32"):
        arena.require(replace(arenas.LAYOUT, kv_dtype="f32"), arenas.FINGERPRINT)
    with pytest.raises(LayoutMismatch, match=f"^fingerprint: .*{arenas.FINGERPRINT}.*ab"):
        arena.require(arenas.LAYOUT, "ab" * 16)
