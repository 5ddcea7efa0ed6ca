"""A shape's weights as a GGUF file for llama.cpp: BF16, Q8_0 or Q4_0; the head beside Q4_0 is Q8_0, as
Baton's is int8 beside int4 and llama.cpp's own quantiser makes it (Q6_K where rows allow, else Q8_0).

Source: ggml-org/ggml docs/gguf.md (the file), ggml-quants.c (quantize_row_q8_0_ref, _q4_0_ref), and
convert_hf_to_gguf.py for the order of rows that llama.cpp's rotary embedding expects.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from baton.bench.engine.shapes import Shape
from baton.bench.engine.weights import SEED, tensors, widen

ALIGNMENT, BLOCK = 32, 32
KINDS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
# bits per weight, scales included: a block of 32 has one scale of 16 bits
BITS = {"bf16": 16.0, "int8": 8.5, "int4": 4.5}
_F32, _Q4_0, _Q8_0, _BF16 = 0, 2, 8, 30  # ggml_type
_TYPE = {"bf16": _BF16, "int8": _Q8_0, "int4": _Q4_0}
_FILE_TYPE = {"bf16": 32, "int8": 7, "int4": 2}  # llama_ftype
_U32, _FLOAT, _STRING = 4, 6, 8  # gguf_metadata_value_type
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def format_of(shape: Shape, name: str, format_: str) -> str:
    return "int8" if format_ == "int4" and name == shape.head else format_


def bits_per_weight(shape: Shape, format_: str) -> float:
    """Of what a decode step reads, scales included."""
    return shape.bits_per_weight(lambda name, _: BITS[format_of(shape, name, format_)])


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_NAMES[part]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def quantise(values: NDArray[np.float32], format_: str) -> NDArray[np.uint8]:
    """Blocks of 32 along a row, [blocks, bytes of a block]: the scale as float16, then the codes."""
    blocks = values.reshape(-1, BLOCK)
    peak = np.take_along_axis(blocks, abs(blocks).argmax(1, keepdims=True), 1)
    scale = abs(peak) / 127 if format_ == "int8" else peak / -8
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, 0, 1 / scale).astype(np.float32)
    if format_ == "int8":
        scaled = blocks * inverse
        codes = (
            np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8).view(np.uint8)
        )
    else:
        whole = np.clip(np.trunc(blocks * inverse + np.float32(8.5)), 0, 15).astype(np.uint8)
        codes = whole[:, : BLOCK // 2] | whole[:, BLOCK // 2 :] << 4
    return np.concatenate([scale.astype(np.float16).view(np.uint8), codes], axis=1)


def dequantise(blocks: NDArray[np.uint8], format_: str) -> NDArray[np.float32]:
    """What llama.cpp makes of `quantise`'s blocks, flat."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if format_ == "int8":
        codes = blocks[:, 2:].view(np.int8)
    else:
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).view(np.int8) - 8
    flat: NDArray[np.float32] = (scale * codes).reshape(-1)
    return flat


def permute(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q and k from halves (Hugging Face) to neighbouring pairs (llama.cpp's Llama)."""
    rows = values.shape[0] // heads // 2
    parts = values.reshape(heads, 2, rows, *values.shape[1:])
    return parts.swapaxes(1, 2).reshape(values.shape)


def write_gguf(shape: Shape, path: Path, format_: str, seed: int = SEED) -> None:
    sizes = shape.tensors()
    infos, offset = b"", 0
    for name, dims in sizes.items():
        kind = _TYPE[format_of(shape, name, format_)] if len(dims) == 2 else _F32
        infos += _string(gguf_name(name)) + struct.pack("<I", len(dims))
        infos += struct.pack(f"<{len(dims)}Q", *reversed(dims)) + struct.pack("<IQ", kind, offset)
        size = _bytes(dims, format_of(shape, name, format_))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    fields = _fields(shape, format_)
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(sizes), len(fields)))
        for key, value in fields.items():
            file.write(_string(key) + _value(value))
        file.write(infos)
        _align(file)
        for name, values in tensors(shape, seed):
            _write_tensor(file, shape, name, values, format_of(shape, name, format_))
            _align(file)


def _write_tensor(
    file: BinaryIO, shape: Shape, name: str, values: NDArray[np.uint16], format_: str
) -> None:
    if shape.family == "llama" and values.ndim == 2:
        for part, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads)):
            if part in name:
                values = permute(values, heads)
    if values.ndim == 1:
        file.write(widen(values).tobytes())
    elif format_ == "bf16":
        file.write(values.tobytes())
    else:
        file.write(quantise(widen(values), format_).tobytes())


def _fields(shape: Shape, format_: str) -> dict[str, int | float | str]:
    arch = shape.family
    return {
        "general.architecture": arch, "general.name": shape.name,
        "general.file_type": _FILE_TYPE[format_], "general.quantization_version": 2,
        f"{arch}.context_length": shape.max_context, f"{arch}.embedding_length": shape.hidden,
        f"{arch}.block_count": shape.layers, f"{arch}.feed_forward_length": shape.intermediate,
        f"{arch}.attention.head_count": shape.heads,
        f"{arch}.attention.head_count_kv": shape.kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": shape.rms_eps,
        f"{arch}.rope.freq_base": shape.rope_theta, f"{arch}.rope.dimension_count": shape.head_dim,
        f"{arch}.vocab_size": shape.vocab, "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip


def _bytes(dims: tuple[int, ...], format_: str) -> int:
    count = int(np.prod(dims))
    return int(count * BITS[format_] / 8) if len(dims) == 2 else 4 * count


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: int | float | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT, value)
    return struct.pack("<II", _U32, value)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
