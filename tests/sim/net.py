"""The network: every pair of processes has its own delays; links break, messages are lost with them,
and pairs are cut off from each other for a while.

Within one connection the order is kept, as TCP keeps it; between two nothing is promised. What breaks
a connection takes with it all that is under way, and each end finds out in its own time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.sim.hub import Hub, Process

Take = Callable[[Any], None]
CALL_S = 5.0  # the deadline of a call


@dataclass(eq=False)
class End:
    """One end of a connection: what it does with a message, and with the end of it."""

    process: Process
    take: Take
    closed: Callable[[], None]
    life: int = 0
    open: bool = True
    at: float = 0.0  # when the last message towards here arrives

    def __post_init__(self) -> None:
        self.life = self.process.life


@dataclass(eq=False)
class Link:
    """A connection. `send` from an end of it; `cut` breaks it."""

    net: Net
    ends: tuple[End, End]
    whole: bool = True

    def send(self, sender: End, message: Any) -> None:
        """To the other end, in order; lost when the link is, or breaks on the way."""
        other = self.ends[sender is self.ends[0]]
        if not self.whole or not sender.open:
            return
        if self.net.parted(sender.process, other.process):
            self.cut()
            return
        other.at = max(self.net.hub.now + self.net.delay(), other.at)
        self.net.hub.at(other.at, lambda: self._arrives(other, message), other.process)

    def _arrives(self, end: End, message: Any) -> None:
        if not self.whole or not end.open or end.life != end.process.life:
            return
        if self.net.parted(self.ends[0].process, self.ends[1].process):
            self.cut()
            return
        end.take(message)

    def cut(self, notice_s: float | None = None) -> None:
        """Both ends find out, each in its own time."""
        if not self.whole:
            return
        self.whole = False
        self.net.links.remove(self)
        for end in self.ends:
            late = self.net.notice() if notice_s is None else notice_s
            self.net.hub.after(late, lambda end=end: self._closes(end), end.process)

    def close(self, end: End) -> None:
        """This end has had enough; the other one is told by the network."""
        end.open = False
        self.cut(self.net.delay())

    def _closes(self, end: End) -> None:
        if end.open and end.life == end.process.life:
            end.open = False
            end.closed()


@dataclass
class Net:
    """All links; who cannot reach whom; how bad it is."""

    hub: Hub
    links: list[Link] = field(default_factory=list)
    apart: set[frozenset[str]] = field(default_factory=set)
    loss: float = 0.0  # share of calls and pushed messages that are lost
    slow: float = 0.0  # share of messages that take long

    def delay(self) -> float:
        rng = self.hub.rng
        if self.slow and rng.random() < self.slow:
            self.hub.counts["delayed"] += 1
            return rng.uniform(0.01, 0.4)
        return rng.uniform(0.0003, 0.003)

    def notice(self) -> float:
        """Until an end sees that its connection is gone: at once, or when a timeout has passed."""
        rng = self.hub.rng
        return rng.choice([0.001, 0.005, 0.05, 0.5, 1.0]) * rng.uniform(0.5, 1.5)

    def parted(self, one: Process, other: Process) -> bool:
        return bool(self.apart) and frozenset((one.name, other.name)) in self.apart

    def lost(self) -> bool:
        gone = bool(self.loss) and self.hub.rng.random() < self.loss
        self.hub.counts["dropped"] += gone
        return gone

    def connect(
        self, one: Process, other: Process, accept: Callable[[Link], End], take: Take,
        closed: Callable[[], None],
    ) -> tuple[Link, End]:  # fmt: skip
        """A connection from `one`; `accept` is asked, in `other`, for its end of it. One that cannot be
        made is closed before anything has come."""
        mine = End(one, take, closed)
        link = Link(self, (mine, End(other, lambda _: None, lambda: None)))
        self.links.append(link)
        if not other.alive or self.parted(one, other):
            link.cut(self.delay())
            return link, mine

        def arrives() -> None:
            if link.whole:
                end = accept(link)
                end.at = link.ends[1].at
                link.ends = (mine, end)

        link.ends[1].at = self.hub.now + self.delay()
        self.hub.at(link.ends[1].at, arrives, other)
        link.ends[1].take = lambda message: link.ends[1].take(message)
        return link, mine

    def gone(self, process: Process) -> None:
        """The kernel closes what a dead process had open."""
        for link in [x for x in self.links if any(e.process is process for e in x.ends)]:
            other = next(e.process for e in link.ends if e.process is not process)
            link.cut(None if self.parted(process, other) else self.delay())

    def part(self, one: str, other: str) -> None:
        self.apart.add(frozenset((one, other)))

    def heal(self, one: str, other: str) -> None:
        self.apart.discard(frozenset((one, other)))

    def call(
        self, one: Process, other: Process, serve: Callable[[], Any],
        replied: Callable[[Any, str, str], None],
    ) -> None:  # fmt: skip
        """A unary call: `serve` runs in `other` and gives (reply, code, message). Lost on the way
        there or back, or without an answer in time, it is UNAVAILABLE or DEADLINE_EXCEEDED."""
        state, mine = {"open": True}, one.life

        def finish(reply: Any, code: str, message: str) -> None:
            if state["open"] and one.life == mine:
                state["open"] = False
                replied(reply, code, message)

        def fail(seconds: float, code: str) -> None:
            self.hub.after(seconds, lambda: finish(None, code, "no answer"), one)

        def arrives() -> None:
            answer = serve()
            if self.lost() or self.parted(one, other):
                self.hub.counts["answer lost"] += 1
                fail(self.delay(), "UNAVAILABLE")
                return
            self.hub.after(self.delay(), lambda: finish(*answer), one)

        if not other.alive or self.parted(one, other) or self.lost():
            fail(self.delay(), "UNAVAILABLE")
            return
        self.hub.after(self.delay(), arrives, other)
        life = other.life
        self._watch(one, other, life, state, fail)
        fail(CALL_S, "DEADLINE_EXCEEDED")

    def _watch(
        self, one: Process, other: Process, life: int, state: dict[str, bool],
        fail: Callable[[float, str], None],
    ) -> None:  # fmt: skip
        """A call to a process that dies meanwhile fails when its connection does."""

        def look() -> None:
            if not state["open"]:
                return
            if other.life != life:
                fail(0.0, "UNAVAILABLE")
            else:
                self.hub.after(0.05, look, one)

        self.hub.after(0.05, look, one)
