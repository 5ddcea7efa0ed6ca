"""The ways to move KV, each with its processes: how to get ready for one sample, and how to take it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from baton.bench.kv import grpc_stream, mooncake
from baton.bench.kv.actors import Actor, cpu_seconds
from baton.bench.kv.local import Consumer, Producer
from baton.bench.kv.store import Store
from baton.bench.kv.world import MIB, World
from baton.bench.kv.zeromq import Sender
from services.prefill.handoff import Destination

MOONCAKE_BATCHES = (1, 16)  # objects in a call


@dataclass(frozen=True)
class Operation:
    """`measure` gives the seconds of one sample; `prepare` comes before and is not timed."""

    name: str
    pids: tuple[int, ...]
    prepare: Callable[[int], object]
    measure: Callable[[int], float]


@dataclass(frozen=True)
class Sample:
    """One way, one run length, one round."""

    operation: str
    run_bytes: int
    round: int
    moved_bytes: int
    seconds: float
    cpu_seconds: float

    @property
    def gb_per_s(self) -> float:
        return self.moved_bytes / self.seconds / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_seconds / (self.moved_bytes / 1e9)


def take(operation: Operation, world: World, run_bytes: int, number: int) -> Sample:
    """One sample. CPU time runs until the last process has answered."""
    operation.prepare(run_bytes)
    before = cpu_seconds(operation.pids)
    seconds = operation.measure(run_bytes)
    spent = cpu_seconds(operation.pids) - before
    return Sample(operation.name, run_bytes, number, world.total_bytes, seconds, spent)


def local(stack: ExitStack, world: World, model: Path, root: Path) -> list[Operation]:
    """memcpy and checksums in one process, shared memory between two."""
    name = f"shm-{world.page_bytes}"
    store = stack.enter_context(Store(world, model, root, name))
    announce = f"ipc://{root}/{name}.announce"
    consumer = stack.enter_context(Actor(Consumer, store.arena_dir, world, announce))
    producer = stack.enter_context(Actor(Producer, store.arena_dir, world, announce))
    everybody = (producer.pid, consumer.pid, store.pid)

    def prepare(_: int) -> None:
        opened = store.open()
        for actor in (producer, consumer):
            actor.call("prepare", opened.slot, opened.attempt)

    def write(run_bytes: int, checksums: bool) -> float:
        consumer.start("follow", checksums)
        begun = producer.call("write", run_bytes, checksums)
        return float(consumer.answer() - begun)

    def alone(method: str) -> Callable[[int], float]:
        return lambda run_bytes: float(producer.call(method, run_bytes))

    prepare(0)
    producer.call("stamp", world.group_bytes)
    one = (producer.pid,)
    return [
        Operation("memcpy", one, lambda _: None, alone("memcpy")),
        Operation("stamp", one, lambda _: None, alone("stamp")),
        Operation("verify", one, lambda _: None, alone("verify")),
        Operation("memcpy + checksums", one, prepare, alone("memcpy_and_checksums")),
        Operation("shm", everybody, prepare, lambda run: write(run, False)),
        Operation("shm + checksums", everybody, prepare, lambda run: write(run, True)),
        Operation(
            "shm read in place", (consumer.pid,), lambda _: None,
            lambda run: float(consumer.call("verify", run)),
        ),
    ]  # fmt: skip


def zeromq(
    stack: ExitStack, world: World, model: Path, root: Path, transport: str, keys_dir: str = ""
) -> list[Operation]:
    """Two stores and a sender; `transport` is ipc or tcp, with CURVE if there are keys."""
    kind = f"{transport} curve" if keys_dir else transport
    name = f"{kind.replace(' ', '-')}-{world.page_bytes}"
    listen = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{root}/{name}.ingest"
    source = stack.enter_context(Store(world, model, root, f"{name}-a", keys_dir=keys_dir))
    target = stack.enter_context(
        Store(world, model, root, f"{name}-b", ingest_listen=listen, keys_dir=keys_dir)
    )
    sender = stack.enter_context(Actor(Sender, source.arena_dir, world, keys_dir))
    where = {}

    def prepare(_: int) -> None:
        opened, where["target"] = source.open(), target.open()
        sender.call("prepare", opened.slot, opened.attempt)

    def move(run_bytes: int, fetched_from: str) -> float:
        opened = where["target"]
        to = Destination(target.ingest, opened.slot, opened.attempt, fetched_from)
        return float(sender.call("move", run_bytes, to))

    prepare(0)
    sender.call("fill")
    pids = (sender.pid, source.pid, target.pid)
    return [
        Operation(f"zmq {kind} put", pids, prepare, lambda run: move(run, "")),
        Operation(f"zmq {kind} get", pids, prepare, lambda run: move(run, source.ingest)),
    ]


def grpc(stack: ExitStack, world: World, totals: dict[int, int]) -> list[Operation]:
    """Client and server, once with threads and once with asyncio."""
    made = []
    pairs = {
        "sync": (grpc_stream.SyncServer, grpc_stream.SyncClient),
        "aio": (grpc_stream.AioServer, grpc_stream.AioClient),
    }
    for kind, (make_server, make_client) in pairs.items():
        server = stack.enter_context(Actor(make_server, world))
        client = stack.enter_context(Actor(make_client, world, server.call("address")))

        def prepare(run: int, actors: tuple[Actor, ...] = (server, client)) -> None:
            for actor in actors:
                actor.call("cut", run, totals[run])

        for method in ("put", "get"):

            def measure(run: int, client: Actor = client, method: str = method) -> float:
                return float(client.call(method, totals[run]))

            pids = (server.pid, client.pid)
            made.append(Operation(f"grpc {kind} {method}", pids, prepare, measure))
    return made


def mooncake_store(
    stack: ExitStack, world: World, root: Path, totals: dict[int, int]
) -> list[Operation]:
    """Its master, a node that holds the memory, and a client; a get follows the put of the same."""
    master = stack.enter_context(mooncake.Master(root / "mooncake.log"))
    log = str(root / "mooncake.log")
    segment = 2 * world.total_bytes + 64 * MIB
    node = stack.enter_context(Actor(mooncake.Node, master.address, segment, log))
    client = stack.enter_context(Actor(mooncake.Client, master.address, world, log))
    pids = (master.pid, node.pid, client.pid)
    made = []
    for batch in MOONCAKE_BATCHES:
        for method in ("put", "get"):

            def prepare(_: int, method: str = method) -> None:
                if method == "put":
                    client.call("prepare")

            def measure(run: int, method: str = method, batch: int = batch) -> float:
                return float(client.call(method, run, totals[run], batch))

            made.append(Operation(f"mooncake {method} x{batch}", pids, prepare, measure))
    return made
