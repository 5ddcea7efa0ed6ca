"""What a client may ask and what it is told: over the wire, against real processes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.client import Client
from baton.handle import SupervisorHandle, wait_until
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc
from services.engine.reference import Reference
from tests.integration.conftest import StartCluster

pytestmark = pytest.mark.processes

CANCELLED = pb.FINISH_REASON_CANCELLED


@pytest.fixture
def shm(start_cluster: StartCluster) -> SupervisorHandle:
    return start_cluster(medium="shm", decode=2)


@pytest.fixture
def channel(shm: SupervisorHandle) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(shm.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def client(shm: SupervisorHandle) -> Iterator[Client]:
    with Client(shm.address) as client:
        yield client


def request(**fields: object) -> pb.GenerateRequest:
    """A good request; `fields` replace its parts."""
    sampling = fields.pop("sampling", {})
    good: dict[str, object] = {"request_id": uuid.uuid4().hex, "text": "import os\n"}
    return pb.GenerateRequest(
        **{**good, **fields},
        sampling=pb.SamplingParams(**{"max_tokens": 4, **sampling}),  # type: ignore[dict-item]
    )


def tokens(count: int, largest: int = 7) -> pb.TokenIds:
    return pb.TokenIds(ids=[largest] * count)


BAD = {
    "request_id": [{"request_id": ""}, {"request_id": "a b"}, {"request_id": "x" * 129}],
    "prompt": [{"text": None}],
    "text": [{"text": ""}, {"text": "x" * 1_000_000}],
    "token_ids": [
        {"text": None, "token_ids": tokens(0)},
        {"text": None, "token_ids": tokens(3, 1 << 30)},
        {"text": None, "token_ids": tokens(2048)},
    ],
    "model": [{"model": "gpt-5"}],
    "max_tokens": [
        {"sampling": {"max_tokens": 0}},
        {"sampling": {"max_tokens": 1 << 20}},
        {"text": None, "token_ids": tokens(2046), "sampling": {"max_tokens": 4}},
    ],
    "temperature": [{"sampling": {"temperature": t}} for t in (-1, 11, float("nan"), float("inf"))],
    "top_p": [{"sampling": {"top_p": p}} for p in (0, 1.5, -1, float("nan"))],
    "min_p": [{"sampling": {"min_p": p}} for p in (1, -0.1, float("nan"))],
    "stop": [{"sampling": {"stop": [""]}}, {"sampling": {"stop": ["x"] * 9}}],
    "stop_token_ids": [{"sampling": {"stop_token_ids": [1 << 30]}}],
    "tenant": [{"tenant": "t" * 65}],
}


@pytest.mark.parametrize(
    ("field", "change"), [(f, c) for f, changes in BAD.items() for c in changes], ids=str
)
def test_a_bad_field_is_refused_by_name(
    stub: inference_pb2_grpc.InferenceStub, client: Client, field: str, change: dict[str, object]
) -> None:
    """INVALID_ARGUMENT names the field, and no page has been touched."""
    before = client.view().stores[0].pages_free
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Generate(request(**change), timeout=10))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(f"{field}:")
    assert client.view().stores[0].pages_free == before


def test_more_than_a_message_may_hold_is_refused(stub: inference_pb2_grpc.InferenceStub) -> None:
    """A request over the message limit never reaches the scheduler's mind."""
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Generate(request(text="x" * (20 << 20)), timeout=10))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unknown_request_is_not_found(stub: inference_pb2_grpc.InferenceStub) -> None:
    """Resume and Cancel of an id nobody has used."""
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Resume(pb.ResumeRequest(request_id="nobody"), timeout=10))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as refused:
        stub.Cancel(pb.CancelRequest(request_id="nobody"), timeout=10)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_the_same_id_with_the_same_body_attaches(stub: inference_pb2_grpc.InferenceStub) -> None:
    """The second call gives the same events; nothing is generated twice."""
    ask = request(sampling={"temperature": 1.0, "max_tokens": 20})
    first = list(stub.Generate(ask, timeout=10))
    again = list(stub.Generate(ask, timeout=10))
    assert first == again
    tail = list(stub.Resume(pb.ResumeRequest(request_id=ask.request_id, from_index=5), timeout=10))
    assert tail == first[5:]


def test_the_same_id_with_another_body_is_refused(stub: inference_pb2_grpc.InferenceStub) -> None:
    """ALREADY_EXISTS, and the first request is not disturbed."""
    ask = request()
    list(stub.Generate(ask, timeout=10))
    other = request(request_id=ask.request_id, text="another")
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.Generate(other, timeout=10))
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS


def test_a_finished_request_is_forgotten_after_retain_ms(
    stub: inference_pb2_grpc.InferenceStub,
) -> None:
    """With retain_ms 0 the id is free again at once."""
    ask = request(retain_ms=0)
    list(stub.Generate(ask, timeout=10))

    def forgotten() -> bool:
        try:
            list(stub.Resume(pb.ResumeRequest(request_id=ask.request_id), timeout=10))
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.NOT_FOUND
        return False

    wait_until(forgotten, 5, "the request to be forgotten")


