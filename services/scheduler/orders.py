"""What the scheduler says: each message to a store, a worker, a client or the journal, built from a
request as it stands. Pure, and without decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from baton.v1 import cluster_pb2, control_pb2, inference_pb2, journal_pb2, store_pb2
from services.scheduler.request import Phase, Request, WorkerInfo

Record = journal_pb2.JournalRecord


# --- the journal ---


def accepted(request: Request) -> Record:
    return Record(
        accepted=journal_pb2.Accepted(
            request_id=request.request_id,
            body=request.body,
            token_ids=request.prompt,
            sampling=request.sampling,
            accepted_unix_ms=request.accepted_unix_ms,
            deadline_unix_ms=request.deadline_unix_ms,
        )
    )


def placed(request: Request, **change: object) -> Record:
    """Where the request is, or, with `change`, where it is about to be."""
    fields = {
        name: getattr(request, name)
        for name in (
            "request_id", "epoch", "attempt", "prefill_worker", "decode_worker", "prefill_store",
            "decode_store",
        )
    }  # fmt: skip
    fields |= {"first_index": request.base_index, "opened": request.opened, **change}
    return Record(placed=journal_pb2.Placed(**fields))


def ended(request: Request) -> Record:
    assert request.final is not None
    record = journal_pb2.Ended(
        request_id=request.request_id,
        token_ids=[token for token, _ in request.tokens],
        logprobs=[logprob for _, logprob in request.tokens],
    )
    if request.final.HasField("finished"):
        record.finished.CopyFrom(request.final.finished)
    else:
        record.failed.CopyFrom(request.final.failed)
    return Record(ended=record)


def final_of(record: journal_pb2.Ended) -> inference_pb2.GenerateEvent:
    """The final event that an Ended record stands for."""
    event = inference_pb2.GenerateEvent(request_id=record.request_id)
    if record.HasField("finished"):
        event.finished.CopyFrom(record.finished)
    else:
        event.failed.CopyFrom(record.failed)
    return event


# --- stores ---


def open_stream(
    request: Request, store: str, peers: Iterable[str] = ()
) -> store_pb2.OpenStreamRequest:  # fmt: skip
    """Pages for prompt and answer in decode's store; for the prompt alone in prefill's, if that is
    another. In decode's store the ingest socket then writes for prefill. `peers`: where prefill's
    store may find blocks of the prefix that it lacks."""
    here = store == request.decode_store
    together = request.prefill_store == request.decode_store
    return store_pb2.OpenStreamRequest(
        request_id=request.request_id,
        token_ids=request.prompt + [token for token, _ in request.tokens],
        max_new_tokens=request.sampling.max_tokens - request.base_index if here else 0,
        epoch=request.epoch,
        attempt=request.attempt,
        prefill_writer=request.prefill_worker if together or not here else "",
        decode_writer=request.decode_worker if here else "",
        tenant=request.body.tenant,
        bypass_cache=request.fresh_kv,
        first_index=request.base_index,
        peers=peers if store == request.prefill_store and not request.fresh_kv else (),
    )


def reassign(
    request: Request, role: str, epoch: int, writer: str, store: str
) -> store_pb2.ReassignRequest:
    """`role` is prefill or decode."""
    number = store_pb2.WRITER_ROLE_PREFILL if role == "prefill" else store_pb2.WRITER_ROLE_DECODE
    message = store_pb2.ReassignRequest(
        request_id=request.request_id, role=number, epoch=epoch, writer=writer
    )
    damage = request.damage
    if damage is None or damage.found_by != role:
        return message
    if store == damage.store:
        message.repair_blocks.extend(damage.blocks)
    if damage.resume_at is not None:
        message.resume_at = damage.resume_at
    return message


def role_of(message: store_pb2.ReassignRequest) -> str:
    return "prefill" if message.role == store_pb2.WRITER_ROLE_PREFILL else "decode"


# --- workers ---


def prepare_decode(request: Request, report_from: int) -> control_pb2.WorkerCommand:
    return control_pb2.WorkerCommand(
        decode=control_pb2.PrepareDecode(
            request_id=request.request_id,
            slot=request.slots[request.decode_store],
            epoch=request.epoch,
            sampling=request.sampling,
            report_from=report_from,
        )
    )


def execute_prefill(
    request: Request, announce: str, ingest: Mapping[str, str]
) -> control_pb2.WorkerCommand:
    """`announce` is the decode to wake; `ingest` gives each store's socket for pages."""
    command = control_pb2.ExecutePrefill(
        request_id=request.request_id,
        slot=request.slots[request.prefill_store],
        attempt=request.attempt,
        sampling=request.sampling,
        announce_address=announce,
    )
    if request.prefill_store != request.decode_store:
        command.ingest_address = ingest.get(request.decode_store, "")
        command.source_address = ingest.get(request.prefill_store, "")
        command.remote_slot = request.slots[request.decode_store]
        command.remote_tokens = request.cached[request.decode_store]
        command.remote_attempt = request.attempt
    return control_pb2.WorkerCommand(prefill=command)


def move_announcements(request: Request, announce: str) -> control_pb2.WorkerCommand:
    return control_pb2.WorkerCommand(
        move=control_pb2.MoveAnnouncements(request_id=request.request_id, announce_address=announce)
    )


def stop(request_id: str, epoch: int) -> control_pb2.WorkerCommand:
    return control_pb2.WorkerCommand(
        stop=control_pb2.StopRequest(request_id=request_id, epoch=epoch)
    )


# --- whoever looks ---


def worker_view(info: WorkerInfo, requests: Iterable[Request]) -> cluster_pb2.Worker:
    """A worker with the requests it is working on."""
    worker = cluster_pb2.Worker()
    worker.CopyFrom(info.worker)
    del worker.running_requests[:]
    for request in requests:
        decodes = info.worker_id == request.decode_worker
        prefills = info.worker_id == request.prefill_worker and not request.prefill_done
        if request.phase is Phase.RUNNING and (decodes or prefills):
            worker.running_requests.append(request.request_id)
    return worker
