"""Prints what the image needs from pip, one requirement per line: `run`, or `build` for the wheel.

Standard library only: the Dockerfile and `scripts/make_base_image.sh` call it before anything is
installed.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def requirements(kind: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if kind == "run":
        return list(project["project"]["dependencies"])
    # Without build isolation the backend does not fetch these two by itself.
    tools = ["cmake>=3.20", "ninja>=1.5"]
    return [*project["build-system"]["requires"], *project["dependency-groups"]["build"], *tools]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
