"""Installs one dependency group of pyproject.toml, under the constraints file.

pip learned `--group` only in 25.1; the pip of Debian's Python 3.11 is older.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    wanted = [requirement for name in sys.argv[1:] for requirement in groups[name]]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    return subprocess.call([*pip, *wanted])


if __name__ == "__main__":
    sys.exit(main())
