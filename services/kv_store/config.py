"""What a kv-store can be told."""

from __future__ import annotations

from dataclasses import dataclass

from services.ops.config import option
from services.ops.errors import ConfigError

LEASE_MS_MIN = 500  # it is renewed four times in that time, and a sweep looks every 100 ms


@dataclass(frozen=True)
class KvStoreConfig:
    """The kv-store: owns one host's KV arena."""

    name: str = option("kv-store", "for people and logs")
    model: str = option("models/pico", "Hugging Face directory; only its shape is read")
    arena_dir: str = option("/dev/shm/baton", "directory of the arena and its lock files, on tmpfs")
    arena_bytes: int = option(256 << 20, "size of the arena, reserved at start")
    kv_dtype: str = option("auto", "f32, bf16 or auto: bf16 for bf16 weights, else f32")
    layers_per_group: int = option(2, "layers streamed as one unit, 1 to all")
    streams_max: int = option(128, "stream records: requests that can be open at once")
    lease_ms: int = option(10000, "a stream that nobody renews is released after it")
    pins_max_bytes: int = option(0, "bound of pinned prefixes; 0: a quarter of the arena")
    disk_dir: str = option("", "directory of the disk tier; empty: none")
    disk_bytes: int = option(4 << 30, "bound of the disk tier")
    write_back_ms: int = option(1000, "cached blocks unused for so long are written to disk")
    prefetch_ms: int = option(500, "a new stream waits at most so long for blocks from other tiers")
    flush_ms: int = option(5000, "at most so long is spent on writing to disk when told to stop")
    listen: str = option("127.0.0.1:50061", "gRPC address, host:port or unix:path")
    ingest_listen: str = option("tcp://127.0.0.1:*", "ZeroMQ: page frames from other arenas")
    ingest_advertise: str = option("", "what peers connect to; empty: the bound address")
    ingest_bytes_inflight_max: int = option(64 << 20, "granted to all who send pages to this store")
    prefill_device: str = option("cpu", "numerics class of prefill, part of the fingerprint")
    decode_device: str = option("cpu", "numerics class of decode, part of the fingerprint")
    keys_dir: str = option("", "made by `baton keys`: TLS and CURVE everywhere; empty: plain")
    cores: tuple[int, ...] = option((), "processor cores, like 1 or 1-3; empty: any")
    unsafe: tuple[str, ...] = option((), "guards to switch off, for the chaos controls only")
    failpoints: str = option("", "directory of armed failpoints; empty: none")
    log_level: str = option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        if self.arena_bytes < 1 << 20:
            raise ConfigError(f"arena_bytes: {self.arena_bytes} is less than 1 MiB")
        if self.lease_ms < LEASE_MS_MIN:
            raise ConfigError(f"lease_ms: {self.lease_ms} is less than {LEASE_MS_MIN}")
        for name in ("disk_bytes", "prefetch_ms"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is less than 1")
        for name in ("write_back_ms", "flush_ms", "pins_max_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is less than 0")
        if self.streams_max < 1:
            raise ConfigError(f"streams_max: {self.streams_max} is less than 1")
