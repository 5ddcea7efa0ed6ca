"""Structured logs: JSON lines off a terminal, coloured lines on one. Bind `request_id` where known.

structlog is imported at the first word: that takes a fifth of a start, and most processes have none to
say before they are ready.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

_set_up: Callable[[], None] | None = None  # what `configure` has left for the first word


def configure(process: str, level: str = "info", **fields: Any) -> None:
    """Sets up logging to standard error for this process; `fields` are on every line."""
    global _set_up
    _set_up = partial(_configure, level, {"process": process, **fields})


def get(name: str) -> Any:
    """The logger of one component."""
    return _Logger(name)


class _Logger:
    """structlog's, made anew for each word, so that it may come before `configure`."""

    def __init__(self, component: str) -> None:
        self._component = component

    def __getattr__(self, method: str) -> Any:
        global _set_up
        import structlog

        if (set_up := _set_up) is not None:
            set_up()
            _set_up = None
        return getattr(structlog.get_logger(component=self._component), method)


def _configure(level: str, fields: dict[str, Any]) -> None:
    import logging

    import structlog

    def stamp(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        line.update(fields)
        return line

    terminal = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            stamp,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
