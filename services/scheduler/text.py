"""Token ids to text, one token at a time, with stop strings. Pure, and the same after any restart:
the text of a stream depends on its token ids alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Piece = Callable[[int], str]  # what the next token adds to the text; stateful


@dataclass
class TextStream:
    """Gives each token's share of the text; holds back what may turn out to be a stop string."""

    piece: Piece
    stops: Sequence[str]
    _held: str = field(default="", init=False)
    stopped: bool = field(default=False, init=False)

    def push(self, token_id: int, last: bool) -> str:
        """The text to show for this token. `stopped` is set when a stop string has been completed;
        neither it nor anything after it is shown. With `last`, nothing is held back."""
        assert not self.stopped
        self._held += self.piece(token_id)
        cut = min((at for stop in self.stops if (at := self._held.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            shown, self._held = self._held[:cut], ""
            return shown
        keep = 0 if last else self._overlap()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def _overlap(self) -> int:
        """The longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
