"""Structured logs: JSON lines off a terminal, coloured lines on one. Bind `request_id` where known."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure(process: str, level: str = "info", **fields: Any) -> None:
    """Sets up logging to standard error for this process; `fields` are on every line."""
    terminal = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process, **fields)


def get(name: str) -> Any:
    return structlog.get_logger(component=name)
