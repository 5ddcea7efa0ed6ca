"""The file of packed weights: made once, mapped by all, never believed when it is damaged."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.engine.checkpoint import LM_HEAD, WeightView
from services.engine.errors import ModelError
from services.engine.packed import PackedMatrix
from services.engine.weights import cache, packedfile
from services.engine.weights.cache import default_directory, obtain, recipe_of
from services.engine.weights.packedfile import BadPack, Recipe
from services.engine.weights.plan import items
from services.ops.errors import ConfigError
from tests.support.oracle import Loaded

DIGEST = "ab" * 32


def same(one: dict[str, PackedMatrix], other: dict[str, PackedMatrix]) -> bool:
    assert list(one) == list(other)
    return all(one[name].data.tobytes() == other[name].data.tobytes() for name in one)


def path_of(directory: Path, format: str = "int4") -> Path:
    return directory / recipe_of(DIGEST, format).file_name


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is written from now on."""
    written: list[Path] = []
    write = packedfile.write

    def counted(path: Path, *rest: object) -> None:
        written.append(path)
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(packedfile, "write", counted)
    return written


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_a_second_worker_attaches(
    format: str, loaded: Loaded, tmp_path: Path, packings: list[Path]
) -> None:
    """The first packs, the second maps the same bytes, read-only and on cache lines."""
    config, weights = loaded
    first = obtain(tmp_path, recipe_of(DIGEST, format), config, weights)
    second = obtain(tmp_path, recipe_of(DIGEST, format), config, weights)
    assert packings == [path_of(tmp_path, format)]
    assert same(first, second)
    assert list(second) == [item.tensor for item in items(config, format)]
    for item, matrix in zip(items(config, format), second.values(), strict=True):
        assert (matrix.format, matrix.group) == (item.format, item.group)
        assert (matrix.rows, matrix.cols) == weights[item.tensor].shape
        assert not matrix.data.flags.writeable
        assert matrix.data.ctypes.data % 64 == 0
        assert (
            matrix.unpacked().tobytes()
            == cache.packed(item, weights[item.tensor]).unpacked().tobytes()
        )


def test_the_head_of_an_int4_model_is_int8(loaded: Loaded, tmp_path: Path) -> None:
    """It decides over every token, and costs as much accuracy as all layers together."""
    config, weights = loaded
    matrices = obtain(tmp_path, recipe_of(DIGEST, "int4"), config, weights)
    assert {m.format for name, m in matrices.items() if name != LM_HEAD} == {"int4"}
    assert matrices[LM_HEAD].format == "int8"


def test_workers_that_start_at_once_pack_once(
    loaded: Loaded, tmp_path: Path, packings: list[Path]
) -> None:
    """One packs, the others wait for its lock; all get the same."""
    config, weights = loaded
    together = threading.Barrier(4)
    results: list[dict[str, PackedMatrix]] = []

    def start() -> None:
        together.wait()
        results.append(obtain(tmp_path, recipe_of(DIGEST, "int8"), config, weights))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packings) == 1
    assert len(results) == 4
    assert all(same(results[0], other) for other in results)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(where=st.floats(0, 1), bit=st.integers(0, 7))
