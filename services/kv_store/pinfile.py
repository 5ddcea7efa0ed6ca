"""Pins on disk, so that a store that starts anew, in another arena too, keeps them. Blocking I/O of a
few kilobytes; a file that cannot be read is no pins, and logged."""

from __future__ import annotations

import json
from pathlib import Path

from services.kv_store.pins import PinTable
from services.ops import log
from services.ops.errors import BatonError

_logger = log.get("pins")


def save(path: Path, fingerprint: str, pins: PinTable) -> None:
    """Replaces the file in one step. Raises OSError."""
    names = {name: [key.hex() for key in keys] for name, keys in pins.names.items()}
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps({"fingerprint": fingerprint, "pins": names}))
    unfinished.rename(path)


def load(path: Path, fingerprint: str, blocks_max: int) -> PinTable:
    """The pins of this fingerprint, as many of them as fit into `blocks_max` now."""
    pins = PinTable(blocks_max)
    if not path.exists():
        return pins
    try:
        content = json.loads(path.read_text())
        if content["fingerprint"] == fingerprint:
            for name, keys in content["pins"].items():
                pins.pin(name, [bytes.fromhex(key) for key in keys])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BatonError) as error:
        _logger.warning("pins lost", path=str(path), reason=str(error))
    return pins
