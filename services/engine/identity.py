"""Which model this is, as far as KV is concerned: shape, layout, weights and numerics class."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from services.engine.checkpoint import Checkpoint
from services.engine.model import ModelConfig
from services.engine.weights.names import AS_IS, weights_class
from services.kv.identity import fingerprint
from services.kv.layout import KvLayout
from services.ops.errors import ConfigError

NATIVE_NUMERICS = "native-2"  # raise the number when a kernel's rounding changes
CODEC = "raw"


def native_numerics(weights: str) -> str:
    """The native engine's class; `weights`: what their format adds to it."""
    return f"{NATIVE_NUMERICS}/{weights}" if weights else NATIVE_NUMERICS


def numerics_of(device_class: str) -> str:
    """The numerics class that a cluster was told: KV is bit-identical only within one.

    `cpu` is the native engine's over the checkpoint's own weights, `cpu/int4` its class over weights
    in that format. Any other must be spelled out, because most processes of a cluster
    have neither torch nor the device: a bare `cuda` would be one class for cards that round
    differently. Raises ConfigError for such a name.
    """
    device, _, format = device_class.partition("/")
    if device == "cpu":
        return native_numerics(weights_class(format or AS_IS))
    if "/" not in device_class:
        raise ConfigError(
            f"prefill_device, decode_device: {device_class!r} is not a numerics class; "
            f"`python -m services.engine.torch_device --device={device_class}` prints it, run where "
            "the device is"
        )
    return device_class


@dataclass(frozen=True)
class ModelIdentity:
    """One model directory as every process of a cluster must see it.

    `weights`: the digest of the checkpoint's.

    `one_class`: prefill and decode compute the same bits, so either may go on from, or reuse, what
    the other has computed for the same tokens.
    """

    config: ModelConfig
    layout: KvLayout
    fingerprint: str
    weights: str
    one_class: bool = True


@functools.cache
def digest_of(directory: str) -> str:
    """The digest of the weights in a directory, computed once in a process: they must not change."""
    return Checkpoint(Path(directory)).digest()


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
    prefill, decode = numerics_of(prefill_device), numerics_of(decode_device)
    digest = digest_of(directory)
    mark = fingerprint(digest, layout.describe(), CODEC, prefill, decode)
    return ModelIdentity(config, layout, mark, digest, prefill == decode)
