"""Weights are read in place from any safetensors files, and one that lies is refused by name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from services.engine import checkpoint
from services.engine.checkpoint import EMBEDDING, LM_HEAD, Checkpoint, load_weights, weight_shapes
from services.engine.errors import ModelError
from services.engine.model import ModelConfig
from tests.support.models import TINY_MODELS, save_tiny_model


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A directory with these tensors in one file, as the safetensors library writes it."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def assert_equals_library(read: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert read.names() == sorted(expected)
    for name, tensor in expected.items():
        view = read.tensor(name)
        assert view.shape == view.array.shape == tuple(tensor.shape)
        dtype = torch.uint16 if view.dtype == "BF16" else tensor.dtype
        assert np.array_equal(view.array, tensor.view(dtype).numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_single_and_sharded_files_hold_the_same(dtype: str, tmp_path: Path) -> None:
    """One file or many, every tensor is what the safetensors library reads, BF16 as its bits."""
    single = save_tiny_model("llama", tmp_path / "single", dtype=dtype)
    sharded = save_tiny_model("llama", tmp_path / "sharded", dtype=dtype, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = load_file(single / "model.safetensors")
    assert_equals_library(Checkpoint(single), expected)
    assert_equals_library(Checkpoint(sharded), expected)
    assert Checkpoint(single).digest() == Checkpoint(sharded).digest()


def test_a_view_is_the_file_itself(tmp_path: Path) -> None:
    """A tensor is a read-only view of the mapping, not a copy, and outlives the checkpoint."""
    save(tmp_path, {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3)})
    array = Checkpoint(tmp_path).tensor("w").array
    assert not array.flags.writeable
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(42).tobytes())
    assert array[1, 2] == 42


def test_odd_tensors(tmp_path: Path) -> None:
    """A scalar, an empty tensor and one that starts at an odd byte are all readable."""
    header = {
        "__metadata__": {"format": "pt"},
        "scalar": entry("F16", [], 0, 2),
        "empty": entry("F32", [3, 0], 2, 2),
        "odd": entry("F32", [1], 2, 6),
    }
    data = np.float16(1.5).tobytes() + np.float32(2.5).tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, data))
    read = Checkpoint(tmp_path)
    assert read.tensor("scalar").array == 1.5
    assert read.tensor("empty").array.shape == (3, 0)
    assert read.tensor("odd").array.tolist() == [2.5]
    assert len(read.digest()) == 64


@pytest.mark.parametrize("name", TINY_MODELS)
def test_weights_of_every_family_are_complete(name: str, tmp_path: Path) -> None:
    """Every parameter transformers saves is expected, with its shape, and nothing else is."""
    directory = save_tiny_model(name, tmp_path)
    config = ModelConfig.load(directory)
    saved = load_file(directory / "model.safetensors")
    assert weight_shapes(config) == {key: tuple(tensor.shape) for key, tensor in saved.items()}
    weights = load_weights(directory, config)
    assert set(weights) == set(saved) | {LM_HEAD}
    assert (weights[LM_HEAD] is weights[EMBEDDING]) == config.tie_embeddings


def test_a_tied_head_in_the_file_is_ignored(tmp_path: Path) -> None:
    """With tied embeddings the head is the embedding, even if the file has a head of its own."""
    directory = save_tiny_model("qwen2-tied-window", tmp_path)
    path = directory / "model.safetensors"
    saved = load_file(path)
    save_file({**saved, LM_HEAD: torch.zeros_like(saved[EMBEDDING])}, path)
    weights = load_weights(directory, ModelConfig.load(directory))
    assert weights[LM_HEAD] is weights[EMBEDDING]


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, ModelConfig, dict[str, torch.Tensor]]:
    directory = save_tiny_model("llama", tmp_path)
    saved = load_file(directory / "model.safetensors")
    return directory, ModelConfig.load(directory), saved


def test_weights_that_do_not_fit_the_config_are_refused(
    llama: tuple[Path, ModelConfig, dict[str, torch.Tensor]],
) -> None:
    """A missing tensor, a wrong shape and a tensor nobody asked for are named with their file."""
    directory, config, saved = llama
    bias = "model.layers.0.self_attn.q_proj.bias"
    norm = "model.layers.1.input_layernorm.weight"
    for changed, name, problem in (
        ({key: value for key, value in saved.items() if key != norm}, norm, "missing"),
        ({**saved, norm: torch.zeros(65)}, norm, r"shape \(65,\), expected \(64,\)"),
        ({**saved, bias: torch.zeros(64)}, bias, "not a tensor of LlamaForCausalLM"),
    ):
        save_file(changed, directory / "model.safetensors")
        with pytest.raises(ModelError, match=rf"model\.safetensors: {name}: {problem}"):
            load_weights(directory, config)


def test_frequencies_stored_by_old_writers_are_ignored(
    llama: tuple[Path, ModelConfig, dict[str, torch.Tensor]],
) -> None:
    """rotary_emb.inv_freq is derived from the config and may lie in the file."""
    directory, config, saved = llama
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**saved, name: torch.zeros(8)}, directory / "model.safetensors")
    assert name not in load_weights(directory, config)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ({"weight_map": {"w": "gone.safetensors"}}, r"gone\.safetensors"),
        ({"weight_map": {"w": "../model.safetensors"}}, r"weight_map\.w"),
        ({"weight_map": {"w": 3}}, r"weight_map\.w"),
        ({"weight_map": {"other": "shard.safetensors"}}, r"shard\.safetensors: other: missing"),
        ({"weight_map": []}, "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_a_bad_index_is_refused(index: Any, problem: str, tmp_path: Path) -> None:
    """An index may name only files beside it, which exist and hold what it says."""
    save_file({"w": torch.zeros(2)}, tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=problem):
        Checkpoint(tmp_path)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "model.safetensors"),
    "shorter than a length": (b"\x01\x00", "header length"),
    "header past the end": (raw_file({}, length=1000), "header length"),
    "not JSON": (raw_file(b"{"), "header"),
    "deep JSON": (raw_file(b"[" * 100_000), "header"),
    "not an object": (raw_file([]), "header"),
    "entry not an object": (raw_file({"w": 3}), "w: "),
    "unknown dtype": (raw_file({"w": entry("I64", [1], 0, 8)}, bytes(8)), "w: dtype"),
    "dtype not a name": (raw_file({"w": entry(["F32"], [1], 0, 4)}, bytes(4)), "w: dtype"),
    "negative size": (raw_file({"w": entry("F32", [-1], 0, 4)}, bytes(4)), "w: shape"),
    "size not a number": (raw_file({"w": entry("F32", [1.0], 0, 4)}, bytes(4)), "w: shape"),
    "one offset": (raw_file({"w": entry("F32", [1], 0)}, bytes(4)), "w: data_offsets"),
    "reversed": (raw_file({"w": entry("F32", [1], 4, 0)}, bytes(4)), "w: data_offsets"),
    "wrong size": (raw_file({"w": entry("F32", [2], 0, 4)}, bytes(4)), "w: data_offsets"),
    "past the end": (raw_file({"w": entry("F32", [2], 0, 8)}, bytes(4)), "data of 4 bytes"),
    "bytes behind": (raw_file({"w": entry("F32", [1], 0, 4)}, bytes(8)), "data of 8 bytes"),
    "hole": (raw_file({"w": entry("F32", [1], 4, 8)}, bytes(8)), "w: data_offsets"),
    "overlap": (
        raw_file({"v": entry("F32", [2], 0, 8), "w": entry("F32", [1], 4, 8)}, bytes(8)),
        "w: data_offsets",
    ),
}


@pytest.mark.parametrize(("content", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_lies_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    """Whatever is wrong with a file's header, the error names the file and the tensor."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=problem):
        Checkpoint(tmp_path)


