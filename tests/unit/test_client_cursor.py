"""The client library's rules: each index once, no gap unnoticed, no end unnoticed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.client import (
    BACKOFF_S_MAX,
    BACKOFF_S_MIN,
    AsyncClient,
    Client,
    ClientError,
    StreamCorrupt,
    Unreachable,
    _Cursor,
    generate_request,
)
from baton.v1 import inference_pb2 as pb
from tests.support.scripted import Script, finished, say, serve, token

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def cursor(**fields: Any) -> _Cursor:
    return _Cursor("r", pb.GenerateRequest(request_id="r"), retry_s=30.0, **fields)


def test_generate_is_repeated_until_the_scheduler_has_answered() -> None:
    """A Generate that was never acknowledged is sent again; after an event it is only resumed."""
    position = cursor()
    assert position.step() == "generate"
    position.broke(UNAVAILABLE, "gone", now=0.0)
    assert position.step() == "generate"
    position.accept(token(0))
    position.broke(UNAVAILABLE, "gone", now=1.0)
    assert (position.step(), position.next_index) == ("resume", 1)


def test_a_gap_is_an_error() -> None:
    """A missing index is never passed over in silence."""
    position = cursor()
    position.accept(token(0))
    with pytest.raises(StreamCorrupt, match="token 2 came where 1 is due"):
        position.accept(token(2))


def test_a_duplicate_must_be_equal() -> None:
    """A token that was seen is dropped; one that differs from what was seen is an error."""
    position = cursor()
    assert position.accept(token(0))
    assert not position.accept(token(0))
    with pytest.raises(StreamCorrupt, match="differing"):
        position.accept(token(0, token_id=99))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_every_index_comes_once_and_in_order(replays: list[tuple[int, int]]) -> None:
    """Whatever is replayed from at or before the position, the caller sees 0, 1, 2, ... once."""
    position, given_out = cursor(), []
    for back, count in replays:
        start = max(0, position.next_index - back)
        given_out += [i for i in range(start, start + count) if position.accept(token(i))]
        position.broke(UNAVAILABLE, "gone", now=0.0)
    assert given_out == list(range(position.next_index))


def test_a_resumed_stream_begins_where_it_was_asked_to() -> None:
    """Tokens before `from_index` are not the caller's; a gap behind it is an error."""
    position = _Cursor("r", None, retry_s=30.0, first_index=3)
    assert position.step() == "resume"
    assert not position.accept(token(2))
    assert position.accept(token(3))
    assert position.next_index == 4


def test_retries_back_off_and_are_bounded_since_the_last_progress() -> None:
    """50 ms, doubling to 500 ms; after `retry_s` without an event the stream is given up."""
    position = cursor()
    delays = [position.broke(UNAVAILABLE, "gone", now=100.0) for _ in range(6)]
    assert delays == [BACKOFF_S_MIN, 0.1, 0.2, 0.4, BACKOFF_S_MAX, BACKOFF_S_MAX]
    position.accept(token(0))
    position.broke(UNAVAILABLE, "gone", now=129.0)
    position.broke(UNAVAILABLE, "gone", now=158.9)
    with pytest.raises(Unreachable, match="gone"):
        position.broke(UNAVAILABLE, "gone", now=159.0)


def test_other_errors_are_not_retried() -> None:
    """A refusal is the answer: it keeps its status and its message."""
    with pytest.raises(ClientError, match="top_p") as caught:
        cursor().broke(grpc.StatusCode.INVALID_ARGUMENT, "top_p: 2 is above 1", now=0.0)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_a_field_that_does_not_fit_is_named() -> None:
    """What protobuf cannot carry is refused before it is sent, by field."""
    with pytest.raises(ClientError, match="max_tokens"):
        generate_request("x", {"max_tokens": -1})


def test_a_request_carries_what_was_asked_and_nothing_else() -> None:
    """Unset options stay unset, so that the scheduler's defaults apply."""
    request = generate_request([1, 2], {"temperature": 0.0, "stop": ["a"], "orphan_ms": 0})
    assert list(request.token_ids.ids) == [1, 2]
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert request.HasField("orphan_ms")
    assert not request.HasField("retain_ms")
    assert len(request.request_id) == 32
    assert list(request.sampling.stop) == ["a"]
    assert generate_request([], {}).WhichOneof("prompt") == "token_ids"


# --- against a scripted server -------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/s.sock"


def broken_twice() -> Script:
    return [
        say(then=UNAVAILABLE),
        say(token(0), token(1), then=UNAVAILABLE),
        say(token(1), token(2), then=grpc.StatusCode.CANCELLED),
        say(token(3), finished()),
    ]


ASKED = [("generate", 0), ("generate", 0), ("resume", 2), ("resume", 3)]


def test_a_broken_stream_goes_on(address: str) -> None:
    """Broken before the first event, in mid-stream and by a server that stops: each token once."""
    server, servicer = serve(address, broken_twice())
    with Client(address) as client:
        events = list(client.generate("x"))
    server.stop(None).wait()
    assert [event.token.index for event in events[:-1]] == [0, 1, 2, 3]
    assert events[-1].HasField("finished")
    assert servicer.asked == ASKED


def test_a_broken_stream_goes_on_under_asyncio(address: str) -> None:
    """The asyncio client follows the same rules."""

    async def follow() -> list[int]:
        async with AsyncClient(address) as client:
            return [e.token.index async for e in client.generate("x") if e.HasField("token")]

    server, servicer = serve(address, broken_twice())
    assert asyncio.run(follow()) == [0, 1, 2, 3]
    server.stop(None).wait()
    assert servicer.asked == ASKED


def test_a_stream_outlives_its_server(address: str) -> None:
    """A new server at the old address goes on where the old one stopped."""
    with Client(address) as client:
        first, _ = serve(address, [say(token(0), then=UNAVAILABLE)])
        stream = client.generate("x")
        assert next(stream).token.index == 0
        first.stop(None).wait()
        second, servicer = serve(address, [say(token(1), finished())])
        assert [event.WhichOneof("event") for event in stream] == ["token", "finished"]
        second.stop(None).wait()
    assert servicer.asked == [("resume", 1)]


def test_an_end_without_a_final_event_is_not_an_end(address: str) -> None:
    """A stream that just stops is resumed, since every request has exactly one final event."""
    server, servicer = serve(address, [say(token(0)), say(finished())])
    with Client(address) as client:
        assert len(list(client.generate("x"))) == 2
    server.stop(None).wait()
    assert servicer.asked == [("generate", 0), ("resume", 1)]


def test_a_request_that_was_forgotten_is_told(address: str) -> None:
    """After an acknowledgement NOT_FOUND is final: starting anew could repeat tokens."""
    script = [say(token(0), then=UNAVAILABLE), say(then=grpc.StatusCode.NOT_FOUND)]
    server, _ = serve(address, script)
    with Client(address) as client, pytest.raises(ClientError, match="NOT_FOUND"):
        list(client.generate("x"))
    server.stop(None).wait()


def test_nobody_there(address: str) -> None:
    """Without a server the wait is bounded and the error says so."""
    with Client(address, retry_s=0.0) as client, pytest.raises(Unreachable):
        list(client.generate("x"))
    with Client(address) as client, pytest.raises(Unreachable):
        client.view()
