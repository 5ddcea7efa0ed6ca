"""What the engine raises when a model, its weights or its numbers cannot be trusted.

Knows no transport: which gRPC or HTTP status an error becomes is decided at the edge.
"""

from __future__ import annotations


class ModelError(Exception):
    """A model directory cannot be served; the text names the file and the field or tensor."""


class NumericsError(Exception):
    """A device or a forward pass gave numbers that must not become tokens; the text says which."""
