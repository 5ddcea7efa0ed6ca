"""What runs on one machine, a whole cluster or one host's part: the command line of every process.

Pure arithmetic over names, addresses and cores; it starts nothing. `baton/supervisor.py` does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.decode.config import DecodeConfig
from services.engine.weights.names import weights_class
from services.kv_store.config import KvStoreConfig
from services.ops.config import as_arguments, option
from services.ops.errors import ConfigError
from services.prefill.config import PrefillConfig
from services.scheduler.config import SchedulerConfig

ROLES = ("kv-store", "scheduler", "prefill", "decode")  # the order of starting
# Where a host of several listens for the others, counted from `port_base`.
CONTROL_PORT, STORE_PORT, INGEST_PORT, ANNOUNCE_PORT = 2, 11, 12, 21
UNIX_PATH_BYTES_MAX = 107  # of sockaddr_un.sun_path, less the closing zero
_MODULES = {role: f"services.{role.replace('-', '_')}" for role in ROLES}


def default_run_dir(environ: Mapping[str, str] = os.environ) -> str:
    """Where a cluster of this user keeps sockets, logs and journal."""
    if chosen := environ.get("BATON_RUN_DIR"):
        return chosen
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/baton"
    return f"/tmp/baton-{os.getuid()}"


def default_model() -> str:
    """The model that ships, in this checkout or below the working directory."""
    shipped = Path(__file__).resolve().parent.parent / "models" / "pico"
    return str(shipped) if shipped.is_dir() else "models/pico"


@dataclass(frozen=True)
class ClusterSpec:
    """One machine's cluster, or, with `advertise`, its part of one over several hosts. Every field is
    an option of `baton up` and a BATON_ variable."""

    run_dir: str = option("", "sockets, logs, journal; empty: in XDG_RUNTIME_DIR or /tmp")
    model: str = option("", "Hugging Face directory; empty: the model that ships")
    decode: int = option(2, "decode workers")
    prefill: int = option(1, "prefill workers")
    spares: bool = option(True, "keep a process ready for each decode, to be back at once")
    medium: str = option("shm", "shm: one arena; zmq: prefill and decode each have their own")
    listen: str = option("127.0.0.1:50051", "public gRPC address; port 0 picks one")
    kv_dtype: str = option("auto", "f32, bf16 or auto: bf16 for bf16 weights, else f32")
    layers_per_group: int = option(2, "layers streamed as one unit, 1 to all")
    arena_bytes: int = option(256 << 20, "size of each arena")
    disk_dir: str = option("", "directory of the stores' tier on disk; empty: none")
    disk_bytes: int = option(4 << 30, "bound of each store's tier on disk")
    weights: str = option("as-is", "of native workers: as-is, bf16, int8 or int4")
    weights_cache: str = option("", "packed weights; empty: in XDG_CACHE_HOME/baton")
    prefill_device: str = option("cpu", "cpu, or a torch device: cuda, xpu, npu")
    prefill_class: str = option("", "its numerics class; empty: asked of the device at start")
    cpus: tuple[int, ...] = option((), "cores to share out, like 0-3; empty: all that are allowed")
    prefill_cores: tuple[int, ...] = option((), "empty: the first of two or more")
    decode_cores: tuple[int, ...] = option((), "of all but prefill; empty: the others")
    stream: str = option("layers", "layers: announce each layer group; whole: once, at the end")
    recover: str = option("takeover", "takeover, or reprefill: the control that recomputes")
    keys_dir: str = option("", "made by `baton keys`: TLS and CURVE everywhere; empty: plain")
    roles: tuple[str, ...] = option((), "what runs here, like kv-store,prefill; empty: everything")
    host: str = option("", "name of this host, part of its processes' names; empty: the machine's")
    advertise: str = option("", "address where other hosts find this one; empty: there are none")
    bind: str = option("", "address to listen on for other hosts; empty: the advertised one")
    port_base: int = option(50050, "ports for other hosts: +2 control, +11 store, +12, +21 on")
    scheduler: str = option("", "control address of the scheduler if another host runs it")
    remote_stores: tuple[str, ...] = option((), "addresses of the other hosts' kv-stores")
    arena: str = option("", "arena directory, if another supervisor of this host runs the kv-store")
    unsafe: tuple[str, ...] = option((), "guards to switch off, for the chaos controls only")
    failpoints: str = option("", "directory of armed failpoints; empty: none")
    log_level: str = option("info", "debug, info, warning or error")
    extra: tuple[str, ...] = option((), "more options, like prefill:--chunk-tokens=128")

    def __post_init__(self) -> None:
        run_dir = os.path.abspath(self.run_dir or default_run_dir())
        object.__setattr__(self, "run_dir", run_dir)
        object.__setattr__(self, "model", os.path.abspath(self.model or default_model()))
        if self.keys_dir:
            object.__setattr__(self, "keys_dir", os.path.abspath(self.keys_dir))
        if not self.cpus:
            object.__setattr__(self, "cpus", tuple(sorted(os.sched_getaffinity(0))))
        if self.medium not in ("shm", "zmq"):
            raise ConfigError(f"medium: {self.medium!r} is neither shm nor zmq")
        object.__setattr__(self, "roles", self.roles or ROLES)
        self._check_hosts()
        weights_class(self.weights)
        if self.weights_cache:
            object.__setattr__(self, "weights_cache", os.path.abspath(self.weights_cache))
        for name in ("decode", "prefill"):
            if name in self.roles and getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is less than 1")
        for entry in self.extra:
            if not entry.partition(":")[2].startswith("--"):
                raise ConfigError(f"extra: {entry!r} is not <role or name>:--option=value")
        for store in range(self.stores):
            self.unix(f"kv-store-{store}")
        self.unix("scheduler")

    def _check_hosts(self) -> None:
        """Raises ConfigError where what runs here does not fit what is said of other hosts."""
        for role in self.roles:
            if role not in ROLES:
                raise ConfigError(f"roles: {role!r} is none of {', '.join(ROLES)}")
        away = [role for role in ROLES if role not in self.roles]
        if away and not self.advertise:
            raise ConfigError(f"advertise: other hosts that run {', '.join(away)} need an address")
        if self.advertise and self.medium != "shm":
            raise ConfigError(f"medium: {self.medium!r}: a host among others has one arena, shm")
        if ("scheduler" in self.roles) == bool(self.scheduler):
            raise ConfigError("scheduler: either runs here or has an address elsewhere")
        if self.remote_stores and "scheduler" not in self.roles:
            raise ConfigError("remote_stores: are for the host that runs the scheduler")
        if "kv-store" not in self.roles and "scheduler" in self.roles and not self.remote_stores:
            raise ConfigError("remote_stores: the scheduler needs at least one kv-store")
        if self.arena and "kv-store" in self.roles:
            raise ConfigError("arena: is another supervisor's, so no kv-store runs here")

    @property
    def path(self) -> Path:
        return Path(self.run_dir)

    @property
    def stores(self) -> int:
        return 2 if self.medium == "zmq" else 1

    def name(self, process: str) -> str:
        """A process's name, told apart from its like on other hosts."""
        return f"{process}@{self.host}" if self.host else process

    def listen_at(self, port: int) -> str:
        """host:port to listen on for other hosts."""
        return f"{self.bind or self.advertise}:{self.port_base + port}"

    def reach_at(self, port: int) -> str:
        """host:port where other hosts find what listens there."""
        return f"{self.advertise}:{self.port_base + port}"

    @property
    def control(self) -> str:
        """Where this host's workers find the scheduler."""
        here = self.reach_at(CONTROL_PORT) if self.advertise else self.unix("scheduler")
        return self.scheduler or here

    def unix(self, name: str) -> str:
        """The gRPC address of an internal socket. Raises ConfigError when run_dir is too long."""
        socket = f"{self.run_dir}/{name}.sock"
        if len(os.fsencode(socket)) > UNIX_PATH_BYTES_MAX:
            raise ConfigError(f"run_dir: {socket} is longer than {UNIX_PATH_BYTES_MAX} bytes")
        return f"unix:{socket}"

    def arena_dir(self, store: int) -> str:
        """Named after run_dir, so that a cluster that comes back finds its arena."""
        return (
            self.arena
            or f"/dev/shm/baton-{hashlib.sha256(self.run_dir.encode()).hexdigest()[:12]}-{store}"
        )

    def cores(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prefill's cores and everybody else's; () is no pinning, as on a single core."""
        if len(self.cpus) < 2:
            return self.prefill_cores, self.decode_cores
        prefill = self.prefill_cores or self.cpus[:1]
        others = self.decode_cores or tuple(core for core in self.cpus if core not in prefill)
        return prefill, others


@dataclass(frozen=True)
class ProcessSpec:
    """One process to start. `unset`: variables that would speak where `argv` is silent. `spare`: the
    command that prepares for being the next life of this process, and waits; () keeps none."""

    name: str
    role: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unset: frozenset[str] = frozenset()
    spare: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """What `argv` has after `python -m module`."""
        return self.argv[3:]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {k: v for k, v in environ.items() if k not in self.unset} | dict(self.env)


def variables_of(config: type) -> frozenset[str]:
    """The environment variables that `services.ops.config.load` reads for a config class."""
    return frozenset(f"BATON_{field.name.upper()}" for field in dataclasses.fields(config))


def processes(spec: ClusterSpec) -> list[ProcessSpec]:
    """Every process that runs here, in the order of starting."""
    makers = {
        "kv-store": (_kv_store, spec.stores),
        "scheduler": (lambda spec, _: _scheduler(spec), 1),
        "prefill": (_prefill, spec.prefill),
        "decode": (_decode, spec.decode),
    }
    here = [makers[role] for role in ROLES if role in spec.roles]
    return [make(spec, n) for make, count in here for n in range(count)]


def _kv_store(spec: ClusterSpec, store: int) -> ProcessSpec:
    name = f"kv-store-{store}"
    ingest: dict[str, Any] = {}
    if spec.advertise:
        ingest["ingest_listen"] = f"tcp://{spec.listen_at(INGEST_PORT)}"
        ingest["ingest_advertise"] = f"tcp://{spec.reach_at(INGEST_PORT)}"
    config = KvStoreConfig(
        **_shared(spec, name),
        **ingest,
        **_devices(spec),
        arena_dir=spec.arena_dir(store),
        arena_bytes=spec.arena_bytes,
        kv_dtype=spec.kv_dtype,
        layers_per_group=spec.layers_per_group,
        disk_dir=os.path.abspath(f"{spec.disk_dir}/{name}") if spec.disk_dir else "",
        disk_bytes=spec.disk_bytes,
        listen=spec.listen_at(STORE_PORT) if spec.advertise else spec.unix(name),
        cores=spec.cores()[1],
        unsafe=spec.unsafe,
    )
    return _process(spec, "kv-store", config)


def _scheduler(spec: ClusterSpec) -> ProcessSpec:
    stores = [spec.unix(f"kv-store-{store}") for store in range(spec.stores)]
    if spec.advertise:
        stores = [spec.reach_at(STORE_PORT)]
    config = SchedulerConfig(
        **_shared(spec, "scheduler"),
        listen=spec.listen,
        control_listen=spec.listen_at(CONTROL_PORT) if spec.advertise else spec.control,
        stores=(*(stores if "kv-store" in spec.roles else ()), *spec.remote_stores),
        journal_dir=f"{spec.run_dir}/journal",
        recover=spec.recover,
        cores=spec.cores()[1],
        unsafe=spec.unsafe,
    )
    return _process(spec, "scheduler", config)


def _prefill(spec: ClusterSpec, n: int) -> ProcessSpec:
    prefill, others = spec.cores()
    config = PrefillConfig(
        **_shared(spec, f"prefill-{n}"),
        **_devices(spec),
        host=spec.host,
        scheduler=spec.control,
        arena_dir=spec.arena_dir(0),
        **_weights(spec, spec.prefill_device),
        device=spec.prefill_device,
        stream=spec.stream,
        io_core=others[0] if others else -1,
        cores=prefill,
    )
    return _process(spec, "prefill", config)


def _decode(spec: ClusterSpec, n: int) -> ProcessSpec:
    announce: dict[str, Any] = {}
    if spec.advertise:
        announce["announce_listen"] = f"tcp://{spec.listen_at(ANNOUNCE_PORT + n)}"
        announce["announce_advertise"] = f"tcp://{spec.reach_at(ANNOUNCE_PORT + n)}"
    config = DecodeConfig(
        **_shared(spec, f"decode-{n}"),
        **_devices(spec),
        **announce,
        host=spec.host,
        scheduler=spec.control,
        arena_dir=spec.arena_dir(spec.stores - 1),
        **_weights(spec, "cpu"),
        cores=spec.cores()[1],
        unsafe=spec.unsafe,
    )
    return _process(spec, "decode", config)


def _shared(spec: ClusterSpec, name: str) -> dict[str, Any]:
    return {
        "name": spec.name(name),
        "model": spec.model,
        "keys_dir": spec.keys_dir,
        "failpoints": spec.failpoints,
        "log_level": spec.log_level,
    }


def _devices(spec: ClusterSpec) -> dict[str, Any]:
    """The numerics classes, as every process is told them; only native workers take packed weights."""
    native = f"cpu/{spec.weights}" if weights_class(spec.weights) else "cpu"
    other = spec.prefill_class or spec.prefill_device
    return {
        "prefill_device": native if spec.prefill_device == "cpu" else other,
        "decode_device": native,
    }


def _weights(spec: ClusterSpec, device: str) -> dict[str, Any]:
    if device != "cpu":
        return {}
    return {"weights": spec.weights, "weights_cache": spec.weights_cache}


def _process(spec: ClusterSpec, role: str, config: Any) -> ProcessSpec:
    more = _extra_for(spec.extra, (role, config.name))
    options = (_MODULES[role], *as_arguments(config), *more)
    spare = (sys.executable, "-m", "services.ops.spare", *options)
    # Workers leave their sign of life in TMPDIR: one cluster must not see another's.
    env = {"TMPDIR": spec.run_dir, "BATON_NAME": config.name}
    unset = variables_of(type(config)) - env.keys()
    keeps = role == "decode" and spec.spares
    argv = (sys.executable, "-m", *options)
    return ProcessSpec(config.name, role, argv, env, unset, spare if keeps else ())


def _extra_for(extra: Iterable[str], names: tuple[str, str]) -> tuple[str, ...]:
    parts = (entry.partition(":") for entry in extra)
    return tuple(argument for name, _, argument in parts if name in names)
