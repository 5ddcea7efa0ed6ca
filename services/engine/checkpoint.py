"""Weights on disk: safetensors files mapped read-only, their tensors seen in place.

Parses the format itself (8-byte length, JSON header, data) so that a process without torch can read
weights, and so that nothing in a file is ever executed. Knows names and shapes, not what they do.
Source of the format: https://github.com/huggingface/safetensors (README, "Format").

Who owns the bytes: the page cache. A view keeps its mapping alive; nobody may write to it, and the
files must not be changed or truncated while a process serves them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from services.engine.errors import ModelError
from services.engine.model import ModelConfig, read_json_object

HEADER_BYTES_MAX = 100 * 1000 * 1000  # the format's own limit
DIGEST_WHOLE_BYTES_MAX = 4 << 20
DIGEST_SAMPLES = 18  # the first, the last and 16 between
DIGEST_SAMPLE_BYTES = 4096

_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, eq=False)
class WeightView:
    """One tensor in a mapped file.

    dtype is `BF16`, `F16` or `F32`; array is read-only, row-major, and holds BF16 as uint16. Files
    made by old writers may start a tensor at any byte: a kernel that needs alignment asks for it.
    """

    dtype: str
    shape: tuple[int, ...]
    array: NDArray[Any]


class Checkpoint:
    """All tensors of a model directory: model.safetensors, or the shards its index names."""

    def __init__(self, directory: Path | str) -> None:
        """Maps the files and checks their headers. Raises ModelError; reads no weights."""
        self.directory = Path(directory)
        self._tensors: dict[str, WeightView] = {}
        single = self.directory / "model.safetensors"
        index = self.directory / "model.safetensors.index.json"
        if not single.exists() and index.exists():
            self.source = index
            self._map_shards(index)
        else:
            self.source = single
            self._tensors = _map_file(single)

    def _map_shards(self, index: Path) -> None:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: weight_map: not an object with file names")
        shards: dict[str, dict[str, WeightView]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{index}: weight_map.{name}: {file!r} is not a file name")
            if file not in shards:
                shards[file] = _map_file(self.directory / file)
            if name not in shards[file]:
                raise ModelError(f"{self.directory / file}: {name}: missing, {index.name} has it")
            self._tensors[name] = shards[file][name]

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def tensor(self, name: str) -> WeightView:
        if name not in self._tensors:
            raise ModelError(f"{self.source}: {name}: missing")
        return self._tensors[name]

    def digest(self) -> str:
        """A hexadecimal identity of the weights, the same however they are split into files.

        blake2b over each tensor's name, dtype and shape, in name order, and its bytes: all of them
        up to 4 MiB, else 18 samples of 4 KiB (the first, the last and 16 evenly between). Hashing
        every byte costs a second per GB at each start, which small models can afford and large
        ones cannot. Training moves every value of a matrix, so samples tell any two trainings
        apart; what they miss is a large tensor patched by hand between samples, and whoever does
        that must start with an empty store.
        """
        digest = hashlib.blake2b(digest_size=32)
        for name in self.names():
            view = self._tensors[name]
            digest.update(json.dumps([name, view.dtype, view.shape]).encode())
            data = view.array.reshape(-1).view(np.uint8)
            for start, stop in _sampled(data.size):
                digest.update(data[start:stop].data)
        return digest.hexdigest()


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors a model needs on disk, by Hugging Face name."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden),
        "model.norm.weight": (config.hidden,),
    }
    if not config.tie_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden)
    for layer in range(config.layers):
        for name, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    return shapes


def load_weights(directory: Path | str, config: ModelConfig) -> dict[str, WeightView]:
    """Every tensor of `weight_shapes`, checked against it, by Hugging Face name.

    A tied `lm_head.weight` is the embedding's view. A tensor the configuration does not explain is
    refused too: a bias that is silently left out gives fluent wrong answers.
    """
    checkpoint = Checkpoint(directory)
    expected = weight_shapes(config)
    weights = {}
    for name, shape in expected.items():
        view = checkpoint.tensor(name)
        if view.shape != shape:
            raise ModelError(f"{checkpoint.source}: {name}: shape {view.shape}, expected {shape}")
        weights[name] = view
    for name in checkpoint.names():
        derived = name.endswith(".rotary_emb.inv_freq") or name == LM_HEAD
        if name not in expected and not derived:
            raise ModelError(f"{checkpoint.source}: {name}: not a tensor of {config.architecture}")
    if config.tie_embeddings:
        weights[LM_HEAD] = weights[EMBEDDING]
    return weights


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden, config.intermediate
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    products = {
        "self_attn.q_proj": (query, hidden, config.attention_bias),
        "self_attn.k_proj": (key, hidden, config.attention_bias),
        "self_attn.v_proj": (key, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, query, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, bias) in products.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def _map_file(path: Path) -> dict[str, WeightView]:
    """[ header length u64 ][ JSON header ][ data ... ]    offsets count from the data's start."""
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
        raise ModelError(f"{path}: {error}") from error
    length = int.from_bytes(mapping[:8], "little")
    if len(mapping) < 8 or length > min(len(mapping) - 8, HEADER_BYTES_MAX):
        raise ModelError(f"{path}: header length: {length} of a file of {len(mapping)} bytes")
    try:
        header = json.loads(mapping[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: header: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: header: not a JSON object")
    header.pop("__metadata__", None)
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    _check_spans(path, spans, len(mapping) - 8 - length)
    return {name: _view(mapping, 8 + length, span) for name, span in spans.items()}


@dataclass(frozen=True)
class _Span:
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _span(path: Path, name: str, entry: Any) -> _Span:
    """One header entry, checked for itself."""
    where = f"{path}: {name}"
    if not isinstance(entry, dict):
        raise ModelError(f"{where}: not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ModelError(f"{where}: dtype: {dtype!r} is not one of {sorted(_DTYPES)}")
    if not _are_counts(shape):
        raise ModelError(f"{where}: shape: {shape!r} is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ModelError(f"{where}: data_offsets: {offsets!r} is not a pair of offsets")
    span = _Span(dtype, tuple(shape), *offsets)
    if span.stop - span.start != math.prod(span.shape) * _DTYPES[dtype].itemsize:
        raise ModelError(f"{where}: data_offsets: {offsets} do not hold {dtype} {list(shape)}")
    return span


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_spans(path: Path, spans: dict[str, _Span], data_bytes: int) -> None:
    """The tensors must tile the data: no overlap, no hole, nothing behind the last."""
    end = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)):
        if span.start != end:
            raise ModelError(f"{path}: {name}: data_offsets: starts at {span.start}, not at {end}")
        end = span.stop
    if end != data_bytes:
        raise ModelError(f"{path}: data of {data_bytes} bytes, but the header names {end}")


def _view(mapping: mmap.mmap, base: int, span: _Span) -> WeightView:
    count = math.prod(span.shape)
    flat = np.frombuffer(mapping, _DTYPES[span.dtype], count, base + span.start if count else 0)
    assert not flat.flags.writeable
    return WeightView(span.dtype, span.shape, flat.reshape(span.shape))


def _sampled(size: int) -> list[tuple[int, int]]:
    """The byte ranges of a tensor that its digest covers."""
    if size <= DIGEST_WHOLE_BYTES_MAX:
        return [(0, size)]
    last = size - DIGEST_SAMPLE_BYTES
    starts = [last * sample // (DIGEST_SAMPLES - 1) for sample in range(DIGEST_SAMPLES)]
    return [(start, start + DIGEST_SAMPLE_BYTES) for start in starts]
