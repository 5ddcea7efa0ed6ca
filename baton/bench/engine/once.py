"""A directory that is made once: complete under its name, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def make_once(place: Path, make: Callable[[Path], None]) -> bool:
    """Has `make` fill the directory under another name, unless it is there; whether it had to."""
    if place.is_dir():
        return False
    made = place.with_name(f".making-{os.getpid()}-{place.name}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        make(made)
        made.rename(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return True