def test_finish_reasons(client: Client, reference: Reference) -> None:
    """LENGTH at max_tokens; STOP at a stop token, which is emitted; STOP at a stop string, which
    is not."""
    expected = reference.answer({"text": "import os\n", "max_tokens": 40, "ignore_eos": True})
    ids, text = expected["token_ids"], expected["text"]
    *_, last = client.generate("import os\n", max_tokens=40, ignore_eos=True)
    assert last.finished.reason == pb.FINISH_REASON_LENGTH
    assert last.finished.usage.completion_tokens == 40

    *events, last = client.generate("import os\n", max_tokens=40, stop_token_ids=[ids[7]])
    cut = ids.index(ids[7]) + 1
    assert [e.token.token_id for e in events] == ids[:cut]
    assert last.finished.reason == pb.FINISH_REASON_STOP

    stop = text[9:13]
    *events, last = client.generate("import os\n", max_tokens=40, stop=[stop], ignore_eos=True)
    assert "".join(e.token.text for e in events) == text[: text.index(stop)]
    assert last.finished.reason == pb.FINISH_REASON_STOP


def test_text_pieces_join_to_the_whole(client: Client, reference: Reference) -> None:
    """The pieces of text are the decoded tokens, characters of several tokens included."""
    ask = {"text": "naïve café – ", "max_tokens": 60, "ignore_eos": True}
    whole = reference.answer({**ask, "temperature": 1.5, "seed": 5})["text"]
    events = client.generate(
        "naïve café – ", max_tokens=60, ignore_eos=True, temperature=1.5, seed=5
    )
    text = "".join(e.token.text for e in events)
    assert text.rstrip("\ufffd") == whole.rstrip("\ufffd")


def test_logprobs(client: Client) -> None:
    """Asked for, each token carries its log probability; else none does."""
    *events, _ = client.generate("import os\n", max_tokens=5, logprobs=True)
    assert all(e.token.HasField("logprob") and e.token.logprob <= 0 for e in events)
    *events, _ = client.generate("import os\n", max_tokens=5)
    assert not any(e.token.HasField("logprob") for e in events)


def at_rest(client: Client) -> bool:
    view = client.view()
    return view.requests.running == 0 and all(
        store.streams == store.pages_open == store.pages_sealed == store.pages_quarantined == 0
        for store in view.stores
    )


def test_cancel(client: Client) -> None:
    """Cancel ends the stream with one CANCELLED, and its pages come back."""
    request_id = uuid.uuid4().hex
    events = client.generate("import os\n", request_id=request_id, max_tokens=1500, ignore_eos=True)
    assert next(events).HasField("token")
    assert client.cancel(request_id)
    finals = [e for e in events if not e.HasField("token")]
    assert [e.finished.reason for e in finals] == [CANCELLED]
    assert not client.cancel(request_id)
    wait_until(lambda: at_rest(client), 5, "the pages to come back")


@pytest.mark.parametrize("orphan_ms", [0, 300])
def test_a_stream_without_a_reader_is_cancelled(
    client: Client, stub: inference_pb2_grpc.InferenceStub, orphan_ms: int
) -> None:
    """After orphan_ms, not before; a resumer finds what had been generated and the end."""
    ask = request(orphan_ms=orphan_ms, sampling={"max_tokens": 1900, "ignore_eos": True})
    call = stub.Generate(ask, timeout=30)
    next(call)
    call.cancel()
    left_at = time.monotonic()
    wait_until(lambda: at_rest(client), 10, "the orphan to end")
    assert time.monotonic() - left_at >= orphan_ms / 1000 or not orphan_ms
    *_, last = stub.Resume(pb.ResumeRequest(request_id=ask.request_id), timeout=10)
    assert last.finished.reason == CANCELLED


def test_the_deadline_is_honoured(client: Client, stub: inference_pb2_grpc.InferenceStub) -> None:
    """A call past its deadline ends for the client, and the work behind it ends too."""
    ask = request(sampling={"max_tokens": 2000, "ignore_eos": True})
    with pytest.raises(grpc.RpcError) as ended:
        list(stub.Generate(ask, timeout=0.3))
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: at_rest(client), 3, "the work behind it to end")


def test_an_arena_too_small_for_a_request_says_so(start_cluster: StartCluster) -> None:
    """What can never fit is refused; what fits next to it waits its turn."""
    small = start_cluster(decode=1, arena_bytes=6 << 20)
    with Client(small.address) as client:
        *_, last = client.generate([5] * 2000, max_tokens=40, ignore_eos=True)
        assert last.failed.code == "OUT_OF_RANGE"
        assert not last.failed.retryable
        assert last.failed.story
        streams = [
            client.generate([5 + i] * 300, max_tokens=200, ignore_eos=True) for i in range(6)
        ]
        finals = [list(stream)[-1] for stream in streams]
        assert {f.finished.reason for f in finals} == {pb.FINISH_REASON_LENGTH}
        wait_until(lambda: at_rest(client), 5, "the pages to come back")


def test_models_health_and_reflection(channel: grpc.Channel, client: Client) -> None:
    """What other tools look for is there."""
    [model] = client.models()
    assert (model.id, model.architecture) == ("pico", "LlamaForCausalLM")
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "baton.v1.Inference", "baton.v1.Cluster"):
        status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    answer = next(reflect.ServerReflectionInfo(asked, timeout=5))
    names = {service.name for service in answer.list_services_response.service}
    assert {"baton.v1.Inference", "baton.v1.Cluster"} <= names


def test_prefill_and_decode_share_no_core(client: Client) -> None:
    """Affinity masks are disjoint, as the kernel reports them."""
    workers = client.view().workers
    cores = {role: {c for w in workers if w.role == role for c in w.cores} for role in (1, 2)}
    assert not cores[1] & cores[2]
    assert len({w.pid for w in workers} | {client.view().scheduler_pid}) == 4
