"""`baton chaos` that is told to stop, or killed: no mount, file in shared memory or process stays."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.chaos import leftovers, network
from baton.chaos.command import INTERRUPTED
from baton.cluster import ClusterSpec
from baton.handle import read_state, wait_until

pytestmark = pytest.mark.processes


def _in_the_background() -> None:
    """As a shell without job control starts what a `&` follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Command:
    """`baton chaos all --row disk-full`, whose cluster is up and whose disk is mounted."""

    def __init__(self, log: Path) -> None:
        argv = ("all", "--row=disk-full", "--seeds=20", "--seed=1", "--no-controls")
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "baton.chaos", *argv], stderr=errors, process_group=0,
                preexec_fn=_in_the_background,
            )  # fmt: skip
        found: list[str] = []

        def working() -> bool:
            found[:] = re.findall(r"working in (\S+)", log.read_text())
            return bool(found) and read_state(f"{found[0]}/1") is not None

        wait_until(working, 60, "the cluster")
        self.root = Path(found[0])
        state = read_state(self.root / "1")
        assert state is not None
        self.supervisor = int(state["pid"])
        self.arena = Path(ClusterSpec(run_dir=f"{self.root}/1").arena_dir(0))
        wait_until(lambda: (self.arena / "locks").exists(), 60, "the arena")

    def left(self) -> list[Path]:
        """Of mounts and shared memory."""
        arena = [self.arena] if self.arena.exists() else []
        return [*leftovers.mounts(self.root), *arena]


@pytest.fixture
def command() -> Iterator[Command]:
    with tempfile.NamedTemporaryFile(prefix="bt-", dir="/tmp") as log:
        command = Command(Path(log.name))
        try:
            yield command
        finally:
            command.process.kill()
            command.process.wait()
            wait_until(lambda: not Path(f"/proc/{command.supervisor}").exists(), 40, "its end")
            leftovers.remove()
            shutil.rmtree(command.root, ignore_errors=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_that_is_told_to_stop_leaves_nothing(command: Command, number: signal.Signals) -> None:
    """Whatever it was doing."""
    mounted = os.geteuid() == 0 and not network.why_not()
    assert bool(leftovers.mounts(command.root)) >= mounted
    command.process.send_signal(number)
    assert command.process.wait(60) == INTERRUPTED
    assert command.left() == []
    assert not Path(f"/proc/{command.supervisor}").exists()


def test_what_a_killed_one_leaves_is_removed_by_the_next(command: Command) -> None:
    """Once its supervisor has ended, too."""
    command.process.kill()
    command.process.wait()
    wait_until(lambda: not Path(f"/proc/{command.supervisor}").exists(), 40, "its supervisor's end")
    left = leftovers.mounts(command.root)
    if os.geteuid() == 0 and not network.why_not():
        assert left == [command.root / "1" / "disk"]
    assert command.root in leftovers.remove()
    assert command.left() == []
    assert not command.root.exists()
