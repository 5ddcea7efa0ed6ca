"""What the formats are called: in options, in a numerics class and in the name of a packed file.

Apart from `formats.py` so that who only hands an option on need not import numpy.
"""

from __future__ import annotations

from services.ops.errors import ConfigError

AS_IS = "as-is"
FORMATS = (AS_IS, "bf16", "int8", "int4")
ROUNDING_VERSION = 2  # raise it when the same weights give other codes


def weights_class(format: str) -> str:
    """What a format adds to a numerics class: nothing for the checkpoint's own weights.

    Raises ConfigError for a name that is no format.
    """
    if format not in FORMATS:
        raise ConfigError(f"weights: {format!r} is not one of {', '.join(FORMATS)}")
    if format == AS_IS:
        return ""
    return format if format == "bf16" else f"{format}-{ROUNDING_VERSION}"
