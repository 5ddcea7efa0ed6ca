"""The error tree: every class that can reach a caller, with its gRPC status and whether to retry.

Mapped to the wire once, in `services/wire/rpc.py`. Bad input, peers and hardware raise these; our own
mistakes are assertions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class BatonError(Exception):
    """Anything Baton tells its caller about. `message` is for people and names the field at fault."""

    code: ClassVar[str] = "INTERNAL"  # the gRPC status name
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(BatonError):
    """A field of the request is malformed, out of range or contradicts another."""

    code = "INVALID_ARGUMENT"


class UnknownRequest(BatonError):
    """No such request id, or its `retain_ms` has passed."""

    code = "NOT_FOUND"


class RequestConflict(BatonError):
    """The request id is in use with another body."""

    code = "ALREADY_EXISTS"


class Overloaded(BatonError):
    """The queue or the arena is full."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True


class NeverFits(BatonError):
    """More pages than there will ever be room for, however long one waits."""

    code = "OUT_OF_RANGE"


class Unavailable(BatonError):
    """A process this needs is not there now."""

    code = "UNAVAILABLE"
    retryable = True


class StaleEpoch(BatonError):
    """A later epoch owns this stream: the caller has been fenced."""

    code = "FAILED_PRECONDITION"


class CorruptKv(BatonError):
    """KV failed verification: it never produces a token.

    `blocks`: the sequence's blocks at fault. `resume_at`: tokens from there on may have been computed
    from them. `irreparable`: computing them again did not give the bytes that were stored.
    """

    code = "DATA_LOSS"
    retryable = True

    def __init__(
        self, message: str, blocks: Sequence[int] = (), resume_at: int | None = None,
        irreparable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.blocks, self.resume_at, self.irreparable = sorted(blocks), resume_at, irreparable


class Unauthenticated(BatonError):
    """The caller's certificate does not say who it is."""

    code = "UNAUTHENTICATED"


class Forbidden(BatonError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"


class LayoutMismatch(BatonError):
    """A peer or an arena has another layout, model or codec."""

    code = "FAILED_PRECONDITION"


class ConfigError(BatonError):
    """A configuration value is unusable; the process does not start."""

    code = "INVALID_ARGUMENT"


def error_tree(root: type[BatonError] = BatonError) -> list[type[BatonError]]:
    """Every class of the tree, the root included."""
    return [root, *(sub for child in root.__subclasses__() for sub in error_tree(child))]
