"""Messages moved by native code through pyzmq's sockets: every frame as it was, large ones
without a copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from services.wire.zmq_medium import COPY_BYTES_MAX, Socket

DEADLINE_MS = 5000


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Socket, Socket]]:
    """Two ends of one connection over tcp."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    port = one.bind_to_random_port("tcp://127.0.0.1")
    other.connect(f"tcp://127.0.0.1:{port}")
    yield Socket(one), Socket(other)
    context.destroy(linger=0)


def came(socket: Socket) -> list[memoryview]:
    assert socket.made.poll(DEADLINE_MS)
    frames: list[memoryview] = socket.native.receive()
    return frames


@given(sizes=st.lists(st.integers(0, 3 * COPY_BYTES_MAX), min_size=1, max_size=5))
def test_every_frame_arrives_as_it_was(pair: tuple[Socket, Socket], sizes: list[int]) -> None:
    """Whatever the sizes; a message is told to be read no more once it has gone out."""
    one, other = pair
    frames = [np.full(size, n + 1, np.uint8) for n, size in enumerate(sizes)]
    tracker = one.native.send([memoryview(frame) for frame in frames])
    assert (tracker is not None) == (max(sizes) > COPY_BYTES_MAX)
    assert [bytes(frame) for frame in came(other)] == [frame.tobytes() for frame in frames]
    assert other.native.receive() is None
    assert not other.native.ready()
    one.native.send([b"next"])  # by then the one before has been let go of
    assert bytes(came(other)[0]) == b"next"
    assert tracker is None or tracker.done


def test_a_frame_outlives_its_message(pair: tuple[Socket, Socket]) -> None:
    """What has come stays as long as somebody looks at it, and nobody can write it."""
    one, other = pair
    one.native.send([b"first", b"second" * COPY_BYTES_MAX])
    kept = came(other)[1]
    one.native.send([b"another"])
    came(other)
    assert kept.readonly
    assert bytes(kept[:6]) == b"second"


def test_only_whole_pieces_are_sent(pair: tuple[Socket, Socket]) -> None:
    """And nothing of a message goes out when one of its frames is none."""
    one, other = pair
    with pytest.raises(ValueError, match="one piece"):
        one.native.send([b"head", memoryview(b"0123456789")[::2]])
    assert not other.made.poll(20)


def test_a_closed_socket_sends_and_receives_nothing() -> None:
    """Whoever is late finds out from the answer that does not come."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as made:
        socket = Socket(made)
        socket.native.close()
        assert socket.native.send([b"head"]) is None
        assert socket.native.receive() is None
        assert not socket.native.ready()