def test_no_flipped_bit_is_served(
    where: float, bit: int, loaded: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever it is, in the header or in a matrix, the file is refused or gives what was packed; only
    the padding between matrices may change."""
    config, weights = loaded
    directory = tmp_path_factory.mktemp("flip")
    recipe = recipe_of(DIGEST, "int8")
    packed = {name: m.data.copy() for name, m in obtain(directory, recipe, config, weights).items()}
    path = path_of(directory, "int8")
    path.with_name(path.name + ".verified").unlink()
    data = bytearray(path.read_bytes())
    data[round(where * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)
    with suppress(BadPack):
        matrices = packedfile.attach(path, recipe)
        assert all(matrices[name].data.tobytes() == packed[name].tobytes() for name in packed)


@pytest.mark.parametrize("kept", [0, 5, 4000, -4096, -1])
def test_a_truncated_file_is_made_anew(
    kept: int, loaded: Loaded, tmp_path: Path, packings: list[Path]
) -> None:
    """Whatever is left of it, also when its bytes had been verified before."""
    config, weights = loaded
    recipe = recipe_of(DIGEST, "int4")
    first = obtain(tmp_path, recipe, config, weights)
    copies = {name: replace(m, data=m.data.copy()) for name, m in first.items()}
    path = path_of(tmp_path)
    os.rename(path, tmp_path / "old")  # a mapping must not be cut under its reader
    path.write_bytes((tmp_path / "old").read_bytes()[:kept])
    with pytest.raises(BadPack, match=path.name):
        packedfile.attach(path, recipe)
    assert same(copies, obtain(tmp_path, recipe, config, weights))
    assert len(packings) == 2


def test_a_file_of_another_recipe_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    """Another checkpoint, format or version never serves, even under the right name."""
    config, weights = loaded
    recipe = recipe_of(DIGEST, "int4")
    obtain(tmp_path, recipe, config, weights)
    others = [
        replace(recipe, weights="cd" * 32), replace(recipe, packing=recipe.packing + 1),
        replace(recipe, rounding=recipe.rounding + 1), replace(recipe, format="int8"),
        replace(recipe, group=32), replace(recipe, head_group=64),
    ]  # fmt: skip
    assert len({recipe.file_name, *(other.file_name for other in others)}) == 7
    for other in others:
        with pytest.raises(BadPack, match="another recipe"):
            packedfile.attach(path_of(tmp_path), other)


def test_a_damaged_matrix_is_found_after_a_restart(loaded: Loaded, tmp_path: Path) -> None:
    """Bytes are checked once a boot; a file that was written again is checked again."""
    config, weights = loaded
    recipe = recipe_of(DIGEST, "int8")
    obtain(tmp_path, recipe, config, weights)
    path = path_of(tmp_path, "int8")
    data = bytearray(path.read_bytes())
    data[packedfile.ALIGNMENT] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(BadPack, match="checksum"):
        packedfile.attach(path, recipe)


@contextmanager
def files_at_most(count: int) -> Iterator[None]:
    """As on a full disk: no file of this process grows past so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_is_named(loaded: Loaded, tmp_path: Path) -> None:
    """The error has the option and the path, nothing half written stays, and a later start packs."""
    config, weights = loaded
    recipe = recipe_of(DIGEST, "int8")
    with files_at_most(20000), pytest.raises(ConfigError) as caught:
        obtain(tmp_path, recipe, config, weights)
    assert "weights_cache" in caught.value.message
    assert str(path_of(tmp_path, "int8")) in caught.value.message
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert obtain(tmp_path, recipe, config, weights)


def test_what_a_dead_packer_left_is_removed(loaded: Loaded, tmp_path: Path) -> None:
    """A process that was killed while packing leaves a file under another name, and no lock."""
    config, weights = loaded
    recipe = recipe_of(DIGEST, "int8")
    left = tmp_path / f".{recipe.file_name}.12345"
    left.write_bytes(b"half")
    obtain(tmp_path, recipe, config, weights)
    assert not left.exists()


def test_a_place_that_is_no_directory_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    """By ConfigError, with the option's name."""
    config, weights = loaded
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="weights_cache"):
        obtain(tmp_path / "file", recipe_of(DIGEST, "int8"), config, weights)


def test_weights_that_cannot_be_rounded_name_their_tensor(loaded: Loaded, tmp_path: Path) -> None:
    """A NaN in a checkpoint stops the start, whatever the format, and leaves no file."""
    config, weights = loaded
    broken = dict(weights)
    bad = np.array(weights[LM_HEAD].array)
    bad[3, 1] = np.nan
    broken[LM_HEAD] = WeightView("F32", bad.shape, bad)
    for format in ("bf16", "int8", "int4"):
        with pytest.raises(ModelError, match="lm_head"):
            obtain(tmp_path, recipe_of(DIGEST, format), config, broken)
    assert not list(tmp_path.glob("*.weights"))


def test_the_cache_follows_the_user_s_settings() -> None:
    """XDG_CACHE_HOME/baton, else .cache/baton below the home directory."""
    assert default_directory({"XDG_CACHE_HOME": "/c"}) == Path("/c/baton")
    assert default_directory({}) == Path.home() / ".cache" / "baton"


def test_a_recipe_is_part_of_the_name() -> None:
    """So that several formats and versions lie beside each other."""
    assert (
        Recipe("0123456789abcdef01", "int4", 64, 32, 1, 2).file_name
        == "0123456789abcdef-int4-g64h32-p1-r2.weights"
    )
