"""The clusters that crashes are performed on, by name. Data only; `session` starts them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from baton.chaos.hosts import APART, SPARE, TWO_HOSTS, HostPlan
from baton.cluster import ClusterSpec

SMALL_ARENA_BYTES = 8 << 20
DISK_ARENA_BYTES = 16 << 20
DISK_BYTES = (
    128 << 20
)  # less than the disk that is made full, so that the tier alone never fills it
# The disk may be slow and the machine busy: a hit that came too late would look like a file noticed.
WRITE_BACK = ("kv-store:--write-back-ms=0", "kv-store:--prefetch-ms=10000")
SHORT_LEASE_MS = 2000
HOST_ARENA_BYTES = 64 << 20
CABLE_MBIT_PER_S = 100  # so that a transfer takes long enough to be cut
CHUNK_TOKENS = 64  # where prefill is to be struck between two chunks


@dataclass(frozen=True)
class Setup:
    """What differs from a cluster with two decodes and one prefill."""

    text: str
    decode: int = 2
    prefill: int = 1
    arena_bytes: int = 256 << 20
    medium: str = ""  # empty: the one that the command line chose
    link: bool = False  # pages go from store to store through a link that can be cut
    hosts: tuple[HostPlan, ...] = ()  # each with a network of its own; empty: this machine's
    disk: bool = False  # the stores have a tier on disk, and write back at once
    extra: tuple[str, ...] = ()

    def applied(self, spec: ClusterSpec) -> ClusterSpec:
        """`spec` with this set-up's differences."""
        return dataclasses.replace(
            spec, decode=self.decode, prefill=self.prefill, arena_bytes=self.arena_bytes,
            medium=self.medium or spec.medium, disk_dir=f"{spec.run_dir}/disk" if self.disk else "",
            disk_bytes=DISK_BYTES if self.disk else spec.disk_bytes,
            extra=(*spec.extra, *self.extra, *(WRITE_BACK if self.disk else ())),
        )  # fmt: skip


SETUPS = {
    "standard": Setup("two decodes, one prefill"),
    "one-decode": Setup("nobody can take over", decode=1),
    "patient": Setup(
        "the only decode may be held off",
        decode=1,
        extra=("scheduler:--suspect-ms=60000", "scheduler:--lost-ms=90000"),
    ),
    "short-lease": Setup(
        "what nobody renews is soon released", extra=(f"kv-store:--lease-ms={SHORT_LEASE_MS}",)
    ),
    "two-prefills": Setup(
        "another prefill can go on", prefill=2, extra=(f"prefill:--chunk-tokens={CHUNK_TOKENS}",)
    ),
    "linked": Setup("an arena each, and a link between them", medium="zmq", link=True),
    "disk": Setup(
        "an arena that soon forgets, above a disk",
        decode=1,
        arena_bytes=DISK_ARENA_BYTES,
        disk=True,
    ),
    "hosts": Setup(
        "scheduler, prefill and decodes apart", arena_bytes=HOST_ARENA_BYTES, hosts=TWO_HOSTS
    ),
    "hosts-apart": Setup(
        "each decode can be cut off alone", arena_bytes=HOST_ARENA_BYTES, hosts=APART
    ),
    "hosts-spare": Setup(
        "a host more for prefill and for decode", arena_bytes=HOST_ARENA_BYTES, hosts=SPARE
    ),
    "small-arena": Setup("less room than the requests want", arena_bytes=SMALL_ARENA_BYTES),
}
