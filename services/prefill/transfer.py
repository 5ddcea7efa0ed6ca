"""Who sends for a prefill: keeps to the windows of other stores, collects acknowledgements and sends
again what was lost.

`Sender` does it when it is polled. `Transfers` is a sender on a thread of its own, which may run on
another core than the engine's, so that computing never waits for the network.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from services.ops import lifecycle, log
from services.ops.errors import BatonError, Unavailable
from services.wire.client import Client
from services.wire.medium import Medium
from services.wire.push import Cancelled, Push
from services.wire.session import SILENCE_S, Exchange
from services.wire.stream import Hello

_logger = log.get("transfer")
Ended = Callable[[BatonError | None], None]


class Carrier(Protocol):
    """Takes transfers on and is told how far their pages are complete."""

    def begin(self, address: str, push: Push) -> None: ...

    def ready(self, push: Push, group: int, tokens: int, announce: str) -> None: ...

    def first(self, push: Push, token: int, logprob: float, announce: str) -> None: ...

    def cancel(self, push: Push) -> None: ...

    def end(self, push: Push, ended: Ended) -> None:
        """`ended` is called once it is over and nothing reads its pages any more: with None when all
        is stored or it was cancelled."""
        ...


class Sender:
    """A carrier for one thread. Somebody polls its `client`.

    A store that falls silent is noticed within a second, and its transfers fail; for `patience_s` they
    are begun again, because a store that restarts goes on with the arena it had.
    """

    def __init__(
        self, client: Client, patience_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.client = client
        self._patience_s, self._clock = patience_s, clock
        self._addresses: dict[Push, str] = {}
        self._silent_since: dict[Push, tuple[float, int]] = {}  # and how much was stored then
        self._ended: dict[Push, Ended] = {}
        self._over: set[Push] = set()  # before anybody has asked for their end

    def begin(self, address: str, push: Push) -> None:
        self._addresses[push] = address
        self._begin(address, push)

    def _begin(self, address: str, push: Push) -> None:
        try:
            self.client.begin(address, push, self._has_ended)
        except BatonError as error:
            push.fail(error)
            self._has_ended(push)

    def ready(self, push: Push, group: int, tokens: int, announce: str) -> None:
        push.announce = announce
        push.ready(group, tokens)

    def first(self, push: Push, token: int, logprob: float, announce: str) -> None:
        push.announce = announce
        push.first(token, logprob)

    def cancel(self, push: Push) -> None:
        push.cancel()

    def end(self, push: Push, ended: Ended) -> None:
        self._ended[push] = ended
        if push in self._over:
            self._has_ended(push)

    def _has_ended(self, exchange: Exchange) -> None:
        assert isinstance(exchange, Push)
        if isinstance(exchange.error, Unavailable) and self._patient(exchange):
            _logger.warning("hand-off interrupted", reason=exchange.error.message)
            exchange.try_again()
            self._begin(self._addresses[exchange], exchange)
            return
        exchange.given_up = exchange.error
        self._addresses.pop(exchange, None)
        self._silent_since.pop(exchange, None)
        ended = self._ended.pop(exchange, None)
        if ended is None:
            self._over.add(exchange)
            return
        self._over.discard(exchange)
        cancelled = isinstance(exchange.error, Cancelled)
        ended(None if cancelled else exchange.error)

    def _patient(self, push: Push) -> bool:
        """Whether to go on after a failure: not longer than `patience_s` without any progress."""
        now, stored = self._clock(), sum(push.stored)
        since, before = self._silent_since.get(push, (now, stored))
        if stored > before:
            since = now
        self._silent_since[push] = (since, stored)
        return now - since + SILENCE_S < self._patience_s


class Transfers:
    """A sender on its own thread, on `core` if that is not negative. All methods may be called from any
    thread and only leave word; `ended` is called on the sending thread."""

    def __init__(
        self, medium: Medium, hello: Hello, core: int = -1, patience_s: float = 0.0
    ) -> None:
        self._medium, self._core = medium, core
        self._sender = Sender(Client(medium, hello), patience_s)
        self._words: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._thread = lifecycle.engine_thread(self._run, "transfers")

    def start(self) -> None:
        self._thread.start()

    def _say(self, word: Callable[[], None]) -> None:
        self._words.put(word)
        self._medium.wake()

    def begin(self, address: str, push: Push) -> None:
        self._say(lambda: self._sender.begin(address, push))

    def ready(self, push: Push, group: int, tokens: int, announce: str) -> None:
        self._say(lambda: self._sender.ready(push, group, tokens, announce))

    def first(self, push: Push, token: int, logprob: float, announce: str) -> None:
        self._say(lambda: self._sender.first(push, token, logprob, announce))

    def cancel(self, push: Push) -> None:
        self._say(lambda: self._sender.cancel(push))

    def end(self, push: Push, ended: Ended) -> None:
        self._say(lambda: self._sender.end(push, ended))

    def close(self) -> None:
        """Returns when everything is over; a store that does not answer is given up as always."""

        def word() -> None:
            self._closing = True

        self._say(word)
        self._thread.join(timeout=2 * SILENCE_S)

    def _run(self) -> None:
        if self._core >= 0:
            os.sched_setaffinity(threading.get_native_id(), {self._core})
        client = self._sender.client
        while not (self._closing and client.idle):
            self._medium.wait(client.wait_s)
            while not self._words.empty():
                self._words.get_nowait()()
            client.poll()
        client.close()
        self._medium.close()
