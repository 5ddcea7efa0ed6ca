"""A peer's side of one connection to a store: introduces itself, keeps to the window it was granted,
notices silence, begins anew when the connection or the store has been lost. Pure: it is told what came
and what time it is, and answers with requests to send.

    new --HELLO--> (silence: HELLO again) --WELCOME--> open --REFUSED(hello), cut--> new
                                           any state --nothing heard for SILENCE_S--> all exchanges fail

What goes on over a session is an `Exchange`: a push of pages, an offer of them, a fetch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.kv.arena import ArenaPlan
from services.ops.errors import BatonError, CorruptKv, LayoutMismatch, StaleEpoch, Unavailable
from services.wire.stream import Ack, Code, Hello, Message, Refused, Welcome, number

Buffer = bytes | memoryview
SILENCE_S = 0.9  # a peer that owes an answer and says nothing for this long is not there
LISTENED_S = 0.1  # of the time between two looks at the clock, at most so much was spent listening
RETRY_S = 0.1  # what is unanswered after this much silence is asked for again


def hello_of(plan: ArenaPlan) -> Hello:
    """How a process that has this arena introduces itself."""
    return Hello(fingerprint=bytes.fromhex(plan.fingerprint), layout=plan.layout.describe())


class Tracker(Protocol):
    """Of a message sent without a copy: until `done`, its memory is still being read."""

    @property
    def done(self) -> bool: ...


@dataclass(frozen=True)
class Request:
    """A message that wants an answer. `payload_bytes` count against the window until it is there."""

    message: Message
    frames: Callable[[], Sequence[Buffer]] = tuple  # read when it is sent
    payload_bytes: int = 0


@dataclass
class Sent:
    """A request on its way."""

    request: Request
    at: float


class Inflight(dict[int, Sent]):
    """Requests on their way by sequence, oldest first, and how many bytes of payload they carry."""

    payload_bytes = 0

    def __setitem__(self, sequence: int, sent: Sent) -> None:
        assert sequence not in self
        super().__setitem__(sequence, sent)
        self.payload_bytes += sent.request.payload_bytes

    def take(self, sequence: int) -> Sent | None:
        """Takes one off; None when it is not there."""
        sent = super().pop(sequence, None)
        if sent is not None:
            self.payload_bytes -= sent.request.payload_bytes
        return sent

    def clear(self) -> None:
        super().clear()
        self.payload_bytes = 0


class Exchange:
    """One purpose pursued over a session. Subclasses say what to send next and take the answers."""

    def __init__(self) -> None:
        self.inflight = Inflight()
        self.error: BatonError | None = None
        self.trackers: list[Tracker] = []

    def next(self, room_bytes: int) -> Request | None:
        """What to send now, if anything, of at most `room_bytes` of payload."""
        raise NotImplementedError

    def answered(self, sent: Request, answer: Message, frames: Sequence[memoryview]) -> None:
        """The answer to a request, refusals that have a way on included."""
        raise NotImplementedError

    def restart(self) -> None:
        """The session is a new one: nothing that was on its way counts."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """Whether all has been achieved."""
        raise NotImplementedError

    def unanswered(self, now: float, quiet_s: float) -> None:
        """Nothing has been heard for `quiet_s`: ask again if that is long."""
        raise NotImplementedError

    @property
    def over(self) -> bool:
        """Achieved or failed, and no memory is being read any more."""
        if not self.done and self.error is None:
            return False
        self.trackers = [tracker for tracker in self.trackers if not tracker.done]
        return not self.trackers

    @property
    def inflight_bytes(self) -> int:
        return self.inflight.payload_bytes

    def fail(self, error: BatonError) -> None:
        if not self.done and self.error is None:
            self.error = error


class Session:
    """All exchanges with one store. `numbers` gives session numbers and sequences, ascending over the
    life of the process; `window_bytes` is what this end would use at most."""

    def __init__(
        self, hello: Hello, address: str, numbers: Iterator[int], window_bytes: int
    ) -> None:
        self._hello, self._address, self._numbers = hello, address, numbers
        self._window_max = window_bytes
        self.exchanges: list[Exchange] = []
        self.window_bytes = 0  # what the store has granted; 0: not welcomed
        self.number = 0  # of the session; 0: no HELLO has been sent
        self.wants_reset = False  # the connection is of no use: make another
        self._hello_at = 0.0
        self._quiet_s = 0.0  # since an answer has been owed and nothing was heard
        self._ticked_at: float | None = None
        self._hellos = 0

    @property
    def inflight_bytes(self) -> int:
        return sum(exchange.inflight_bytes for exchange in self.exchanges)

    @property
    def idle(self) -> bool:
        return not self.exchanges

    def forget_over(self) -> list[Exchange]:
        """Lets go of the exchanges that are over, and gives them."""
        over = [exchange for exchange in self.exchanges if exchange.over]
        self.exchanges = [exchange for exchange in self.exchanges if exchange not in over]
        return over

    # --- what has come ---

    def received(self, message: Message, frames: Sequence[memoryview], now: float) -> None:
        """An answer; those of another session, and late ones, are nobody's."""
        if isinstance(message, Refused) and not message.session:
            for exchange in self.exchanges:  # something of ours was too damaged to be told apart
                exchange.unanswered(now, RETRY_S)
        if message.session != self.number or not self.number:
            return
        self._quiet_s = 0.0
        if isinstance(message, Welcome):
            if not self.window_bytes:
                self.window_bytes = min(self._window_max, message.window_bytes)
                self._hellos = 0
        elif isinstance(message, Refused) and message.code == Code.HELLO:
            self.begin_again()
        elif isinstance(message, Refused) and message.code == Code.BUSY:
            self._hellos = 1  # it answers: nothing is wrong with the connection
        elif isinstance(message, Refused) and not message.sequence:
            self.fail(error_of(message))
        else:
            self._answered(message, frames)

    def _answered(self, message: Message, frames: Sequence[memoryview]) -> None:
        sequences = message.sequences() if isinstance(message, Ack) else (message.sequence,)
        for sequence in sequences:
            self._take(sequence, message, frames)

    def _take(self, sequence: int, message: Message, frames: Sequence[memoryview]) -> None:
        for exchange in self.exchanges:
            sent = exchange.inflight.take(sequence)
            if sent is None or exchange.error is not None:
                continue  # what has failed touches nothing any more
            if isinstance(message, Refused) and message.code in _FINAL:
                exchange.fail(error_of(message))
            else:
                exchange.answered(sent.request, message, frames)

    def begin_again(self) -> None:
        """The store has forgotten us, or the connection is another: a new session, in which each
        exchange asks how far it has come."""
        self.window_bytes, self.number = 0, 0
        for exchange in self.exchanges:
            exchange.inflight.clear()
            exchange.restart()

    def fail(self, error: BatonError) -> None:
        """All exchanges have failed. The next one begins anew: nothing is held against the peer."""
        for exchange in self.exchanges:
            exchange.fail(error)
        self.begin_again()
        self._hellos, self._quiet_s, self.wants_reset = 0, 0.0, True

    # --- what to send ---

    def tick(self, now: float) -> Iterator[tuple[Request, Exchange | None]]:
        """What is to be sent now, in order. Call it after each batch of messages and every 50 ms."""
        active = [e for e in self.exchanges if e.error is None and not e.done]
        self._listen(now, self._owed(active))
        if self._quiet_s > SILENCE_S:
            words = f"{self._address} has not answered for {SILENCE_S} s"
            self.fail(Unavailable(f"stream: {words}"))
            return
        if active and not self.window_bytes:
            yield from self._introduce(now)
        elif active:
            for exchange in active:
                exchange.unanswered(now, self._quiet_s)
                yield from self._requests(exchange, now)

    def _listen(self, now: float, owed: bool) -> None:
        """Counts silence while an answer is owed, and only as long as this end was there to hear one: a
        process that was stopped, or had no core, does not take that for its peer's silence."""
        since = 0.0 if self._ticked_at is None else now - self._ticked_at
        self._ticked_at = now
        self._quiet_s = self._quiet_s + min(since, LISTENED_S) if owed else 0.0

    def _owed(self, active: Sequence[Exchange]) -> bool:
        """Whether the peer owes an answer."""
        if not self.window_bytes:
            return bool(active) and self._hellos > 0
        return any(exchange.inflight for exchange in active)

    def _introduce(self, now: float) -> Iterator[tuple[Request, None]]:
        if self.number and now - self._hello_at < RETRY_S:
            return
        self._hellos += 1
        if self._hellos % 4 == 0:
            self.wants_reset = True  # a connection may have died in silence
        self._hello_at = now
        self.number = self.number or next(self._numbers)
        yield Request(dataclasses.replace(self._hello, session=self.number)), None

    def _requests(self, exchange: Exchange, now: float) -> Iterator[tuple[Request, Exchange]]:
        room_bytes = self.window_bytes - self.inflight_bytes
        while exchange.error is None:
            request = exchange.next(room_bytes)
            if request is None:
                return
            room_bytes -= request.payload_bytes
            assert room_bytes >= 0, "more on its way than was granted"
            sequence = next(self._numbers)
            number(request.message, self.number, sequence)
            exchange.inflight[sequence] = Sent(request, now)
            yield request, exchange


_FINAL = {Code.LAYOUT: LayoutMismatch, Code.STALE: StaleEpoch, Code.UNAVAILABLE: Unavailable}


def error_of(refused: Refused) -> BatonError:
    """What a refusal means to whoever started the exchange."""
    kind = _FINAL.get(Code(refused.code), CorruptKv) if refused.code in _CODES else LayoutMismatch
    return kind(refused.words)


_CODES = {int(code) for code in Code}


def code_of(error: BatonError) -> Code:
    """And back: how a store says it."""
    if isinstance(error, CorruptKv):
        return Code.CORRUPT
    return next(
        (code for code, kind in _FINAL.items() if isinstance(error, kind)), Code.UNAVAILABLE
    )
