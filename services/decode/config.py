"""What a decode worker can be told."""

from __future__ import annotations

from dataclasses import dataclass

from services.ops.config import option
from services.ops.errors import ConfigError


@dataclass(frozen=True)
class DecodeConfig:
    """A decode worker: runs a continuous batch over pages in place, on CPU cores."""

    name: str = option("decode-0", "for people and logs")
    host: str = option("", "name of this host, for people; empty: the machine's")
    model: str = option("models/pico", "Hugging Face directory")
    scheduler: str = option("127.0.0.1:50052", "the scheduler's control address")
    arena_dir: str = option("/dev/shm/baton", "directory of this host's arena")
    device: str = option("cpu", "cpu, or a torch device")
    weights: str = option("as-is", "as-is, bf16, int8 or int4")
    weights_cache: str = option("", "packed weights; empty: in XDG_CACHE_HOME/baton")
    prefill_device: str = option("cpu", "numerics class of prefill, part of the fingerprint")
    decode_device: str = option("cpu", "numerics class of decode, part of the fingerprint")
    announce_listen: str = option("tcp://127.0.0.1:*", "ZeroMQ: layer announcements")
    announce_advertise: str = option("", "what prefill connects to; empty: the bound address")
    batch_max: int = option(16, "streams that run at once; more wait their turn")
    heartbeat_ms: int = option(100, "how often to tell the scheduler it is alive")
    keys_dir: str = option("", "made by `baton keys`: TLS and CURVE everywhere; empty: plain")
    cores: tuple[int, ...] = option((), "processor cores, like 1; empty: any")
    threads: int = option(0, "threads that compute on cpu; 0: one for each of `cores`")
    unsafe: tuple[str, ...] = option((), "guards to switch off, for the chaos controls only")
    failpoints: str = option("", "directory of armed failpoints; empty: none")
    log_level: str = option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= 64:
            raise ConfigError(f"threads: {self.threads} is not 0 to 64")
        if self.batch_max < 1:
            raise ConfigError(f"batch_max: {self.batch_max} is less than 1")
