"""Picks the backend for a device name; the only place that knows which there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.engine.backend import Backend
from services.engine.checkpoint import Checkpoint, WeightView, load_weights
from services.engine.identity import ModelIdentity, numerics_of
from services.engine.model import ModelConfig
from services.engine.native_backend import NativeBackend, NativePages, Weight
from services.engine.weights.names import AS_IS, weights_class
from services.ops.errors import LayoutMismatch


@dataclass(frozen=True)
class Weights:
    """Which weights a worker computes with.

    format: one of `formats.FORMATS`. cache: the directory of packed weights; empty: the user's.
    digest: the checkpoint's, if it is known already.
    """

    format: str = AS_IS
    cache: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Team:
    """The threads of the native engine, the caller's too, each pinned to one of `cores` if any."""

    threads: int = 1
    cores: tuple[int, ...] = ()


class EngineConfig(Protocol):
    """What a worker's configuration says of its engine."""

    @property
    def model(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def weights_cache(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def cores(self) -> tuple[int, ...]: ...


def load_engine(
    config: EngineConfig, identity: ModelIdentity, pages: NativePages, device_class: str
) -> Backend:
    """A worker's backend. Raises LayoutMismatch when its KV is not of `device_class`, and ConfigError
    as `load_backend` does."""
    weights = Weights(config.weights, config.weights_cache, identity.weights)
    team = Team(config.threads or len(config.cores) or 1, config.cores)
    backend = load_backend(config.device, config.model, identity.config, pages, weights, team)
    require_numerics(backend, device_class)
    return backend


def load_backend(
    device: str, directory: str, config: ModelConfig, pages: NativePages,
    weights: Weights = Weights(), team: Team = Team(),
) -> Backend:  # fmt: skip
    """`cpu` is the native engine; `cuda`, `xpu`, `npu` and `torch-cpu` go through torch.

    Weights that are to be packed and are not yet in the cache are packed first. Raises ConfigError for
    a format or a cache that cannot be used.
    """
    views = load_weights(directory, config)
    name = weights_class(weights.format)
    if device == "cpu":
        served = packed_weights(directory, config, views, weights) if name else views
        return NativeBackend(
            config, served, pages, threads=team.threads, cores=team.cores, weights_class=name
        )
    from services.engine.torch_backend import TorchBackend  # torch takes a second to import

    if name:
        from services.engine.weights.dequantised import dequantised

        views = dequantised(config, views, weights.format)
    return TorchBackend(
        config, views, pages, device=device.removeprefix("torch-"), weights_class=name
    )


def packed_weights(
    directory: str, config: ModelConfig, views: dict[str, WeightView], weights: Weights
) -> dict[str, Weight]:
    """The checkpoint's tensors with the packed matrices in place of its own."""
    from services.engine.weights.cache import obtain, recipe_of

    digest = weights.digest or Checkpoint(Path(directory)).digest()
    packed = obtain(weights.cache, recipe_of(digest, weights.format), config, views)
    return {**views, **packed}


def require_numerics(backend: Backend, device_class: str) -> None:
    """Refuses, by LayoutMismatch, a device whose KV is not what the cluster's fingerprint says."""
    expected = numerics_of(device_class)
    if backend.numerics != expected:
        raise LayoutMismatch(
            f"device, weights: the numerics class is {backend.numerics}, the cluster's is "
            f"{expected}; pages of both under one fingerprint would be taken for one another"
        )
