"""The benchmark's own checkpoints, for peers that convert them: read, and kept converted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from baton.bench.engine.once import make_once
from baton.bench.engine.weights import widen


class Source(Mapping[str, NDArray[np.float32]]):
    """Tensors of a bfloat16 checkpoint by Hugging Face name, widened as they are asked for."""

    def __init__(self, directory: str) -> None:
        path = Path(directory) / "model.safetensors"
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
        self._header.pop("__metadata__", None)
        self._data = np.memmap(path, np.uint16, "r", offset=8 + size)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        begin, end = self._header[name]["data_offsets"]
        return widen(np.array(self._data[begin // 2 : end // 2])).reshape(
            self._header[name]["shape"]
        )

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def converted(path: str, make: Callable[[Path], None]) -> Path:
    """A directory that `make` has filled, now or in an earlier run."""
    place = Path(path)
    make_once(place, make)
    return place
