"""Directories of keys, and sockets that use them wrongly, for tests of what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zmq

from baton.keys import make
from services.ops.keys import Keys, load


def keys_of(directory: Path, role: str) -> Keys:
    keys = load(str(directory), role)
    assert keys is not None
    return keys


@pytest.fixture(scope="session")
def keys_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster's keys."""
    return make(tmp_path_factory.mktemp("keys")).files.root


@pytest.fixture(scope="session")
def foreign_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another cluster's keys."""
    return make(tmp_path_factory.mktemp("foreign")).files.root


def raw(context: zmq.Context[Any], kind: int, address: str) -> zmq.Socket[Any]:
    """A socket without keys, as any stranger can make one."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.connect(address)
    return socket


def with_own_pair(
    context: zmq.Context[Any], kind: int, address: str, server: bytes
) -> zmq.Socket[Any]:
    """A socket that knows the server's public key, which is no secret, and has a pair of its own."""
    public, secret = zmq.curve_keypair()
    socket = context.socket(kind)
    socket.linger = 0
    socket.curve_serverkey, socket.curve_publickey = server, public
    socket.curve_secretkey = secret
    socket.connect(address)
    return socket
