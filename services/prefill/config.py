"""What a prefill worker can be told."""

from __future__ import annotations

from dataclasses import dataclass

from services.kv.layout import PAGE_TOKENS
from services.ops.config import option
from services.ops.errors import ConfigError


@dataclass(frozen=True)
class PrefillConfig:
    """A prefill worker: computes prompts on the accelerator and hands the KV over."""

    name: str = option("prefill-0", "for people and logs")
    host: str = option("", "name of this host, for people; empty: the machine's")
    model: str = option("models/pico", "Hugging Face directory")
    scheduler: str = option("127.0.0.1:50052", "the scheduler's control address")
    arena_dir: str = option("/dev/shm/baton", "directory of this host's arena")
    device: str = option("cpu", "cpu, or a torch device: cuda, xpu, npu")
    weights: str = option("as-is", "as-is, bf16, int8 or int4")
    weights_cache: str = option("", "packed weights; empty: in XDG_CACHE_HOME/baton")
    prefill_device: str = option("cpu", "numerics class of prefill, part of the fingerprint")
    decode_device: str = option("cpu", "numerics class of decode, part of the fingerprint")
    chunk_tokens: int = option(256, "tokens of one chunk, at absolute positions")
    stream: str = option("layers", "layers: announce each layer group; whole: once, at the end")
    transfer: str = option("push", "to another arena: push pages, or pull: its store fetches them")
    transfer_patience_ms: int = option(
        5000, "how long a silent store is tried again; 0: not at all"
    )
    io_core: int = option(-1, "core of ZeroMQ's I/O thread; -1: any of this process's")
    heartbeat_ms: int = option(100, "how often to tell the scheduler it is alive")
    keys_dir: str = option("", "made by `baton keys`: TLS and CURVE everywhere; empty: plain")
    cores: tuple[int, ...] = option((), "processor cores, like 0; empty: any")
    threads: int = option(0, "threads that compute on cpu; 0: one for each of `cores`")
    failpoints: str = option("", "directory of armed failpoints; empty: none")
    log_level: str = option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= 64:
            raise ConfigError(f"threads: {self.threads} is not 0 to 64")
        if self.chunk_tokens < 1 or self.chunk_tokens % PAGE_TOKENS:
            raise ConfigError(f"chunk_tokens: {self.chunk_tokens} is not a multiple of 64")
        if self.transfer_patience_ms < 0:
            raise ConfigError(f"transfer_patience_ms: {self.transfer_patience_ms} is less than 0")
        if self.stream not in ("layers", "whole"):
            raise ConfigError(f"stream: {self.stream!r} is neither layers nor whole")
        if self.transfer not in ("push", "pull"):
            raise ConfigError(f"transfer: {self.transfer!r} is neither push nor pull")
