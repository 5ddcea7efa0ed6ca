"""Deaths at every point: a call that ends, as if the process were gone, before its n-th line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

Trace = Callable[[FrameType, str, Any], Any]


class Died(BaseException):
    """Not an Exception, so that no handler in the code under test takes it."""


def die_before(line: int, files: tuple[str, ...], call: Callable[[], object]) -> bool:
    """Runs `call` and ends it before the `line`-th line (from 0) that it executes in one of `files`,
    given by the ends of their paths. True when it died; False when it came to its end."""
    left = line

    def on_line(frame: FrameType, event: str, argument: Any) -> Trace:
        nonlocal left
        if event == "line":
            if left == 0:
                raise Died
            left -= 1
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Trace | None:
        return on_line if frame.f_code.co_filename.endswith(files) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        call()
    except Died:
        return True
    finally:
        sys.settrace(before)
    return False
