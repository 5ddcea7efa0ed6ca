"""`baton bench journal`: what the request journal costs, with and without fsync.

Each record is an accepted request with a prompt of `--tokens` token ids, appended as the scheduler
does it before it acknowledges.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton import machine
from baton.v1 import journal_pb2
from services.scheduler.journal import Journal


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(prog="baton bench journal", description=__doc__)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--directory", default="", help="where to write (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="accepted for uniformity")
    options = parser.parse_args(argv)
    accepted = journal_pb2.Accepted(request_id="x" * 32, token_ids=range(options.tokens))
    record = journal_pb2.JournalRecord(accepted=accepted)
    result: dict[str, Any] = {
        "bench": "journal", "machine": machine.describe(), "record_bytes": record.ByteSize()
    }  # fmt: skip
    for name, fsync in (("write", False), ("fsync", True)):
        with tempfile.TemporaryDirectory(dir=options.directory or None) as directory:
            result[name] = append(Journal(Path(directory), fsync), record, options.records)
    print(json.dumps(result))
    return 0


def append(journal: Journal, record: journal_pb2.JournalRecord, count: int) -> dict[str, float]:
    """Microseconds of one append: median and 99th percentile."""
    spent = []
    for _ in range(count):
        start = time.perf_counter()
        journal.append([record])
        spent.append((time.perf_counter() - start) * 1e6)
    journal.close()
    cuts = statistics.quantiles(spent, n=100)
    return {"p50_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}
