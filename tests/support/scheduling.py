"""Requests in a fake cluster, brought to where a test wants them."""

from __future__ import annotations

from typing import Any

from baton.v1 import inference_pb2
from tests.support.fake_cluster import FakeCluster

STOP, LENGTH, CANCELLED = (
    inference_pb2.FINISH_REASON_STOP,
    inference_pb2.FINISH_REASON_LENGTH,
    inference_pb2.FINISH_REASON_CANCELLED,
)
SHAPES: list[dict[str, Any]] = [
    {}, {"decodes": 1}, {"slots": 2}, {"prefills": 2, "decodes": 3},
    {"prefills": 2, "decodes": 2, "store_count": 2}, {"prefills": 1, "decodes": 2, "store_count": 2},
]  # fmt: skip


def reason(cluster: FakeCluster, request_id: str) -> int:
    """How a request has ended; it must have ended well."""
    final = cluster.final(request_id)
    assert final is not None, f"{request_id} has not ended"
    assert final.HasField("finished"), final
    return int(final.finished.reason)


def running(cluster: FakeCluster, tokens: int, request_id: str = "r", **ask: Any) -> None:
    """A request that has got exactly `tokens` tokens."""
    cluster.ask(request_id, max_tokens=10, **ask)
    cluster.until(lambda: len(cluster.tokens(request_id)) == tokens)


def owner(cluster: FakeCluster, request_id: str = "r") -> str:
    """The name of the request's present decode."""
    return cluster.scheduler.requests[request_id].decode_worker.split("/")[0]
