"""Which prefill and which decode a request goes to."""

from __future__ import annotations

from dataclasses import dataclass

from policies.view import ClusterView, RequestView, WorkerView


@dataclass(frozen=True)
class Placement:
    prefill: str
    decode: str


@dataclass(frozen=True)
class Hold:
    """Not now; ask again when the view has changed."""

    reason: str


def _least_loaded(workers: tuple[WorkerView, ...]) -> WorkerView:
    return min(workers, key=lambda worker: (worker.load, worker.worker_id))


@dataclass(frozen=True)
class LeastLoaded:
    """The decode with the fewest requests, then the prefill with the fewest, one that shares the
    decode's arena first: pages in place need no transfer."""

    def place(self, request: RequestView, view: ClusterView) -> Placement | Hold:
        prefills, decodes = view.of("prefill"), view.of("decode")
        if not prefills or not decodes:
            missing = "prefill" if not prefills else "decode"
            return Hold(f"no {missing} worker is ready")
        decode = _least_loaded(decodes)
        near = tuple(worker for worker in prefills if worker.store_id == decode.store_id)
        return Placement(_least_loaded(near or prefills).worker_id, decode.worker_id)

    def successor(self, view: ClusterView, store_id: str, gone: str) -> str | None:
        """Who takes over a stream whose pages lie in `store_id`; None: nobody can now."""
        able = tuple(
            worker
            for worker in view.of("decode")
            if worker.store_id == store_id and worker.worker_id != gone
        )
        return _least_loaded(able).worker_id if able else None