@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 300))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    """One wrong byte, or an early end, gives tensors or a ModelError: no crash, no other error."""
    header = {"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [3], 16, 22)}
    content = bytearray(raw_file(header, bytes(22)))
    content[position % len(content)] = value
    directory = tmp_path_factory.mktemp("damaged")
    (directory / "model.safetensors").write_bytes(content[: max(1, len(content) - cut // 3)])
    with contextlib.suppress(ModelError):
        Checkpoint(directory).digest()


def test_the_digest_covers_names_dtypes_shapes_and_values(tmp_path: Path) -> None:
    """Another name, dtype, shape or value is another model."""
    values = torch.arange(6, dtype=torch.float16)
    variants = [
        {"w": values},
        {"v": values},
        {"w": values.view(torch.bfloat16)},
        {"w": values.reshape(2, 3)},
        {"w": values + 1},
        {"w": values, "v": values.clone()},
    ]
    digests = [
        Checkpoint(save(tmp_path / str(number), tensors)).digest()
        for number, tensors in enumerate(variants)
    ]
    assert len(set(digests)) == len(variants)


def test_the_digest_samples_large_tensors(tmp_path: Path) -> None:
    """Of a tensor above 4 MiB the first, the last and 16 blocks of 4 KiB between are covered; below
    that, every byte."""
    for count in (1 << 20, (1 << 20) + 1):
        save(tmp_path, {"w": torch.zeros(count)})
        size = 4 * count
        covered = checkpoint._sampled(size)
        path = tmp_path / "model.safetensors"
        base = path.stat().st_size - size
        seen = {Checkpoint(tmp_path).digest()}
        for start, stop in covered:
            for place in (start, stop - 1):
                with path.open("r+b") as file:
                    file.seek(base + place)
                    file.write(bytes([len(seen)]))
                seen.add(Checkpoint(tmp_path).digest())
        assert len(seen) == 1 + 2 * len(covered)
    assert checkpoint._sampled(1 << 22) == [(0, 1 << 22)]
    assert len(covered) == 18
    assert covered[0] == (0, 4096)
    assert covered[-1] == (size - 4096, size)
