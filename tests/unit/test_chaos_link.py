"""The link that is broken on purpose: what it changes, and what it leaves alone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import zmq

from baton.chaos.link import Flipper, Relay
from baton.chaos.tap import GREETING_BYTES, Bodies, Span

GREETING = bytes(GREETING_BYTES)


def frame(body: bytes, flags: int = 0) -> bytes:
    """One ZMTP frame; bodies of more than 255 bytes have a long length."""
    if len(body) > 255:
        return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
def test_bodies_are_found_over_any_cut(step: int) -> None:
    """Of greeting, commands and messages, the messages' bytes and nothing else, however the stream
    is cut into pieces."""
    parts = [b"a" * 3, b"b" * 300, b"", b"c" * 255]
    data = GREETING + frame(b"READY" * 9, flags=4) + b"".join(frame(part) for part in parts)
    bodies, found = Bodies(), b""
    for at in range(0, len(data), step):
        chunk = data[at : at + step]
        found += b"".join(chunk[span.begin : span.end] for span in bodies.spans(chunk))
    assert found == b"".join(parts)


def test_as_many_bytes_are_flipped_as_were_asked_for() -> None:
    """Each in a body, each to another value."""
    flipper = Flipper(Random(1), mean_gap_bytes=1000)
    flipper.arm(30)
    changed, short = [], 0
    while flipper.left:
        before = bytes(range(256)) * 16
        after = bytearray(before)
        flipper.apply(after, [Span(100, 200, 100), Span(300, 4000, 90_000)])
        now = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        short += sum(i < 200 for i in now)
        changed += now
    assert len(changed) == flipper.flipped == 30
    assert all(100 <= i < 200 or 300 <= i < 4000 for i in changed)
    assert short == flipper.flipped_short > 5


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Relay, zmq.Socket[bytes], zmq.Socket[bytes]]]:
    """A relay, the socket that sends through it and the one that receives."""
    target = f"{tmp_path}/s"
    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as to:
        pull.linger = to.linger = 0
        pull.bind(f"ipc://{target}")
        pull.rcvtimeo = 5000
        relay = Relay(target, Flipper(Random(2), 10))
        to.connect(relay.address)
        yield relay, to, pull
        relay.close()


Pair = tuple[Relay, "zmq.Socket[bytes]", "zmq.Socket[bytes]"]


def test_messages_pass(pair: Pair) -> None:
    """Unchanged, unless a flip is asked for."""
    relay, to, pull = pair
    message = [b"head", bytes(100_000)]
    to.send_multipart(message)
    assert pull.recv_multipart() == message
    assert relay.flipper is not None
    relay.flipper.arm(1)
    to.send_multipart(message)
    to.send_multipart(message)
    damaged = [pull.recv_multipart() for _ in range(2)]
    assert [list(map(len, each)) for each in damaged] == [[4, 100_000]] * 2
    assert (
        sum(part != whole for each in damaged for part, whole in zip(each, message, strict=True))
        == 1
    )


def test_a_cut_link_carries_nothing_and_can_be_healed(pair: Pair) -> None:
    """What is sent meanwhile is lost with its connection; what is sent later arrives."""
    relay, to, pull = pair
    to.send(b"before")
    assert pull.recv() == b"before"
    relay.cut()
    to.send(b"meanwhile")
    assert not pull.poll(200)
    relay.heal()
    pull.rcvtimeo = 200
    for _ in range(25):  # the sender finds the break in its own time
        to.send(b"after")
        if pull.poll(200):
            break
    assert pull.recv() == b"after"


def test_nobody_behind_the_relay_is_a_closed_connection(tmp_path: Path) -> None:
    """As it is without a relay."""
    relay = Relay(f"{tmp_path}/nobody")
    port = int(relay.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    relay.close()
