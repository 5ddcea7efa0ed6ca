"""From recorded moments to what a client is told about its request's time. Pure."""

from __future__ import annotations

from baton.v1 import inference_pb2
from services.scheduler.request import Request


def transfer_ms(request: Request) -> tuple[float, float]:
    """(summed, exposed) transfer time in milliseconds.

    Summed: from each piece's K and V ready in prefill's memory until decode had verified it. Exposed:
    from the last layer's K and V ready until the stream was runnable.
    """
    total = 0.0
    for piece in request.ready:
        done = [
            v.at for v in request.verified if v.group == piece.group and v.tokens >= piece.tokens
        ]
        if done:
            total += max(0.0, min(done) - piece.at)
    exposed = 0.0
    if request.verified and request.last_layer_at:
        exposed = max(0.0, max(v.at for v in request.verified) - request.last_layer_at)
    return total * 1e3, exposed * 1e3


def timing(request: Request, now: float, prefill: str, decode: str) -> inference_pb2.Timing:
    """The Timing of a request that ends now; worker names for people."""
    total, exposed = transfer_ms(request)
    after_first = max(0, len(request.tokens) - 1)
    spent = request.last_token_at - request.first_token_at
    return inference_pb2.Timing(
        queue_ms=max(0.0, request.dispatched_at - request.accepted_at) * 1e3,
        ttft_ms=max(0.0, request.first_token_at - request.accepted_at) * 1e3,
        tpot_ms=spent / after_first * 1e3 if after_first else 0.0,
        total_ms=(now - request.accepted_at) * 1e3, kv_bytes=request.kv_bytes,
        transfer_ms=total, exposed_transfer_ms=exposed, prefill_worker=prefill,
        decode_worker=decode, takeovers=request.takeovers, stall_ms=request.stall_s * 1e3,
    )  # fmt: skip


def usage(request: Request) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=len(request.prompt), cached_tokens=request.cached_tokens,
        completion_tokens=len(request.tokens), recomputed_tokens=request.recomputed,
    )  # fmt: skip
