"""What a client is told about its request's time and tokens."""

from __future__ import annotations

from typing import Any

import pytest

from baton.v1 import control_pb2, inference_pb2
from services.scheduler.request import Request
from services.scheduler.text import TextStream
from services.scheduler.timing import timing, transfer_ms, usage


def request(**fields: Any) -> Request:
    """Accepted at 10 s; the rest as given."""
    known = Request(
        body=inference_pb2.GenerateRequest(request_id="r"), prompt=[1, 2, 3],
        sampling=control_pb2.ResolvedSampling(max_tokens=9), text=TextStream(str, []),
        accepted_unix_ms=0, accepted_at=10.0, deadline_unix_ms=0, deadline_at=None, orphan_s=1.0,
        retain_s=1.0,
    )  # fmt: skip
    for name, value in fields.items():
        setattr(known, name, value)
    return known


def times(*pieces: tuple[int, int, float]) -> list[control_pb2.GroupTime]:
    return [control_pb2.GroupTime(group=g, tokens=t, at=at) for g, t, at in pieces]


def test_times_are_counted_from_acceptance() -> None:
    """Queue until dispatch, first token, mean time of the others, all of it; in milliseconds."""
    told = timing(
        request(
            dispatched_at=10.5, first_token_at=11.0, last_token_at=13.0, tokens=[(1, 0.0)] * 5,
            takeovers=2, stall_s=0.25, kv_bytes=77,
        ),
        14.0, "prefill-0", "decode-1",
    )  # fmt: skip
    assert (told.queue_ms, told.ttft_ms, told.tpot_ms, told.total_ms) == (500, 1000, 500, 4000)
    assert (told.takeovers, told.stall_ms, told.kv_bytes) == (2, 250, 77)
    assert (told.prefill_worker, told.decode_worker) == ("prefill-0", "decode-1")


@pytest.mark.parametrize("tokens", [0, 1])
def test_without_a_second_token_there_is_no_time_per_token(tokens: int) -> None:
    """And a request that never got so far has no negative times."""
    told = timing(request(tokens=[(1, 0.0)] * tokens), 12.0, "", "")
    assert (told.tpot_ms, told.queue_ms, told.total_ms) == (0, 0, 2000)
    assert told.ttft_ms == 0


def test_transfer_is_summed_over_its_pieces() -> None:
    """From ready at prefill until the first verification that covers the piece."""
    known = request(
        ready=times((0, 64, 1.0), (1, 64, 2.0), (0, 100, 3.0), (1, 100, 4.0)),
        verified=times((0, 64, 1.5), (1, 100, 4.25), (0, 100, 3.5)),
        last_layer_at=4.0,
    )
    summed, exposed = transfer_ms(known)
    assert summed == pytest.approx(500 + 2250 + 500 + 250)
    assert exposed == pytest.approx(250)


def test_what_was_verified_before_the_last_layer_is_hidden() -> None:
    """Nothing is exposed, and nothing is negative; a piece that nobody verified is not counted."""
    known = request(
        ready=times((0, 64, 2.0), (1, 64, 3.0)), verified=times((0, 64, 1.0)), last_layer_at=5.0
    )
    assert transfer_ms(known) == (0.0, 0.0)
    assert transfer_ms(request()) == (0.0, 0.0)


def test_usage_counts_tokens() -> None:
    """The prompt, what of it was cached, the answer, and what was computed twice."""
    told = usage(request(tokens=[(1, 0.0)] * 4, cached_tokens=2, recomputed=3))
    assert (told.prompt_tokens, told.cached_tokens) == (3, 2)
    assert (told.completion_tokens, told.recomputed_tokens) == (4, 3)
