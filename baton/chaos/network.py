"""Hosts of their own on one machine: network namespaces on one switch, with faults between them.

    host a            host b            the switch's namespace
    [ eth0 ]---veth---[ a ]  [ b ]---veth---[ eth0 ]        baton/chaos/switch.py forwards a <-> b

Delay, loss and partitions are the switch's; a bandwidth cap is tc's, on each host's own interface.
Names carry the owner's pid: two runs do not meet, and what a killed run has left is removed by the
next one. It starts no cluster; `baton/chaos/hosts.py` does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from baton.closing import Closing
from services.ops.errors import Unavailable

PREFIX = "baton"
COMMAND_S = 10.0
_MTU_BYTES = 1500
_numbers = itertools.count()


def why_not() -> str:
    """Why namespaces cannot be made here, or an empty string."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "x0", "type", "veth", "peer", "name", "x1")
        _ip("netns", "delete", probe)
    except FileNotFoundError:
        return "network namespaces need iproute2"
    except Unavailable as error:
        return f"network namespaces are not permitted: {error.message}"
    return ""


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(argv)}: {done.stderr.strip()}")


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def remove_leftovers() -> None:
    """Removes the namespaces of owners that were killed before they could."""
    directory = Path("/run/netns")
    for path in directory.glob(f"{PREFIX}-*-*") if directory.exists() else ():
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(Unavailable):
                _ip("netns", "delete", path.name)


class Network(Closing):
    """Hosts by name, each with an address, and the faults between them. Use as a context manager:
    at its end every namespace and the switch are gone, whatever happened in between."""

    def __init__(self, hosts: Iterable[str], seed: int = 0) -> None:
        self.hosts = tuple(hosts)
        self._tag = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self._seed = seed
        self._made: list[str] = []
        self._switch: subprocess.Popen[bytes] | None = None
        self._cut: set[tuple[str, str]] = set()

    def namespace(self, host: str) -> str:
        return f"{self._tag}{host}"

    def address(self, host: str) -> str:
        """The host's address, known to all hosts of this network and to nobody else."""
        return f"10.0.0.{self.hosts.index(host) + 1}"

    def _mac(self, host: str) -> str:
        return f"02:00:00:00:00:{self.hosts.index(host) + 1:02x}"

    def command(self, host: str) -> tuple[str, ...]:
        """What to put before a command line so that it runs on `host`."""
        return ("ip", "netns", "exec", self.namespace(host))

    # --- making and removing ---

    def __enter__(self) -> Network:
        remove_leftovers()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Made at the start, removed at the end only if that was a failure: `close()` is to come."""
        self.__enter__()
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        for name in ("", *self.hosts):  # the switch's own namespace first
            _ip("netns", "add", self.namespace(name))
            self._made.append(self.namespace(name))
        for host in self.hosts:
            self._connect(host)
        setup = {"cables": {host: self._mac(host) for host in self.hosts}, "seed": self._seed}
        self._switch = subprocess.Popen(
            [*self.command(""), sys.executable, "-m", "baton.chaos.switch", json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # what a terminal's Ctrl-C says is not for it
        )
        self._answer()

    def _connect(self, host: str) -> None:
        here, switch = self.namespace(host), self.namespace("")
        _ip("-n", switch, "link", "add", "name", host, "mtu", str(_MTU_BYTES),
            "type", "veth", "peer", "name", "eth0", "netns", here)  # fmt: skip
        _ip("-n", switch, "link", "set", "dev", host, "up")
        # One segment a frame, so that losses are those of a real cable.
        _ip("-n", here, "link", "set", "dev", "eth0", "address", self._mac(host),
            "gso_max_segs", "1")  # fmt: skip
        _ip("-n", here, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", here, "link", "set", "eth0", "up")
        _ip("-n", here, "link", "set", "lo", "up")
        for other in self.hosts:  # known for good: a partition is silence, not "no route to host"
            if other != host:
                _ip("-n", here, "neighbour", "add", self.address(other), "lladdr",
                    self._mac(other), "dev", "eth0", "nud", "permanent")  # fmt: skip

    def close(self) -> None:
        """Removes everything; safe to call twice."""
        if self._switch is not None:
            assert self._switch.stdin is not None
            assert self._switch.stdout is not None
            self._switch.stdin.close()
            try:
                self._switch.wait(COMMAND_S)
            except subprocess.TimeoutExpired:
                self._switch.kill()
                self._switch.wait()
            self._switch.stdout.close()
            self._switch = None
        for name in self._made:
            with contextlib.suppress(Unavailable):
                _ip("netns", "delete", name)
        self._made.clear()

    # --- faults ---

    def impair(self, *, delay_ms: float = 0.0, loss: float = 0.0) -> None:
        """Each frame takes `delay_ms` more, and `loss` (0 to 1) of them never arrive."""
        self._tell(delay_ms=delay_ms, loss=loss)

    def limit(self, mbit_per_s: float | None) -> None:
        """Caps what each host can send, with tc's token bucket; None lifts it."""
        for host in self.hosts:
            qdisc = ("tc", "-n", self.namespace(host), "qdisc")
            if mbit_per_s is None:
                _run(*qdisc, "replace", "dev", "eth0", "root", "noqueue")
            else:
                _run(*qdisc, "replace", "dev", "eth0", "root", "tbf", "rate", f"{mbit_per_s}mbit",
                     "burst", "64kb", "latency", "400ms")  # fmt: skip

    def partition(self, one: str, other: str) -> None:
        """Nothing passes between two hosts any more, in silence: their sockets stay open."""
        self._cut |= {(one, other), (other, one)}
        self._tell(cut=sorted(self._cut))

    def isolate(self, host: str) -> None:
        """Nothing passes between this host and any other."""
        for other in self.hosts:
            if other != host:
                self._cut |= {(host, other), (other, host)}
        self._tell(cut=sorted(self._cut))

    def heal(self) -> None:
        """Ends all partitions."""
        self._cut.clear()
        self._tell(cut=[])

    def lost(self) -> int:
        """Frames that the switch has dropped until now."""
        return int(self._tell()["lost"])

    def carried(self, source: str, target: str) -> int:
        """Bytes that have arrived at `target` from `source` until now."""
        counts = self._tell()["carried"]
        return sum(count for one, other, count in counts if (one, other) == (source, target))

    def _tell(self, **message: Any) -> dict[str, Any]:
        assert self._switch is not None, "the network is not up"
        assert self._switch.stdin is not None
        self._switch.stdin.write(json.dumps(message).encode() + b"\n")
        self._switch.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._switch is not None
        assert self._switch.stdout is not None
        line = self._switch.stdout.readline()
        if not line:
            raise Unavailable("the switch has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer
