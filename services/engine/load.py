"""Picks the backend for a device name; the only place that knows which there are."""

from __future__ import annotations

from services.engine.backend import Backend
from services.engine.checkpoint import load_weights
from services.engine.identity import numerics_of
from services.engine.model import ModelConfig
from services.engine.native_backend import NativeBackend, NativePages
from services.ops.errors import LayoutMismatch


def load_backend(device: str, directory: str, config: ModelConfig, pages: NativePages) -> Backend:
    """`cpu` is the native engine; `cuda`, `xpu`, `npu` and `torch-cpu` go through torch."""
    weights = load_weights(directory, config)
    if device == "cpu":
        return NativeBackend(config, weights, pages)
    from services.engine.torch_backend import TorchBackend  # torch takes a second to import

    return TorchBackend(config, weights, pages, device=device.removeprefix("torch-"))


def require_numerics(backend: Backend, device_class: str) -> None:
    """Refuses, by LayoutMismatch, a device whose KV is not what the cluster's fingerprint says."""
    expected = numerics_of(device_class)
    if backend.numerics != expected:
        raise LayoutMismatch(
            f"device: its numerics class is {backend.numerics}, the cluster's is {expected}; pages "
            "of both under one fingerprint would be taken for one another"
        )
