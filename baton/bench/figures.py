"""What every benchmark's result carries: spreads, versions, the machine. Pure, but for looking up
what is installed."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from baton import machine

_PACKAGES = ("baton", "grpcio", "pyzmq", "numpy", "mooncake-transfer-engine-non-cuda")


def quartiles(values: Iterable[float]) -> list[float]:
    """[lower quartile, median, upper quartile], to four significant digits; of one value, itself."""
    found = list(values)
    if len(found) > 1:  # inclusive: no quartile lies beyond the samples
        found = statistics.quantiles(found, n=4, method="inclusive")
    elif found:
        found *= 3
    return [float(f"{cut:.4g}") for cut in found]


def rounds(text: str) -> int:
    """What `--rounds` says; one is enough for a result. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def versions() -> dict[str, str]:
    """Of every package that is measured; without those that are not installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def head(bench: str, rounds: int) -> dict[str, Any]:
    """The first fields of a result."""
    return {
        "bench": bench, "machine": machine.describe(), "versions": versions(), "rounds": rounds
    }  # fmt: skip


def publish(result: dict[str, Any], samples: list[dict[str, Any]], table: str, save: str) -> None:
    """Prints the table if there is one, then the result as one JSON line; keeps the raw samples in
    the file `save`, if named."""
    if save:
        Path(save).write_text(json.dumps({**result, "samples": samples}, indent=1) + "\n")
    if table:
        print(table)
    print(json.dumps(result))
