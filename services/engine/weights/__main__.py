"""`python -m services.engine.weights`: packs a model's weights into the cache, unless they lie there.

Prints the numerics class that a cluster over them is told, as `cpu/int4`. What `baton up` runs before it
starts workers; run it where workers are started one by one, or on a machine that is being prepared.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from services.engine.checkpoint import load_weights
from services.engine.errors import ModelError
from services.engine.load import Weights, packed_weights
from services.engine.model import ModelConfig
from services.engine.weights.names import AS_IS, weights_class
from services.ops import config, log
from services.ops.config import option
from services.ops.errors import BatonError, ConfigError


@dataclass(frozen=True)
class PackConfig:
    """Packs a model's weights into the cache."""

    model: str = option("models/pico", "Hugging Face directory")
    weights: str = option("int8", "bf16, int8 or int4")
    weights_cache: str = option("", "packed weights; empty: in XDG_CACHE_HOME/baton")
    log_level: str = option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        weights_class(self.weights)
        if self.weights == AS_IS:
            raise ConfigError("weights: as-is is not packed")


def main() -> int:
    try:
        settings = config.load(PackConfig)
        log.configure("weights", settings.log_level)
        model = ModelConfig.load(settings.model)
        views = load_weights(settings.model, model)
        packed_weights(
            settings.model, model, views, Weights(settings.weights, settings.weights_cache)
        )
    except BatonError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr)
        return 2
    except ModelError as error:
        print(f"ModelError: {error}", file=sys.stderr)
        return 2
    print(f"cpu/{settings.weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
