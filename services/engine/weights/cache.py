"""From a model directory to packed weights: attached if they lie in the cache, packed first if not.

Workers of one host that start at once pack once: who has the file's lock packs, the others wait for it
and attach. Blocking; knows no scheduler and no arena.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.engine.checkpoint import LM_HEAD, WeightView
from services.engine.errors import ModelError
from services.engine.model import ModelConfig
from services.engine.packed import PACK_VERSION, PackedMatrix
from services.engine.weights import packedfile
from services.engine.weights.formats import F32, QuantisedMatrix, round_to_bf16
from services.engine.weights.names import FORMATS, ROUNDING_VERSION
from services.engine.weights.packedfile import BadPack, Recipe
from services.engine.weights.plan import Item, group_of, items, slabs
from services.engine.weights.progress import progress
from services.engine.weights.rounding import quantise
from services.ops import log
from services.ops.errors import ConfigError
from services.ops.private import private_directory

_logger = log.get("weights")


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where packed weights lie unless `weights_cache` says otherwise."""
    base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "baton"


def recipe_of(digest: str, format: str) -> Recipe:
    """How weights with this digest are packed now."""
    assert format in FORMATS[1:]
    groups = group_of(format), group_of(format, LM_HEAD)
    return Recipe(digest, format, *groups, PACK_VERSION, ROUNDING_VERSION)


def obtain(
    directory: Path | str, recipe: Recipe, config: ModelConfig, weights: Mapping[str, WeightView]
) -> dict[str, PackedMatrix]:
    """The model's packed matrices, by their names in the checkpoint.

    Raises ConfigError when the cache cannot be used, ModelError when a matrix cannot be rounded.
    """
    place = Path(directory) if directory else default_directory()
    path = place / recipe.file_name
    if (found := _attach(path, recipe)) is not None:
        return found
    private_directory(place, "weights_cache")
    with _only_one(path):
        if (found := _attach(path, recipe)) is not None:
            return found
        started = time.monotonic()
        _logger.info("packing weights", format=recipe.format, path=str(path))
        wanted = items(config, recipe.format)
        names = [item.tensor for item in wanted]
        packedfile.write(path, recipe, names, _pack_all(wanted, weights))
        _logger.info("weights packed", seconds=round(time.monotonic() - started, 2))
    return packedfile.attach(path, recipe)


def packed(item: Item, view: WeightView) -> PackedMatrix:
    """One matrix in its format. Raises ModelError naming the tensor."""
    try:
        if item.format == "bf16":
            return PackedMatrix.of_bf16(np.concatenate([_bf16(part) for part in slabs(view)]))
        rounded = quantised(item, view)
    except ModelError as error:
        raise ModelError(f"{item.tensor}: {error}") from error
    return PackedMatrix.of_codes(item.format, rounded.codes, rounded.scales, rounded.group)


def quantised(item: Item, view: WeightView) -> QuantisedMatrix:
    """The codes and scales of an int8 or int4 matrix."""
    threads = len(os.sched_getaffinity(0))
    parts = [quantise(item.format, part, item.group, threads) for part in slabs(view)]
    codes = np.concatenate([part.codes for part in parts])
    scales = np.concatenate([part.scales for part in parts])
    return QuantisedMatrix(item.format, codes, scales, item.group)


def _bf16(part: F32) -> NDArray[np.uint16]:
    if not np.isfinite(part).all():
        raise ModelError("a weight is not a finite number")
    return round_to_bf16(part)


def _attach(path: Path, recipe: Recipe) -> dict[str, PackedMatrix] | None:
    """The matrices, or None when there is no file or one that must be made anew."""
    try:
        return packedfile.attach(path, recipe)
    except FileNotFoundError:
        return None
    except BadPack as error:
        _logger.warning("packed weights refused, made anew", reason=str(error))
        return None
    except OSError as error:
        raise ConfigError(f"weights_cache: cannot read {path}: {error.strerror}") from error


def _pack_all(wanted: list[Item], weights: Mapping[str, WeightView]) -> Iterator[PackedMatrix]:
    """One packed matrix after another."""
    total = sum(weights[item.tensor].array.size for item in wanted)
    with progress(total) as advance:
        for item in wanted:
            view = weights[item.tensor]
            yield packed(item, view)
            advance(view.array.size)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Holds the file's lock, waiting for whoever packs it now; a packer that dies lets go of it."""
    lock = path.with_name(path.name + ".lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o660)
    except OSError as error:
        raise ConfigError(f"weights_cache: cannot write {lock}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("waiting for another process to pack the weights", path=str(path))
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
