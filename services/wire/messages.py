"""Between protocol messages and what the engine takes."""

from __future__ import annotations

from baton.v1 import control_pb2, inference_pb2
from services.engine.sampling import SamplingParams
from services.ops.errors import BatonError, CorruptKv


def sampling_params(message: control_pb2.ResolvedSampling) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        logprobs=message.logprobs,
    )


def refusal(request_id: str, epoch: int, error: BatonError) -> control_pb2.WorkerEvent:
    """A worker's word that it cannot go on, and why."""
    refused = control_pb2.Refused(
        request_id=request_id, epoch=epoch, code=error.code, message=error.message
    )
    if isinstance(error, CorruptKv):
        refused.bad_blocks.extend(error.blocks)
        refused.irreparable = error.irreparable
        if error.resume_at is not None:
            refused.resume_at = error.resume_at
    return control_pb2.WorkerEvent(refused=refused)


def finish_reason(
    token_id: int, index: int, sampling: control_pb2.ResolvedSampling
) -> inference_pb2.FinishReason:
    """How the stream ends with this token; UNSPECIFIED when it goes on.

    The same for every process, so a stream whose end nobody has reported can be told from its tokens.
    """
    if token_id in sampling.stop_token_ids:
        return inference_pb2.FINISH_REASON_STOP
    if index + 1 >= sampling.max_tokens:
        return inference_pb2.FINISH_REASON_LENGTH
    return inference_pb2.FINISH_REASON_UNSPECIFIED
