"""The arena's copy of a stream's plan: its writers, its tables, and who is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.kv.layout import PAGE_TOKENS
from services.kv.record import FENCED_MAX, NO_BLOCK, StreamRecord
from services.kv_store.state import Stream


def write_plan(stream: Stream, record: StreamRecord, blocks_max: int) -> None:
    """In one step. blocks_max: of a table."""
    record.write_plan(
        prefill_writer=stream.prefill_writer.encode(),
        decode_writer=stream.decode_writer.encode(), table_epoch=stream.table_epoch,
        table_attempt=stream.table_attempt,
        cached_tokens=stream.cached_blocks * PAGE_TOKENS, tail_rows=stream.tail_rows,
        tail_source=NO_BLOCK if stream.tail_source is None else stream.tail_source,
        prefill_start=stream.prefill_start, repair_source=_repair_sources(stream, blocks_max),
        prefill_table=stream.prefill_table, decode_table=stream.decode_table,
        **_fenced(stream.fenced),
    )  # fmt: skip


def write_fenced(record: StreamRecord, writers: Mapping[str, int]) -> None:
    """Who is waited for, and the last epoch of each; the rest of the plan stays."""
    record.write_plan(**_fenced(writers))


def _repair_sources(stream: Stream, blocks_max: int) -> list[int]:
    sources = [0] * blocks_max
    for index, damaged in stream.repairs.items():
        sources[index] = damaged + 1
    return sources


def _fenced(writers: Mapping[str, int]) -> dict[str, list[Any]]:
    """The plan's fields of those that are waited for; the latest, if they are too many."""
    latest = sorted(writers.items(), key=lambda entry: entry[1])[-FENCED_MAX:]
    latest += [("", 0)] * (FENCED_MAX - len(latest))
    return {
        "fenced": [writer.encode() for writer, _ in latest],
        "fenced_epochs": [since for _, since in latest],
    }
