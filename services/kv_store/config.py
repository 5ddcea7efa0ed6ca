"""What a kv-store can be told."""

from __future__ import annotations

from dataclasses import dataclass

from services.ops.config import option
from services.ops.errors import ConfigError


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
    listen: str = option("127.0.0.1:50061", "gRPC address, host:port or unix:path")
    ingest_listen: str = option("tcp://127.0.0.1:*", "ZeroMQ: page frames from other arenas")
    ingest_advertise: str = option("", "what peers connect to; empty: the bound address")
    prefill_device: str = option("cpu", "device class of prefill, part of the fingerprint")
    decode_device: str = option("cpu", "device class of decode, part of the fingerprint")
    cores: tuple[int, ...] = option((), "processor cores, like 1 or 1-3; empty: any")
    unsafe: tuple[str, ...] = option((), "guards to switch off, for the chaos controls only")
    failpoints: str = option("", "directory of armed failpoints; empty: none")
    log_level: str = option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        if self.arena_bytes < 1 << 20:
            raise ConfigError(f"arena_bytes: {self.arena_bytes} is less than 1 MiB")
        if self.streams_max < 1:
            raise ConfigError(f"streams_max: {self.streams_max} is less than 1")
