"""Which model this is, as far as KV is concerned: shape, layout, weights and numerics class."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from services.engine.checkpoint import Checkpoint
from services.engine.model import ModelConfig
from services.kv.identity import fingerprint
from services.kv.layout import KvLayout

NATIVE_NUMERICS = "native-1"  # raise the number when a kernel's rounding changes
CODEC = "raw"


def numerics_of(device: str) -> str:
    """The numerics class of a device name: KV is bit-identical only within one."""
    if device == "cpu":
        return NATIVE_NUMERICS
    return f"torch-{metadata.version('torch')}/{device.removeprefix('torch-')}/float32"


@dataclass(frozen=True)
class ModelIdentity:
    """One model directory as every process of a cluster must see it."""

    config: ModelConfig
    layout: KvLayout
    fingerprint: str


def identify(
    directory: str, *, kv_dtype: str, layers_per_group: int, prefill_device: str, decode_device: str
) -> ModelIdentity:
    """Reads the model's shape and weight digest. `kv_dtype` `auto` follows the weights."""
    config = ModelConfig.load(directory)
    checkpoint = Checkpoint(Path(directory))
    if kv_dtype == "auto":
        embedding = checkpoint.tensor("model.embed_tokens.weight")
        kv_dtype = "bf16" if embedding.dtype == "BF16" else "f32"
    layout = KvLayout(
        config.layers,
        min(layers_per_group, config.layers),
        config.kv_heads,
        config.head_dim,
        kv_dtype,
    )
    mark = fingerprint(
        checkpoint.digest(), layout.describe(), CODEC,
        numerics_of(prefill_device), numerics_of(decode_device),
    )  # fmt: skip
    return ModelIdentity(config, layout, mark)
