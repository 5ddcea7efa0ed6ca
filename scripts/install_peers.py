"""Makes the virtual environment of the engines that `baton bench engine` compares with.

They bring a torch and a numpy of their own, so they stay out of Baton's environment. What is installed
is the group `engine-peers` of pyproject.toml, for CPU alone: pip is asked first what it would install,
and nothing is when a build for CUDA is among it. llama.cpp is compiled for the processor at hand.
"""

import argparse
import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CMAKE_ARGS = (
    "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF"
)
# vLLM names them for pictures and sound; the common index has them for CUDA's torch, and then they fail.
UNUSED = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default=str(ROOT / ".venv-peers"))
    directory = Path(parser.parse_args().directory)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"][
        "engine-peers"
    ]
    if not (directory / "bin" / "python").exists():
        venv.create(directory, with_pip=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip"]
    subprocess.check_call([*pip, "install", "--quiet", "pip>=25.1"])  # its resolver reports
    if refused := cuda(pip, wanted):
        print(f"refused, for CUDA: {', '.join(refused)}", file=sys.stderr)
        return 1
    environment = {**os.environ, "CMAKE_ARGS": os.environ.get("CMAKE_ARGS", CMAKE_ARGS)}
    subprocess.check_call([*pip, "install", "--quiet", *wanted], env=environment)
    return subprocess.call([*pip, "uninstall", "--quiet", "--yes", *UNUSED])


def cuda(pip: list[str], wanted: list[str]) -> list[str]:
    """What pip would install that is made for CUDA."""
    asked = [*pip, "install", "--dry-run", "--quiet", "--report", "-", *wanted]
    report = json.loads(subprocess.run(asked, stdout=subprocess.PIPE, check=True).stdout)
    found = [(item["metadata"]["name"], item["metadata"]["version"]) for item in report["install"]]
    return [
        f"{name} {version}" for name, version in found
        if name.startswith(("nvidia-", "cuda-")) or (name == "torch" and "+cpu" not in version)
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
