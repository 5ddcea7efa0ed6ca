"""Which numerics class a cluster is told, who checks it, and what it decides."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from baton.cluster import ClusterSpec, processes
from baton.supervisor import with_prefill_class
from services.engine.identity import NATIVE_NUMERICS, identify, numerics_of
from services.engine.load import Weights, load_backend, require_numerics
from services.engine.weights.names import ROUNDING_VERSION
from services.kv.heap import HeapPages
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


def test_every_weight_format_is_a_class_of_its_own() -> None:
    """Weights that were rounded give other KV; a prefill and a decode of two formats are two classes."""
    formats = ("cpu", "cpu/bf16", "cpu/int8", "cpu/int4")
    assert numerics_of("cpu/as-is") == numerics_of("cpu")
    assert len({numerics_of(format) for format in formats}) == 4
    assert len({fingerprint_of(*pair) for pair in itertools.product(formats, repeat=2)}) == 16
    with pytest.raises(ConfigError, match="int3"):
        numerics_of("cpu/int3")
    mixed = identify(
        "models/pico", kv_dtype="auto", layers_per_group=2, prefill_device="cpu/int8",
        decode_device="cpu/int4",
    )  # fmt: skip
    assert not mixed.one_class


def test_a_worker_of_another_format_is_refused(tmp_path: Path) -> None:
    """Its class says what its weights are, so it cannot join a cluster of other ones."""
    config = identify(
        "models/pico", kv_dtype="auto", layers_per_group=2, prefill_device="cpu",
        decode_device="cpu",
    )  # fmt: skip
    pages = HeapPages(config.layout, config.layout.groups)
    int8 = Weights("int8", str(tmp_path), config.weights)
    backend = load_backend("cpu", "models/pico", config.config, pages, int8)
    require_numerics(backend, "cpu/int8")
    for other in ("cpu", "cpu/bf16", "cpu/int4"):
        with pytest.raises(LayoutMismatch, match="int8"):
            require_numerics(backend, other)
    plain = load_backend("torch-cpu", "models/pico", config.config, pages, int8)
    assert plain.numerics.endswith(f"/int8-{ROUNDING_VERSION}")


def test_a_cluster_tells_every_process_the_format() -> None:
    """A store that was told another one would give its pages another fingerprint."""
    spec = ClusterSpec(run_dir="/run/b", model="/models/m", weights="int4", weights_cache="/c")
    told = {p.role: p.argv for p in processes(spec)}
    for role in ("kv-store", "prefill", "decode"):
        assert {"--prefill-device=cpu/int4", "--decode-device=cpu/int4"} <= set(told[role])
    for role in ("prefill", "decode"):
        assert {"--weights=int4", "--weights-cache=/c"} <= set(told[role])
    other = processes(replace(spec, prefill_device="torch-cpu", prefill_class=H200))
    prefill = next(p.argv for p in other if p.role == "prefill")
    assert {f"--prefill-device={H200}", "--decode-device=cpu/int4"} <= set(prefill)
    assert not [argument for argument in prefill if argument.startswith("--weights")]
    with pytest.raises(ConfigError, match="weights"):
        ClusterSpec(run_dir="/run/b", weights="int3")


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
    pages = HeapPages(identity.layout, identity.layout.groups)
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
