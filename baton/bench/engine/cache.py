"""The directory that keeps what the benchmark makes: checkpoints, GGUF files, converted models.

Bounded: what was used longest ago goes first. Everything in it can be removed at any time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from baton.bench.engine import gguf, weights
from baton.bench.engine.once import make_once
from baton.bench.engine.shapes import Shape

VERSION = 2  # of what is made; another number makes everything again


class Cache:
    """Makes an entry once, under a temporary name, and keeps all of them below `bytes_max`."""

    def __init__(self, root: Path, bytes_max: int) -> None:
        self.root, self._bytes_max = root, bytes_max
        self._in_use: set[Path] = set()
        root.mkdir(parents=True, exist_ok=True)

    def entry(self, name: str, make: Callable[[Path], None]) -> Path:
        """A directory that `make` has filled, now or in an earlier run."""
        path = self.place(name)
        if make_once(path, make):
            self._shrink()
        os.utime(path)
        return path

    def checkpoint(self, shape: Shape) -> Path:
        """A Hugging Face directory in bfloat16."""
        return self.entry(shape.name, lambda path: weights.write_checkpoint(shape, path))

    def gguf(self, shape: Shape, format_: str) -> Path:
        """A GGUF file of the same weights."""
        name = f"{shape.name}-{gguf.KINDS[format_]}"
        made = self.entry(name, lambda path: gguf.write_gguf(shape, path / "model.gguf", format_))
        return made / "model.gguf"

    def place(self, name: str) -> Path:
        """Where somebody else makes an entry."""
        path = self.root / f"v{VERSION}-{name}"
        self._in_use.add(path)
        return path

    def _shrink(self) -> None:
        """Never removes what this run has used: then the bound is too small, and is passed."""
        entries = sorted(self.root.glob("v*"), key=lambda path: path.stat().st_mtime)
        sizes = {path: _size(path) for path in entries}
        for path in entries:
            if sum(sizes.values()) <= self._bytes_max:
                return
            if path not in self._in_use:
                shutil.rmtree(path)
                del sizes[path]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
