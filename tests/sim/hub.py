"""Virtual time, and the processes that live in it.

One heap of events; the seed decides everything else. A process that is paused lets its events wait, as
SIGSTOP does; one that has died drops them. Engine threads are greenlets: they run until they compute,
wait or sleep, and may be killed or paused right there.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet

Act = Callable[[], object]
UNIX_S = 1_800_000_000


class Violation(AssertionError):
    """What must never happen has happened."""


@dataclass
class Hub:
    """The clock, the seed and the story."""

    seed: int
    verbose: bool = False
    now: float = 0.0
    skew: float = 0.0  # of the wall clock
    counts: Counter[str] = field(default_factory=Counter)
    story: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    checks: list[Callable[[Process | None], None]] = field(default_factory=list)
    _heap: list[tuple[float, int, Process | None, int, Act]] = field(default_factory=list)
    _number: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    @property
    def unix_s(self) -> float:
        return UNIX_S + self.now + self.skew

    def after(self, seconds: float, act: Act, process: Process | None = None) -> None:
        """`act` happens in `process` after this time, unless it has died by then."""
        self.at(self.now + seconds, act, process)

    def at(self, when: float, act: Act, process: Process | None = None) -> None:
        """What is to happen at the same time happens in the order in which it was asked for."""
        if process and not process.alive:
            return
        self._number += 1
        life = process.life if process else 0
        heapq.heappush(self._heap, (when, self._number, process, life, act))

    def run(self, until: float) -> None:
        """Lets everything happen that is due until then."""
        while self._heap and self._heap[0][0] <= until:
            at, _, process, life, act = heapq.heappop(self._heap)
            self.now = max(self.now, at)
            self.happens(process, life, act)
        self.now = until

    def happens(self, process: Process | None, life: int, act: Act) -> None:
        if process is not None and process.life != life:
            return
        if process is not None and process.paused:
            process.deferred.append((life, act))
            return
        act()
        self.counts["events"] += 1
        for check in self.checks:
            check(process)

    def tell(self, who: str, what: str) -> None:
        """A line of the story."""
        line = f"{self.now:9.4f} {who:12} {what}"
        self.story.append(line)
        if self.verbose:
            print(line)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


class Died(BaseException):
    """The process has been killed here."""


@dataclass(eq=False)
class Process:
    """Something that can be killed, started again, paused and resumed."""

    hub: Hub
    name: str
    life: int = 0  # odd while it lives; events of an earlier life are dropped
    paused: bool = False
    deferred: deque[tuple[int, Act]] = field(default_factory=deque)

    @property
    def alive(self) -> bool:
        return self.life % 2 == 1

    @property
    def runs(self) -> bool:
        return self.alive and not self.paused

    def after(self, seconds: float, act: Act) -> None:
        self.hub.after(seconds, act, self)

    def tell(self, what: str) -> None:
        self.hub.tell(self.name, what)

    def start(self) -> None:
        assert not self.alive
        self.life += 1
        self.tell("starts")
        self.begin()

    def kill(self) -> None:
        assert self.alive
        self.tell("dies")
        self.life += 1
        self.paused = False
        self.deferred.clear()
        self.ended()

    def pause(self) -> None:
        self.paused = True
        self.tell("is paused")

    def resume(self) -> None:
        """All that has come meanwhile happens now, in order."""
        self.paused = False
        self.tell("goes on")
        while self.deferred and not self.paused:
            life, act = self.deferred.popleft()
            self.hub.happens(self, life, act)

    def begin(self) -> None:
        """Its main."""

    def ended(self) -> None:
        """What the kernel does for it."""


class Thread:
    """An engine thread of a process."""

    def __init__(self, process: Process, target: Act) -> None:
        self.process, self._life = process, process.life
        self._greenlet = greenlet(target)
        self._greenlet.thread = self  # type: ignore[attr-defined]
        self._turn = 0  # a wait that has ended otherwise must not be ended again

    def go(self) -> None:
        if self.process.life == self._life:
            self._turn += 1
            self._greenlet.switch()

    def sleep(self, seconds: float) -> None:
        """Called inside: the thread goes on after this time."""
        self._wake_after(seconds)
        self._greenlet.parent.switch()

    def _wake_after(self, seconds: float) -> None:
        turn = self._turn
        self.process.after(seconds, lambda: self.go() if self._turn == turn else None)

    def wait(self, seconds: float | None) -> None:
        """Called inside: until `wake`, at most so long."""
        if seconds is not None:
            self._wake_after(seconds)
        self._greenlet.parent.switch()

    def wake(self) -> None:
        """Called outside: what it waits for is there."""
        self._wake_after(0.0)

    def drop(self) -> None:
        """The process is gone: nothing of it runs on, not even on its way out."""
        self._greenlet.throw()  # GreenletExit, which nobody catches


def current() -> Thread:
    """The thread that runs now."""
    thread: Thread = getcurrent().thread  # type: ignore[attr-defined]
    return thread


class Event:
    """What `threading.Event` is to an engine."""

    def __init__(self, thread: Thread) -> None:
        self._thread, self._set = thread, False

    def set(self) -> None:
        self._set = True
        self._thread.wake()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._set:
            self._thread.wait(timeout)
        return self._set


class Queue:
    """What `queue.SimpleQueue` is to an engine."""

    def __init__(self, thread: Thread, asked: Callable[[], None]) -> None:
        """`asked` is called each time the engine wants another item."""
        self._thread, self._asked = thread, asked
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._thread.wake()

    def get(self) -> Any:
        self._asked()
        while not self._items:
            self._thread.wait(None)
        return self._items.popleft()
