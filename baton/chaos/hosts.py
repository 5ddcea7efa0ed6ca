"""One cluster over several hosts of a simulated network: started, broken, healed and removed as one.

    with start_hosts(spec, TWO_HOSTS) as cluster:
        cluster.network.partition("a", "b")

To whoever breaks it, it is a handle like that of a cluster on one machine: processes by name, which
ends in `@` and the host. Memory is this machine's; hosts share none of it unless the plan says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.chaos.network import Network
from baton.cluster import CONTROL_PORT, STORE_PORT, ClusterSpec
from baton.handle import START_S_MAX, StartFailed, SupervisorHandle

CLIENT_PORT = 50051


@dataclass(frozen=True)
class HostPlan:
    """What one host runs; nothing, for clients. `arena_of` names the host whose memory it shares: a
    container beside another on one machine, with a network of its own."""

    name: str
    roles: tuple[str, ...] = ()
    prefill: int = 1
    decode: int = 1
    arena_of: str = ""


# Prefill and decode apart, and the scheduler on a third, so that each of the three links can be cut.
TWO_HOSTS = (
    HostPlan("s", ("scheduler",)),
    HostPlan("a", ("kv-store", "prefill")),
    HostPlan("b", ("kv-store", "decode"), decode=2),
)
# Each decode has a network of its own beside host b's store, so that it can be cut off alone.
APART = (
    HostPlan("s", ("scheduler",)),
    HostPlan("a", ("kv-store", "prefill")),
    HostPlan("b", ("kv-store",)),
    HostPlan("b1", ("decode",), decode=1, arena_of="b"),
    HostPlan("b2", ("decode",), decode=1, arena_of="b"),
)
# Of prefill and of decode, either host may be lost.
SPARE = (
    HostPlan("s", ("scheduler",)),
    HostPlan("a", ("kv-store", "prefill")),
    HostPlan("b", ("kv-store", "prefill")),
    HostPlan("c", ("kv-store", "decode"), decode=1),
    HostPlan("d", ("kv-store", "decode"), decode=1),
)


def host_specs(
    spec: ClusterSpec, plan: Sequence[HostPlan], network: Network, public: bool
) -> list[ClusterSpec]:
    """Each host's part of the cluster that `spec` describes. Clients find the scheduler at a socket
    below its run directory, from any network, or if `public` at its host's address."""
    [scheduler] = [host.name for host in plan if "scheduler" in host.roles]
    stores = [host.name for host in plan if "kv-store" in host.roles and host.name != scheduler]

    def at(host: str, port: int) -> str:
        return f"{network.address(host)}:{spec.port_base + port}"

    def part(host: HostPlan) -> ClusterSpec:
        here = host.name == scheduler
        run_dir = f"{spec.run_dir}/{host.name}"
        listen = f"{network.address(scheduler)}:{CLIENT_PORT}" if public else ""
        return dataclasses.replace(
            spec,
            run_dir=run_dir,
            roles=host.roles,
            host=host.name,
            prefill=host.prefill,
            decode=host.decode,
            medium="shm",
            listen=(listen or f"unix:{run_dir}/clients.sock") if here else spec.listen,
            advertise=network.address(host.name),
            scheduler="" if here else at(scheduler, CONTROL_PORT),
            remote_stores=tuple(at(store, STORE_PORT) for store in stores) if here else (),
            arena=specs[host.arena_of].arena_dir(0) if host.arena_of else "",
        )

    specs: dict[str, ClusterSpec] = {}
    for host in plan:
        if host.roles:
            specs[host.name] = part(host)
    return list(specs.values())


class HostsHandle(SupervisorHandle):
    """All hosts' processes behind one handle, and the network between them."""

    def __init__(
        self, spec: ClusterSpec, network: Network, hosts: dict[str, SupervisorHandle]
    ) -> None:
        self.spec, self.network, self.hosts = spec, network, hosts
        self._parts = {name: handle.spec for name, handle in hosts.items()}
        self.address = next(h.spec.listen for h in hosts.values() if "scheduler" in h.spec.roles)

    def state(self) -> dict[str, Any]:
        """The hosts' states as one: `processes` are everybody's. Raises StartFailed."""
        states = [host.state() for host in self.hosts.values()]
        return {
            "ready": all(state["ready"] for state in states),
            "address": self.address,
            "processes": [entry for state in states for entry in state["processes"]],
        }

    def host_of(self, process: str) -> str:
        """A process's name ends in its host's."""
        return process.rpartition("@")[2]

    def hosts_of(self, role: str) -> list[str]:
        """Those that are there and run this role."""
        return [name for name, host in self.hosts.items() if role in host.spec.roles]

    def arena_dirs(self) -> list[str]:
        """Of every host that has a store, lost ones included, decode's last."""
        stores = [part for part in self._parts.values() if "kv-store" in part.roles]
        prefills_first = sorted(stores, key=lambda part: "prefill" not in part.roles)
        return [part.arena_dir(0) for part in prefills_first]

    def cut(self, ones: Sequence[str], others: Sequence[str]) -> None:
        """Nothing passes between any of these hosts and any of those, until `network.heal()`."""
        for one in ones:
            for other in others:
                self.network.partition(one, other)

    def lose(self, host: str) -> None:
        """A machine loses its power: it falls silent, everything on it dies at once, and what was in
        its memory is gone. Its disk stays."""
        self.network.isolate(host)
        lost = self.hosts.pop(host)
        processes = [entry["pid"] for entry in lost.state()["processes"] if entry["pid"]]
        # The supervisor first: it would start the others again.
        for pid in (lost.process.pid, *processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        lost.stop()
        if "kv-store" in lost.spec.roles:
            shutil.rmtree(lost.spec.arena_dir(0), ignore_errors=True)

    def regain(self, host: str) -> None:
        """A lost host is switched on again; `state()` tells when it is ready."""
        part = self._parts[host]
        self.hosts[host] = SupervisorHandle.launch(part, prefix=self.network.command(host))

    def stop(self) -> int:
        """Ends every host and the network; 0 when all ended well. Safe to call twice."""
        statuses = [host.stop() for host in self.hosts.values()]
        self.network.close()
        return max(map(abs, statuses), default=0)


def start_hosts(
    spec: ClusterSpec,
    plan: Sequence[HostPlan] = TWO_HOSTS,
    *,
    seed: int = 0,
    public: bool = False,
    deadline_s: float = START_S_MAX,
) -> HostsHandle:
    """Starts every host of `plan` and waits until all are ready. Raises StartFailed, or Unavailable
    where namespaces cannot be made."""
    network = Network([host.name for host in plan], seed)
    hosts: dict[str, SupervisorHandle] = {}
    with network.kept():
        try:
            for part in host_specs(spec, plan, network, public):
                Path(part.run_dir).mkdir(parents=True, exist_ok=True)
                hosts[part.host] = SupervisorHandle.launch(part, prefix=network.command(part.host))
            for handle in hosts.values():
                handle.await_ready(deadline_s)
        except BaseException:
            for handle in hosts.values():
                handle.stop()
            raise
    return HostsHandle(spec, network, hosts)


__all__ = [
    "APART", "SPARE", "TWO_HOSTS", "HostPlan", "HostsHandle", "StartFailed", "host_specs",
    "start_hosts",
]  # fmt: skip
