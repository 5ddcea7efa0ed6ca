"""The simulated network leaves nothing behind, whatever happens to who has made it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.chaos import network
from baton.chaos.network import Network

_WHY_NOT = network.why_not()
pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT or "-")]

_DIES = """
import os, signal
from baton.chaos.network import Network
Network(["a", "b"]).__enter__()
print("made", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def namespaces(pid: int) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"baton-{pid}-*")]


def test_a_failure_in_between_removes_everything() -> None:
    """The namespaces and the switch end with the block."""

    def fail() -> None:
        with Network(["a", "b"]):
            assert len(namespaces(os.getpid())) == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert namespaces(os.getpid()) == []


def test_what_a_killed_run_has_left_is_removed_by_the_next() -> None:
    """Names carry their owner's pid: those of the dead go, those of the living stay."""
    killed = subprocess.Popen([sys.executable, "-c", _DIES], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    with killed.stdout:
        assert killed.stdout.read() == b"made\n"
    killed.wait()
    assert len(namespaces(killed.pid)) == 3
    with Network(["a"]), Network(["a"]):
        assert namespaces(killed.pid) == []
        assert len(namespaces(os.getpid())) == 4
    assert namespaces(os.getpid()) == []
