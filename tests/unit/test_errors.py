"""The error tree: each class has one status and says whether to try again, and reaches the wire so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

import services.engine.errors
import services.kv.worker  # noqa: F401  every module that could add to the tree
from services.ops.errors import BatonError, Overloaded, error_tree
from services.wire.rpc import status_of, streaming, unary


@pytest.mark.parametrize("cls", error_tree(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_status_and_says_whether_to_retry(cls: type[BatonError]) -> None:
    """Declared by the class itself, a gRPC status that is not OK, and a message that comes through."""
    assert isinstance(status_of(cls("x")), grpc.StatusCode)
    assert status_of(cls("x")) is not grpc.StatusCode.OK
    assert "code" in vars(cls), "inherited by accident"
    assert isinstance(cls.retryable, bool)
    assert cls.__doc__
    assert (cls("field: why").message, str(cls("field: why"))) == ("field: why", "field: why")


def test_only_what_can_change_is_worth_a_retry() -> None:
    """Bad input stays bad; a full queue, a missing process and corrupt KV do not."""
    retryable = {cls.__name__ for cls in error_tree() if cls.retryable}
    assert retryable == {"Overloaded", "Unavailable", "CorruptKv"}


def test_the_tree_is_found_whole() -> None:
    """Each class once, the root first, and every class below it."""
    tree = error_tree()
    assert tree[0] is BatonError
    assert len(tree) == len(set(tree)) > 5
    assert all(set(cls.__subclasses__()) <= set(tree) for cls in tree)
    assert error_tree(Overloaded) == [Overloaded]


class Aborted(Exception):
    """What a real context raises."""


class Context:
    async def abort(self, status: grpc.StatusCode, message: str) -> None:
        raise Aborted(status, message)


def test_a_handlers_error_becomes_its_status() -> None:
    """Unary and streaming; other exceptions are our mistakes and stay what they are."""

    @unary
    async def answer(self: Any, request: Exception | None, context: Any) -> list[int]:
        if request:
            raise request
        return [1]

    @streaming
    async def events(self: Any, request: Exception | None, context: Any) -> AsyncIterator[int]:
        yield 1
        if request:
            raise request

    async def drain(error: Exception | None) -> list[int]:
        return [event async for event in events(None, error, Context())]

    async def ask(error: Exception | None) -> list[int]:
        return await answer(None, error, Context())

    for call in (ask, drain):
        assert asyncio.run(call(None)) == [1]
        with pytest.raises(Aborted) as caught:
            asyncio.run(call(Overloaded("arena: full")))
        assert caught.value.args == (grpc.StatusCode.RESOURCE_EXHAUSTED, "arena: full")
        with pytest.raises(KeyError):
            asyncio.run(call(KeyError("mistake")))
