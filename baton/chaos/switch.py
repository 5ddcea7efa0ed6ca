"""The network between simulated hosts: an Ethernet switch in user space that delays, loses and cuts.

It runs in a network namespace of its own, where each host's virtual cable ends, and forwards frames
between packet sockets. Kernels are often built without netem; this needs none, its losses are drawn
from a seed, and it can cut one direction alone. It knows frames and cables, and no cluster.

Commands come on standard input as JSON lines, each answered by a line once it is in force; the end
of standard input ends the process.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FRAME_BYTES_MAX = 65536 + 64  # segmentation offload makes frames larger than the cable's MTU
QUEUE_FRAMES_MAX = 20_000  # in flight; more are lost, as in any switch
BURST_FRAMES = 64  # taken from one cable before the others have their turn
VNET_BYTES = 10  # checksum and segmentation state that travels in front of each frame
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_QDISC_BYPASS, _PACKET_IGNORE_OUTGOING = 263, 15, 20, 23
_ETH_P_ALL = 3

Pair = tuple[str, str]


@dataclass
class Fabric:
    """What the switch does to a frame. Pure: the caller brings time and frames, and takes frames.

    `macs` names the cable behind an address. `delay_s` and `loss` count in each direction.
    """

    cables: tuple[str, ...]
    macs: dict[bytes, str]
    seed: int = 0
    delay_s: float = 0.0
    loss: float = 0.0
    cut: frozenset[Pair] = frozenset()
    lost: int = 0
    carried: dict[Pair, int] = field(default_factory=dict)  # bytes that have arrived
    _queue: list[tuple[float, int, Pair, bytes]] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def take(self, now: float, source: str, packet: bytes) -> None:
        """A frame has come in; it is lost, or due later on one cable or, if a broadcast, on all."""
        target = self.macs.get(packet[VNET_BYTES : VNET_BYTES + 6])
        targets = [target] if target else [cable for cable in self.cables if cable != source]
        for cable in targets:
            full = len(self._queue) >= QUEUE_FRAMES_MAX
            if full or (self.loss and self._rng.random() < self.loss):
                self.lost += 1
                continue
            self._count += 1
            heapq.heappush(self._queue, (now + self.delay_s, self._count, (source, cable), packet))

    def due(self, now: float, send: Callable[[str, bytes], None]) -> float | None:
        """Sends what is due on cables that are not cut; gives the seconds to the next, if any."""
        while self._queue and self._queue[0][0] <= now:
            _, _, pair, packet = heapq.heappop(self._queue)
            if pair in self.cut:
                self.lost += 1
            else:
                send(pair[1], packet)
                self.carried[pair] = self.carried.get(pair, 0) + len(packet)
        return max(0.0, self._queue[0][0] - now) if self._queue else None

    def command(self, message: dict[str, Any]) -> dict[str, Any]:
        """`delay_ms`, `loss` (0 to 1) and `cut` (pairs of source and target) as far as given."""
        self.delay_s = message.get("delay_ms", self.delay_s * 1e3) / 1e3
        self.loss = message.get("loss", self.loss)
        if "cut" in message:
            self.cut = frozenset((source, target) for source, target in message["cut"])
        carried = [[*pair, count] for pair, count in self.carried.items()]
        return {"lost": self.lost, "in_flight": len(self._queue), "carried": carried}


def plug(cable: str) -> socket.socket:
    """A packet socket on one cable. Needs CAP_NET_RAW."""
    plugged = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    plugged.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    plugged.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    plugged.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        plugged.setsockopt(socket.SOL_SOCKET, option, 8 << 20)
    plugged.bind((cable, 0))
    plugged.setblocking(False)
    return plugged


class Switch:
    """The sockets and the clock around a Fabric."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._plugs = {cable: plug(cable) for cable in fabric.cables}
        self._cables = {plugged.fileno(): cable for cable, plugged in self._plugs.items()}
        self._commands = b""

    def run(self) -> None:
        poll = select.epoll()
        for fd in (0, *self._cables):
            poll.register(fd, select.EPOLLIN)
        wait_s: float | None = None
        while True:
            ready = [fd for fd, _ in poll.poll(wait_s)]
            if 0 in ready and not self._obey():
                return
            for fd in ready:
                if fd:
                    self._receive(self._cables[fd])
            wait_s = self._fabric.due(time.monotonic(), self._send)

    def _receive(self, cable: str) -> None:
        plugged = self._plugs[cable]
        for _ in range(BURST_FRAMES):
            try:
                packet = plugged.recv(FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            self._fabric.take(time.monotonic(), cable, packet)

    def _send(self, cable: str, packet: bytes) -> None:
        try:
            self._plugs[cable].send(packet)
        except OSError:  # the cable's queue is full, or its other end is gone
            self._fabric.lost += 1

    def _obey(self) -> bool:
        """Carries out the commands that have come; False at their end."""
        data = os.read(0, 65536)
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            print(json.dumps(self._fabric.command(json.loads(line))), flush=True)
        return bool(data)


def main() -> int:
    """`python -m baton.chaos.switch '{"cables": {name: mac}, "seed": n}'`."""
    setup = json.loads(sys.argv[1])
    macs = {bytes.fromhex(mac.replace(":", "")): name for name, mac in setup["cables"].items()}
    switch = Switch(Fabric(tuple(setup["cables"]), macs, setup["seed"]))
    print("{}", flush=True)
    switch.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
