"""Model directories that differ from the one at hand in a few fields of config.json."""

from __future__ import annotations

import json
import os
from pathlib import Path


def model_variant(model: Path, directory: Path, **changes: int) -> Path:
    """A directory with the same files and some fields of config.json changed: what is measured does
    not depend on the sense of the text."""
    directory.mkdir(parents=True)
    for file in model.resolve().iterdir():
        if file.name != "config.json":
            os.symlink(file, directory / file.name)
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory
