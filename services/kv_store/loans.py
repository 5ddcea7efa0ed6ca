"""Cached blocks lent to other stores while those copy them. A loan is a lease like any other, so
eviction leaves its blocks alone; it ends by itself when its borrower falls silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.wire.session import Tracker

LOAN_S = 5.0  # without a word of the borrower
LOANS_MAX = 64
BLOCKS_MAX = 4096  # of one loan


@dataclass
class _Loan:
    blocks: list[int]
    until: float
    sending: list[Tracker] = field(default_factory=list)  # frames that lie in these blocks

    @property
    def being_read(self) -> bool:
        self.sending = [tracker for tracker in self.sending if not tracker.done]
        return bool(self.sending)


@dataclass
class Loans:
    """What is out, by number. `give_back` is called once for each block that was lent."""

    give_back: Callable[[int], None]
    out: dict[int, _Loan] = field(default_factory=dict)
    _ending: list[_Loan] = field(default_factory=list)
    _last: int = 0

    @property
    def idle(self) -> bool:
        """Nothing is out, and nothing that came back is still being read."""
        return not self.out and not self._ending

    def lend(self, blocks: Sequence[int], now: float) -> int:
        """The number of a loan of blocks that the caller holds; 0 when nothing is lent."""
        if not blocks or len(self.out) + len(self._ending) >= LOANS_MAX:
            for block in blocks:
                self.give_back(block)
            return 0
        self._last += 1
        self.out[self._last] = _Loan(list(blocks), now + LOAN_S)
        return self._last

    def use(self, number: int, now: float) -> Sequence[int]:
        """The blocks of a loan, which is renewed; none when it has ended."""
        loan = self.out.get(number)
        if loan is None:
            return ()
        loan.until = now + LOAN_S
        return loan.blocks

    def sending(self, number: int, tracker: Tracker | None) -> None:
        """A message with frames out of these blocks is on its way."""
        if tracker is not None:
            self.out[number].sending.append(tracker)

    def end(self, number: int) -> None:
        """The borrower has what it wanted, or will never have it. Twice does no harm."""
        loan = self.out.pop(number, None)
        if loan is not None:
            self._ending.append(loan)
            self._sweep()

    def tick(self, now: float) -> None:
        """Ends what nobody has asked for in a long time."""
        for number in [number for number, loan in self.out.items() if loan.until <= now]:
            self.end(number)
        self._sweep()

    def _sweep(self) -> None:
        """A block goes back when its borrower has let go of it and nothing reads it any more."""
        over = [loan for loan in self._ending if not loan.being_read]
        self._ending = [loan for loan in self._ending if loan not in over]
        for loan in over:
            for block in loan.blocks:
                self.give_back(block)
