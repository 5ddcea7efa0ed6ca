"""Planted bugs. Each takes a guard away that the design stands on; the simulation must find it.

lease-ignored      a page that a fenced writer may still write is handed out at once
epoch-ignored      what an old epoch commits and reports is accepted
free-before-ack    a prefill has done with its pages before the receiver has acknowledged them
free-before-stop   a stream's pages are free before their writers have said Stopped
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from baton.v1 import store_pb2
from services.decode.stream import DecodeStream
from services.kv.record import StreamRecord, pack
from services.kv_store.pool import BlockPool
from services.kv_store.runtime import KvStore
from services.prefill.handoff import RemoteHandoff
from services.scheduler.reports import Reports


def _retire(self: BlockPool, block: int, request_id: str, may_write: Any) -> bool:
    self.drop(block)
    return False


def _advance(self: StreamRecord, epoch: int, steps: int) -> bool:
    owner, _ = self.commit()
    before = self._words.load(0)
    return bool(self._words.cas(0, before, pack(owner, max(steps, before & 0xFFFFFFFF)))[0])


def _release(self: KvStore, request: store_pb2.ReleaseRequest) -> bool:
    request = store_pb2.ReleaseRequest(
        request_id=request.request_id, keep_blocks=request.keep_blocks
    )  # nobody is waited for
    if request.request_id in self.state.streams:
        self.state.stream(request.request_id).fenced.clear()
    return bool(_WHOLE_RELEASE(self, request))


_WHOLE_RELEASE = KvStore.release


def _lease_ignored() -> list[Any]:
    return [patch.object(BlockPool, "retire", _retire)]


def _epoch_ignored() -> list[Any]:
    return [
        patch.object(StreamRecord, "advance", _advance),
        patch.object(DecodeStream, "check_epoch", lambda self: None),
        patch.object(Reports, "_stale", lambda self, request, worker_id, epoch: False),
    ]


def _free_before_ack() -> list[Any]:
    return [patch.object(RemoteHandoff, "end", lambda self, ended, cancel=False: ended(None))]


def _free_before_stop() -> list[Any]:
    return [patch.object(KvStore, "release", _release)]


MUTATIONS: dict[str, Callable[[], list[Any]]] = {
    "lease-ignored": _lease_ignored,
    "epoch-ignored": _epoch_ignored,
    "free-before-ack": _free_before_ack,
    "free-before-stop": _free_before_stop,
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The services, with this bug."""
    with ExitStack() as stack:
        for change in MUTATIONS[name]():
            stack.enter_context(change)
        yield
