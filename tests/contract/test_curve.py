"""CURVE on the sockets: who can connect, who cannot, and what is said about it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import zmq

from baton.keys import make
from services.ops.keys import Keys
from services.wire import sockets
from services.wire.curve import SAME_WORDS_S, Words
from tests.support.keyed import foreign_dir, keys_dir, keys_of, raw, with_own_pair

__all__ = ["foreign_dir", "keys_dir"]  # fixtures

SILENCE_MS = 300
ARRIVAL_MS = 5000
# What is said when the peer has noticed first; it closes without a word.
BROKE_OFF = "a peer broke off the handshake"
ADMITS = frozenset({"prefill", "kv-store"})


class Place:
    """A decode's listening socket, and contexts of its peers."""

    def __init__(self, keys: Keys | None, address: str) -> None:
        self._contexts: list[zmq.Context[Any]] = []
        self._pushing: list[zmq.Socket[Any]] = []  # what nobody refers to is closed
        self.diallers: list[sockets.Dialler[Any]] = []
        self.context = self.context_of(keys)
        self.socket = sockets.listener(self.context, zmq.PULL, ADMITS)
        self.socket.bind(address)
        self.address = sockets.bound_address(self.socket, "")

    def context_of(self, keys: Keys | None) -> Any:
        context = sockets.context(keys=keys)
        self._contexts.append(context)
        return context

    def push(self, keys: Keys | None, peer: str = "decode") -> None:
        """One message, as the process with these keys would send it."""
        self.wake(sockets.dial(self.context_of(keys), zmq.PUSH, self.address, peer))

    def dialler(self, keys: Keys | None) -> sockets.Dialler[Any]:
        self.diallers.append(sockets.Dialler(self.context_of(keys)))
        return self.diallers[-1]

    def wake(self, socket: zmq.Socket[Any]) -> None:
        self._pushing.append(socket)
        socket.send(b"wake", zmq.DONTWAIT)

    def came(self, within_ms: int = ARRIVAL_MS) -> bool:
        return bool(self.socket.poll(within_ms)) and self.socket.recv() == b"wake"

    def close(self) -> None:
        for context in reversed(self._contexts):
            context.destroy(linger=0)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    made: list[Place] = []

    def build(keys: Keys | None, address: str = "tcp://127.0.0.1:*") -> Place:
        made.append(Place(keys, address.format(tmp_path=tmp_path)))
        return made[-1]

    yield build
    for each in made:
        each.close()
    assert not [t for t in threading.enumerate() if t.name == "curve-guard"]


@pytest.fixture
def said() -> Iterator[Callable[..., None]]:
    """Waits until somebody has logged one of these words."""
    with structlog.testing.capture_logs() as logs:

        def until(*words: str) -> None:
            end = time.monotonic() + ARRIVAL_MS / 1000
            while not any(each in str(entry) for entry in logs for each in words):
                assert time.monotonic() < end, logs
                threading.Event().wait(0.01)

        yield until


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "ipc://{tmp_path}/s"])
@pytest.mark.parametrize("role", sorted(ADMITS))
def test_known_roles_are_let_in(
    place: Callable[..., Place], keys_dir: Path, role: str, address: str
) -> None:
    """Over tcp and ipc alike."""
    at = place(keys_of(keys_dir, "decode"), address)
    at.push(keys_of(keys_dir, role))
    assert at.came()


def test_without_keys_all_is_plain(place: Callable[..., Place]) -> None:
    """As before: anybody can connect, no thread is started, nothing is watched."""
    at = place(None)
    at.wake(raw(at.context_of(None), zmq.PUSH, at.address))
    assert at.came()
    assert at.context.guard is None


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "ipc://{tmp_path}/s"])
def test_a_peer_without_keys_is_refused(
    place: Callable[..., Place], said: Callable[..., None], keys_dir: Path, address: str
) -> None:
    """Its message does not come, and the server says why; a known peer still gets through."""
    at = place(keys_of(keys_dir, "decode"), address)
    at.wake(raw(at.context_of(None), zmq.PUSH, at.address))
    said("a peer runs without keys_dir, this process with it", BROKE_OFF)
    assert not at.came(SILENCE_MS)
    at.push(keys_of(keys_dir, "prefill"))
    assert at.came()


def test_a_peer_with_an_unknown_key_is_refused(
    place: Callable[..., Place], said: Callable[..., None], keys_dir: Path
) -> None:
    """Knowing the server's public key does not help: the peer's own must be known."""
    at = place(keys_of(keys_dir, "decode"))
    server = keys_of(keys_dir, "decode").curve_keys("decode")[0]
    at.wake(with_own_pair(at.context_of(None), zmq.PUSH, at.address, server))
    said("a key that is not known")
    assert not at.came(SILENCE_MS)


