"""How far packing has come: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.ops import log

LINES = 5  # in a log, spread evenly

_logger = log.get("weights")


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more of `total` weights are done."""
    if not sys.stderr.isatty():
        yield _lines(total)
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="packing weights", unit="", unit_scale=True) as bar:
        yield lambda count: bar.update(count) and None


def _lines(total: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if before * LINES // total != done * LINES // total:
            _logger.info("packing weights", percent=round(100 * done / total))

    return advance
