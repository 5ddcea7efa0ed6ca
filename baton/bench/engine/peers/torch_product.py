"""The peak of a large matrix product: torch's, which is oneDNN's, in bfloat16 or in int8."""

from __future__ import annotations

import time
from typing import Any

import torch

from baton.bench.engine.engines import Setup

ROWS, SIZE, SECONDS = 1024, 4096, 0.5


class Product:
    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        whole = setup.format != "bf16"
        if whole:
            self._left = torch.randint(-127, 127, (ROWS, SIZE), dtype=torch.int8)
            self._right = torch.randint(-127, 127, (SIZE, SIZE), dtype=torch.int8)
        else:
            self._left = torch.randn(ROWS, SIZE, dtype=torch.bfloat16)
            self._right = torch.randn(SIZE, SIZE, dtype=torch.bfloat16)
        self._multiply = torch._int_mm if whole else torch.mm

    def facts(self) -> dict[str, Any]:
        return {
            "version": torch.__version__, "measures": "peak",
            "flags": f"{self._left.dtype}, {ROWS} x {SIZE} x {SIZE}",
        }  # fmt: skip

    def peak(self) -> float:
        """GFLOP/s, or GOP/s of int8, over half a second."""
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            self._multiply(self._left, self._right)
            count += 1
        return count * 2 * ROWS * SIZE * SIZE / (time.perf_counter() - start) / 1e9

    def decode(self, streams: int, context: int, steps: int) -> list[float]:
        raise NotImplementedError("products alone")

    def prefill(self, tokens: int) -> float:
        raise NotImplementedError("products alone")


def make(setup: Setup) -> Product:
    return Product(setup)
