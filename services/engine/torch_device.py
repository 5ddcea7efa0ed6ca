"""What a torch device is, as far as bits are concerned: its numerics class, its tile, its settings.

    python -m services.engine.torch_device --device=cuda

prints the class of this machine's device, which is what every process of a cluster is told as
`prefill_device`. Run it on the cores that prefill will have: they decide torch's threads. Knows no
model and no pages.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch

from services.ops import config
from services.ops.config import option
from services.ops.errors import ConfigError

CPU_TILE_ROWS = 16
# One launch for a whole chunk of prefill (256 tokens): a product of 16 rows leaves an accelerator
# idle, and the launches would cost more than the arithmetic.
ACCELERATOR_TILE_ROWS = 256


def tile_rows(device: torch.device) -> int:
    """How many rows every product has on this device, padded where there are fewer."""
    return CPU_TILE_ROWS if device.type == "cpu" else ACCELERATOR_TILE_ROWS


def make_exact(device: torch.device) -> None:
    """Settings of this process under which equal inputs give equal bits, run after run.

    For torch as a whole: float32 products in float32 and not in TF32, sums of half-precision
    products in float32, no kernel that adds in an order of its own. On a CPU torch has none of
    these liberties, and nothing is set.
    """
    if device.type == "cpu":
        return
    # cuBLAS may choose another kernel when its workspace is short; it reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(True)


def numerics_class(device: torch.device, compute_dtype: str, tile: int) -> str:
    """What decides a device's bits, as `torch-2.13.0/cpu-avx512-1t/float32/tile16`.

    Torch's version, the device's kernels, the dtype of the products and the rows of one.
    """
    version = torch.__version__.partition("+")[0]
    return "/".join((f"torch-{version}", _device_class(device), compute_dtype, f"tile{tile}"))


def _device_class(device: torch.device) -> str:
    """The accelerator and its libraries' version, or a CPU's instruction set and threads.

    On a CPU the thread count counts: for some odd shapes it changes how a product is split.
    """
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability().lower()
        return f"cpu-{capability}-{torch.get_num_threads()}t"
    libraries = torch.version.cuda or torch.version.hip if device.type == "cuda" else ""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    model = f"-{name(device)}" if name else ""
    return f"{device.type}{libraries or ''}{model}".replace(" ", "-")


def parse_device(name: str) -> torch.device:
    """`cuda`, `cuda:1`, `torch-cpu`. Raises ConfigError when torch does not know or have it."""
    try:
        device = torch.device(name.removeprefix("torch-"))
        if device.type != "cpu":
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: torch cannot use {name!r} here: {reason}") from error
    return device


@dataclass(frozen=True)
class DeviceConfig:
    """Prints the numerics class of a torch device on this machine."""

    device: str = option("torch-cpu", "a torch device: cuda, xpu, npu, torch-cpu")


def main() -> int:
    try:
        device = parse_device(config.load(DeviceConfig).device)
    except ConfigError as error:
        print(f"ConfigError: {error.message}", file=sys.stderr)
        return 2
    print(numerics_class(device, "float32", tile_rows(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