def test_a_peer_of_another_role_is_refused(
    place: Callable[..., Place], said: Callable[..., None], keys_dir: Path
) -> None:
    """A decode has good keys and no business at another decode; both sides hear of it."""
    at = place(keys_of(keys_dir, "decode"))
    at.push(keys_of(keys_dir, "decode"))
    said("a decode, which may not connect here")
    said("the decode was refused, or refuses this process")
    assert not at.came(SILENCE_MS)


def test_a_peer_of_another_cluster_is_refused(
    place: Callable[..., Place], said: Callable[..., None], keys_dir: Path, foreign_dir: Path
) -> None:
    """Its greeting is for another public key; both sides hear of it."""
    at = place(keys_of(keys_dir, "decode"))
    at.push(keys_of(foreign_dir, "prefill"))
    said("a peer expects another public key")
    said("the decode broke off the handshake")
    assert not at.came(SILENCE_MS)


def test_a_server_without_keys_gets_nothing(
    place: Callable[..., Place], said: Callable[..., None], keys_dir: Path
) -> None:
    """Nor does one in the place of another role: what is sent is for the right server alone."""
    at = place(None)
    at.push(keys_of(keys_dir, "prefill"))
    said("the decode runs without keys_dir", "the decode broke off the handshake")
    other = place(keys_of(keys_dir, "decode"))
    other.push(keys_of(keys_dir, "prefill"), peer="kv-store")
    assert not at.came(SILENCE_MS)
    assert not other.came(SILENCE_MS)


@pytest.mark.parametrize("who", ["server", "peer"])
def test_renewed_keys_are_taken_up_one_process_at_a_time(
    place: Callable[..., Place], tmp_path: Path, who: str
) -> None:
    """After a renewal one side restarts with new keys and the other goes on with its old ones: they
    find each other, whichever it is."""
    make(tmp_path / "k")
    old = {role: keys_of(tmp_path / "k", role) for role in ("prefill", "decode")}
    make(tmp_path / "k", renew=True)
    new = {role: keys_of(tmp_path / "k", role) for role in ("prefill", "decode")}
    at = place((new if who == "server" else old)["decode"])
    dialler = at.dialler((old if who == "server" else new)["prefill"])
    end = time.monotonic() + ARRIVAL_MS / 1000
    came = False
    while not came and time.monotonic() < end:
        with contextlib.suppress(zmq.Again):  # refused; it will be dialled again
            dialler.to(zmq.PUSH, at.address, "decode").send(b"wake", zmq.DONTWAIT)
        came = at.came(20)
    assert came


def test_a_server_that_restarts_with_new_keys_is_found_again(
    place: Callable[..., Place], tmp_path: Path
) -> None:
    """A socket that was connected to the old one is refused by the new one, and dialled again."""
    make(tmp_path / "k")
    first = place(keys_of(tmp_path / "k", "decode"))
    dialler = first.dialler(keys_of(tmp_path / "k", "prefill"))
    dialler.to(zmq.PUSH, first.address, "decode").send(b"wake")
    assert first.came()
    address = first.address
    first.socket.close()
    make(tmp_path / "k", renew=True)
    second = place(keys_of(tmp_path / "k", "decode"), address)
    end = time.monotonic() + ARRIVAL_MS / 1000
    while not second.came(20):
        assert time.monotonic() < end
        with contextlib.suppress(zmq.Again):
            dialler.to(zmq.PUSH, address, "decode").send(b"wake", zmq.DONTWAIT)


def test_a_dialler_keeps_a_bounded_number(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes come and go with their addresses; the one not used for longest is closed."""
    monkeypatch.setattr(sockets, "DIALLED_MAX", 3)
    at = place(None)
    dialler = at.dialler(None)
    first = dialler.to(zmq.PUSH, "tcp://127.0.0.1:1", "decode")
    made = [dialler.to(zmq.PUSH, f"tcp://127.0.0.1:{port}", "decode") for port in (2, 3)]
    assert dialler.to(zmq.PUSH, "tcp://127.0.0.1:1", "decode") is first
    dialler.to(zmq.PUSH, "tcp://127.0.0.1:4", "decode")
    assert [first.closed, *(socket.closed for socket in made)] == [False, True, False]


def test_a_flood_of_refusals_is_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same refusal is told once in a while, with how often it came."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with structlog.testing.capture_logs() as logs:
        say = Words()
        for _ in range(100):
            say("peer refused", reason="x")
        say("peer refused", reason="y")
        now[0] = SAME_WORDS_S
        say("peer refused", reason="x")
    assert [(entry["reason"], entry["times"]) for entry in logs] == [("x", 1), ("y", 1), ("x", 100)]
