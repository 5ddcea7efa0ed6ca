"""Which numerics class a cluster is told, who checks it, and what it decides."""

from __future__ import annotations

import pytest

from baton.cluster import ClusterSpec
from baton.supervisor import with_prefill_class
from services.engine.identity import NATIVE_NUMERICS, identify, numerics_of
from services.engine.load import load_backend, require_numerics
from services.engine.reference import HeapPages
from services.ops.errors import ConfigError, LayoutMismatch

H200 = "torch-2.13.0/cuda13.0-NVIDIA-H200/float32/tile256"
L4 = "torch-2.13.0/cuda13.0-NVIDIA-L4/float32/tile256"


def fingerprint_of(prefill: str, decode: str = "cpu") -> str:
    return identify(
        "models/pico", kv_dtype="auto", layers_per_group=2, prefill_device=prefill,
        decode_device=decode,
    ).fingerprint  # fmt: skip


def test_cards_of_two_kinds_never_share_pages() -> None:
    """The class is part of the fingerprint, of prefill and of decode, each in its own place."""
    marks = {fingerprint_of(*devices) for devices in (("cpu",), (H200,), (L4,), ("cpu", H200))}
    assert len(marks) == 4


def test_a_bare_device_name_is_no_class() -> None:
    """`cuda` would be one class for all cards; the message tells how to learn the whole name."""
    assert numerics_of("cpu") == NATIVE_NUMERICS
    with pytest.raises(ConfigError, match=r"services\.engine\.torch_device --device=cuda"):
        numerics_of("cuda")


def test_only_a_mixed_cluster_is_not_of_one_class() -> None:
    """Decode's pages may serve a prompt only where both compute the same bits."""
    for prefill, one_class in (("cpu", True), (H200, False)):
        identity = identify(
            "models/pico", kv_dtype="auto", layers_per_group=2, prefill_device=prefill,
            decode_device="cpu",
        )  # fmt: skip
        assert identity.one_class is one_class


def test_a_worker_of_another_class_is_refused() -> None:
    """A worker whose device is not what the fingerprint says does not start."""
    identity = identify(
        "models/pico", kv_dtype="auto", layers_per_group=2, prefill_device="cpu",
        decode_device="cpu",
    )  # fmt: skip
    pages = HeapPages(identity.layout, 64)
    backend = load_backend("cpu", "models/pico", identity.config, pages)
    require_numerics(backend, "cpu")
    with pytest.raises(LayoutMismatch, match="NVIDIA-H200"):
        require_numerics(backend, H200)
    torch_backend = load_backend("torch-cpu", "models/pico", identity.config, pages)
    require_numerics(torch_backend, torch_backend.numerics)
    with pytest.raises(LayoutMismatch, match="native"):
        require_numerics(torch_backend, "cpu")


def test_the_supervisor_asks_the_device_once() -> None:
    """What prefill will be is found out before anything starts; a class that is given stands."""
    spec = ClusterSpec(run_dir="/run/b")
    assert with_prefill_class(spec).prefill_class == ""
    asked = with_prefill_class(ClusterSpec(run_dir="/run/b", prefill_device="torch-cpu"))
    assert asked.prefill_class.startswith("torch-")
    assert asked.prefill_class.count("/") == 3
    given = ClusterSpec(run_dir="/run/b", prefill_device="cuda", prefill_class=H200)
    assert with_prefill_class(given) is given
    with pytest.raises(ConfigError, match="prefill_device: torch cannot use 'abacus'"):
        with_prefill_class(ClusterSpec(run_dir="/run/b", prefill_device="abacus"))
