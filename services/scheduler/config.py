"""What the scheduler can be told."""

from __future__ import annotations

from dataclasses import dataclass

from services.ops.config import option
from services.ops.errors import ConfigError


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler: takes requests, places them, and sees each one to its end."""

    name: str = option("scheduler", "for people and logs")
    model: str = option("models/pico", "Hugging Face directory: tokenizer and limits")
    model_name: str = option("", "the id clients use; empty: the directory's name")
    listen: str = option("127.0.0.1:50051", "public gRPC address; port 0 picks one")
    control_listen: str = option("127.0.0.1:50052", "where workers dial in, host:port or unix:path")
    stores: tuple[str, ...] = option(("127.0.0.1:50061",), "gRPC addresses of the kv-stores")
    journal_dir: str = option("run/journal", "directory of the request journal")
    journal_fsync: bool = option(False, "fsync each record: survives power loss, costs latency")
    heartbeat_ms: int = option(100, "how often workers say they are alive")
    suspect_ms: int = option(700, "silence after which a worker is suspected")
    lost_ms: int = option(3000, "a host without workers so long is given up, if there is another")
    orphan_ms: int = option(5000, "default: a stream without a reader is cancelled after it")
    retain_ms: int = option(60000, "default: a finished request stays resumable for it")
    peer_fetch: bool = option(True, "stores fetch cached prefixes from each other")
    waiting_max: int = option(256, "requests that may wait; more are refused")
    recover_grace_ms: int = option(700, "after a restart, wait this long for workers to come back")
    recover: str = option("takeover", "takeover, or reprefill: the control that recomputes")
    keys_dir: str = option("", "made by `baton keys`: TLS and CURVE everywhere; empty: plain")
    cores: tuple[int, ...] = option((), "processor cores, like 1 or 1-3; empty: any")
    unsafe: tuple[str, ...] = option((), "guards to switch off, for the chaos controls only")
    failpoints: str = option("", "directory of armed failpoints; empty: none")
    log_level: str = option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        if self.suspect_ms < 3 * self.heartbeat_ms:
            raise ConfigError("suspect_ms: must be at least 3 heartbeats")
        if self.lost_ms <= self.suspect_ms:
            raise ConfigError("lost_ms: must be more than suspect_ms")
        if self.recover not in ("takeover", "reprefill"):
            raise ConfigError(f"recover: {self.recover!r} is neither takeover nor reprefill")
        if not self.stores:
            raise ConfigError("stores: at least one kv-store is needed")
