"""A scripted Inference server in this process, for tests of those who call one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

IDS = [11, 22, 33, 44, 55, 66, 77]
Script = list[Callable[[Any], Iterator[pb.GenerateEvent]]]


def token(index: int, token_id: int | None = None, text: str = "") -> pb.GenerateEvent:
    value = IDS[index % len(IDS)] if token_id is None else token_id
    return pb.GenerateEvent(token=pb.TokenEvent(index=index, token_id=value, text=text))


def finished() -> pb.GenerateEvent:
    timing = pb.Timing(kv_bytes=1 << 40)
    return pb.GenerateEvent(
        finished=pb.Finished(reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(), timing=timing)
    )


def say(*events: pb.GenerateEvent, then: grpc.StatusCode | None = None) -> Any:
    """One call's answer: these events, then a status or a regular end."""

    def answer(context: Any) -> Iterator[pb.GenerateEvent]:
        yield from events
        if then is not None:
            context.abort(then, "scripted")

    return answer


class Scripted(inference_pb2_grpc.InferenceServicer):  # type: ignore[misc]
    """Answers the n-th call with the n-th entry of the script, and writes down what was asked."""

    def __init__(self, script: Script) -> None:
        self.script, self.asked = script, list[tuple[str, int]]()

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateEvent]:
        self.asked.append(("generate", 0))
        return self.script.pop(0)(context)

    def Resume(self, request: pb.ResumeRequest, context: Any) -> Iterator[pb.GenerateEvent]:
        self.asked.append(("resume", request.from_index))
        return self.script.pop(0)(context)


def serve(address: str, script: Script) -> tuple[Any, Scripted]:
    """A started server, which the caller stops, and what it has been asked."""
    servicer = Scripted(script)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    return server, servicer
