"""Random weights of a shape, and the Hugging Face directory that holds them. Deterministic by seed:
each tensor is drawn from the seed and its own name, so the order does not matter."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from baton.bench.engine.shapes import Shape

SEED = 20261121


def bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to the nearest bfloat16, ties to even; the bits as uint16."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def draw(name: str, shape: tuple[int, ...], seed: int = SEED) -> NDArray[np.uint16]:
    """One tensor in bfloat16: matrices so that activations stay near 1, norms near 1."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = random.standard_normal(shape, np.float32)
    if len(shape) == 2:
        values *= 1.0 if "embed_tokens" in name else shape[1] ** -0.5
    elif name.endswith("norm.weight"):
        values = 1 + 0.1 * values
    else:
        values *= 0.1
    return bf16(values)


def tensors(shape: Shape, seed: int = SEED) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    for name, sizes in shape.tensors().items():
        yield name, draw(name, sizes, seed)


def write_checkpoint(shape: Shape, directory: Path, seed: int = SEED) -> None:
    """config.json and model.safetensors, in bfloat16.

    Source of the format: https://github.com/huggingface/safetensors (README, "Format").
    """
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=1))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, sizes in shape.tensors().items():
        end = offset + 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors(shape, seed):
            file.write(values.tobytes())
