"""The request journal: what was written is read, and damage ends the reading where it begins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from baton.v1 import inference_pb2, journal_pb2
from services.scheduler.journal import Journal, frame, read
from tests.support.dying import die_before

Record = journal_pb2.JournalRecord


def accepted(name: str, tokens: int = 3) -> Record:
    body = inference_pb2.GenerateRequest(request_id=name, text="über\n")
    return Record(
        accepted=journal_pb2.Accepted(request_id=name, body=body, token_ids=range(tokens))
    )


RECORDS = [
    accepted("a"),
    Record(placed=journal_pb2.Placed(request_id="a", epoch=7, attempt=8, decode_worker="d")),
    accepted("b", 1000),
    Record(ended=journal_pb2.Ended(request_id="a", token_ids=[1, 2], logprobs=[-0.5, -1.0])),
    Record(),
    accepted("c"),
]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path, fsync=False)
    yield journal
    journal.close()


def test_what_is_written_is_read(journal: Journal) -> None:
    """In order, one by one or many at once, every kind of record and an empty one."""
    journal.append(RECORDS[:1])
    journal.append([])
    journal.append(iter(RECORDS[1:]))
    assert list(read(journal.path)) == RECORDS


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    """A scheduler that starts for the first time."""
    assert list(read(tmp_path / "journal")) == []


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Opened again by the next process, with fsync or without."""
    for record, fsync in zip(RECORDS, (False, True) * 3, strict=True):
        journal = Journal(tmp_path, fsync)
        journal.append([record])
        journal.close()
    assert list(read(tmp_path / "journal")) == RECORDS


def test_a_torn_tail_costs_the_last_record_alone(tmp_path: Path) -> None:
    """Cut at every length within the last record: it is dropped, and nothing before it."""
    path = tmp_path / "journal"
    head = b"".join(map(frame, RECORDS[:2]))
    last = frame(RECORDS[3])
    for length in range(len(last)):
        path.write_bytes(head + last[:length])
        assert list(read(path)) == RECORDS[:2], length
    path.write_bytes(head + last)
    assert list(read(path)) == [*RECORDS[:2], RECORDS[3]]


def test_a_flipped_bit_ends_the_reading_there(tmp_path: Path) -> None:
    """In any byte of a record, its length and checksum included: what came before is read, what
    comes after cannot be trusted."""
    path = tmp_path / "journal"
    head, damaged, tail = frame(RECORDS[0]), bytearray(frame(RECORDS[1])), frame(RECORDS[3])
    for at in range(len(damaged)):
        damaged[at] ^= 1 << at % 8
        path.write_bytes(head + damaged + tail)
        assert list(read(path)) == RECORDS[:1], at
        damaged[at] ^= 1 << at % 8


def test_rewriting_forgets_the_rest(journal: Journal) -> None:
    """Only the given records are left, and what is appended later comes behind them."""
    journal.append(RECORDS)
    journal.rewrite(RECORDS[2:4])
    assert list(read(journal.path)) == RECORDS[2:4]
    journal.append(RECORDS[:1])
    assert list(read(journal.path)) == [*RECORDS[2:4], RECORDS[0]]


def test_rewriting_is_one_step(tmp_path: Path) -> None:
    """A process that dies anywhere within leaves all old records or all new ones."""
    seen = []
    for line in count():
        journal = Journal(tmp_path / str(line), fsync=False)
        journal.append(RECORDS)
        died = die_before(line, ("scheduler/journal.py",), partial(journal.rewrite, RECORDS[:2]))
        seen.append(list(read(journal.path)))
        if not died:
            journal.close()
            break
    assert all(records in (RECORDS, RECORDS[:2]) for records in seen)
    assert seen[0] == RECORDS
    assert seen[-1] == RECORDS[:2]


def test_a_failed_write_hides_nothing_that_follows(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes half a record: the caller is told, and later records can still be read."""
    write = os.write

    def half(fd: int, data: bytes) -> int:
        return write(fd, data[: len(data) // 2])

    journal.append(RECORDS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="journal"):
            journal.append(RECORDS[1:2])
    journal.append(RECORDS[3:4])
    assert list(read(journal.path)) == [RECORDS[0], RECORDS[3]]
