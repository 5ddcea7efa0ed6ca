"""The `baton` command: run a cluster, talk to it, look at it.

With `--json` the last line of standard output is one JSON object. Errors are one line on standard
error and exit status 1; a wrong option is status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from google.protobuf.json_format import MessageToDict

from baton import keys
from baton.client import Client, ClientError, GenerateOptions, Unreachable
from baton.cluster import ClusterSpec, default_run_dir
from baton.handle import SupervisorHandle, read_state, scale, stop_supervisor
from baton.v1 import cluster_pb2, inference_pb2
from services.ops import config, lifecycle, log
from services.ops.errors import BatonError, ConfigError

DEFAULT_ADDRESS = "127.0.0.1:50051"
ELSEWHERE = {"chaos": "break a cluster on purpose and check that no stream notices",
             "bench": "measure a cluster",
             "accuracy": "what a weight format costs in perplexity"}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; gives the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in ELSEWHERE:
        module = importlib.import_module(f"baton.{arguments[0]}")
        return int(module.main(arguments[1:]))
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except Unreachable as error:
        hint = "" if _keys_dir(options) else "; has its cluster keys? --keys-dir names them"
        where = _address(options)
        print(f"baton: nobody serves at {where} ({error.message}){hint}", file=sys.stderr)
    except (BatonError, ClientError) as error:
        print(f"baton: {error.message}", file=sys.stderr)
    except (TimeoutError, BrokenPipeError) as error:
        print(f"baton: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton", description="LLM serving that survives.")
    commands = parser.add_subparsers(required=True, metavar="command")
    up = commands.add_parser("up", help="run a cluster on this machine", allow_abbrev=False)
    up.set_defaults(command=_up)
    up.add_argument("--detach", action="store_true", help="return once the cluster is ready")
    up.add_argument("--json", action="store_true", help="print the state as one JSON object")
    _add_spec_options(up)
    _add_generate(commands.add_parser("generate", help="stream a completion"))
    status = commands.add_parser("status", help="show who is there and what they hold")
    status.set_defaults(command=_status)
    status.add_argument("--json", action="store_true", help="print one JSON object")
    _add_where(status)
    down = commands.add_parser("down", help="end the cluster of a run directory")
    down.set_defaults(command=_down)
    down.add_argument("--json", action="store_true", help="print one JSON object")
    down.add_argument("--run-dir", default=default_run_dir(), help="(default: %(default)s)")
    scaling = commands.add_parser("scale", help="run another number of decodes")
    scaling.set_defaults(command=_scale)
    scaling.add_argument("--decode", type=int, required=True, help="how many")
    scaling.add_argument("--json", action="store_true", help="print the state as one JSON object")
    scaling.add_argument("--run-dir", default=default_run_dir(), help="(default: %(default)s)")
    making = commands.add_parser("keys", help="make a cluster's keys", allow_abbrev=False)
    making.set_defaults(command=keys.command)
    keys.add_options(making)
    for name, text in ELSEWHERE.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


# --- up, scale, down -------------------------------------------------------------------------------


def _add_spec_options(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(ClusterSpec):
        text = f"{field.metadata['help']} (default: {field.default!r})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text.replace("%", "%%"))


def _spec(options: argparse.Namespace) -> ClusterSpec:
    """The spec of the options given; BATON_ variables count where an option is silent."""
    names = [field.name for field in dataclasses.fields(ClusterSpec)]
    pairs = [(name, getattr(options, name)) for name in names]
    arguments = [f"--{n.replace('_', '-')}={value}" for n, value in pairs if value is not None]
    return config.load(ClusterSpec, arguments)


def _up(options: argparse.Namespace) -> int:
    from baton.supervisor import supervise  # only the foreground needs it

    spec = _spec(options)
    if (state := read_state(spec.run_dir)) is not None:
        raise ConfigError(f"run_dir: a cluster is running in {spec.run_dir}, pid {state['pid']}")
    if options.detach:
        _show_up(SupervisorHandle.start(spec, detach=True).state(), options.json)
        return 0
    log.configure("supervisor", spec.log_level)
    return lifecycle.run(lambda: supervise(spec, lambda state: _show_up(state, options.json)))


def _show_up(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(state), flush=True)
        return
    for entry in state["processes"]:
        print(f"  {entry['name']:<12} pid {entry['pid']}")
    if state["address"]:
        print(f"baton serves at {state['address']}", flush=True)
    else:
        print(f"joined the scheduler at {state['scheduler']}", flush=True)


def _down(options: argparse.Namespace) -> int:
    state = read_state(options.run_dir)
    if state is not None:
        stop_supervisor(state)
    if options.json:
        print(json.dumps({"run_dir": options.run_dir, "was_running": state is not None}))
    elif state is None:
        print(f"no cluster in {options.run_dir}")
    return 0


def _scale(options: argparse.Namespace) -> int:
    if options.decode < 1:
        raise ConfigError(f"decode: {options.decode} is less than 1")
    _show_up(scale(options.run_dir, options.decode), options.json)
    return 0


# --- generate ------------------------------------------------------------------------------------


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", default=default_run_dir(), help="(default: %(default)s)")
    parser.add_argument("--address", help="(default: BATON_ADDRESS, else the run directory's)")
    parser.add_argument("--keys-dir", help="(default: BATON_KEYS_DIR, else the run directory's)")


def _address(options: argparse.Namespace) -> str:
    state = read_state(options.run_dir) or {}
    chosen = options.address or os.environ.get("BATON_ADDRESS") or state.get("address")
    return chosen or DEFAULT_ADDRESS


def _keys_dir(options: argparse.Namespace) -> str:
    """Where the keys lie; empty for a plain cluster."""
    given: str | None = options.keys_dir
    if given is None:
        given = os.environ.get("BATON_KEYS_DIR")
    if given is not None:
        return given
    state = read_state(options.run_dir) or {}
    return state["keys_dir"] if state.get("address") == _address(options) else ""


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_generate)
    parser.add_argument("prompt", help="the text to go on from; - reads standard input")
    parser.add_argument("--request-id", help="(default: drawn)")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="may be given again")
    parser.add_argument("--ignore-eos", action="store_true", default=None)
    parser.add_argument("--logprobs", action="store_true", default=None)
    parser.add_argument("--timeout-s", type=float, help="for the whole stream")
    parser.add_argument("--retry-s", type=float, default=5.0, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="events as JSON lines, then a summary")
    _add_where(parser)


def _generate(options: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    wanted = {name: getattr(options, name, None) for name in GenerateOptions.__annotations__}
    given = cast(GenerateOptions, {k: v for k, v in wanted.items() if v not in (None, [])})
    last = inference_pb2.GenerateEvent()
    tokens: list[inference_pb2.TokenEvent] = []
    with Client(_address(options), retry_s=options.retry_s, keys_dir=_keys_dir(options)) as client:
        for event in client.generate(prompt, timeout_s=options.timeout_s, **given):
            last = event
            if event.HasField("token"):
                tokens.append(event.token)
            _show_event(event, options.json)
    if options.json:
        print(json.dumps(_summary(tokens, last)))
    return 0 if last.HasField("finished") else 1


def _show_event(event: inference_pb2.GenerateEvent, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(event)), flush=True)
    elif event.HasField("token"):
        print(event.token.text, end="", flush=True)
    else:
        print(flush=True)
        if event.HasField("failed"):
            print(f"baton: {event.failed.code}: {event.failed.message}", file=sys.stderr)


def _plain(message: Any) -> dict[str, Any]:
    """A message as a JSON object, zeros included."""
    plain: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _mend_numbers(message.DESCRIPTOR, plain)
    return plain


def _mend_numbers(descriptor: Any, plain: dict[str, Any]) -> None:
    """Makes numbers of the strings that protobuf's JSON has for 64-bit integers."""
    for field in descriptor.fields:
        value = plain.get(field.name)
        if isinstance(value, str) and field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            plain[field.name] = int(value)
        elif field.message_type is not None and value:
            for part in value if isinstance(value, list) else [value]:
                _mend_numbers(field.message_type, part)


def _summary(
    tokens: Sequence[inference_pb2.TokenEvent], last: inference_pb2.GenerateEvent
) -> dict[str, Any]:
    """What the stream came to: its text and ids, and how it ended."""
    kind = last.WhichOneof("event")
    return {
        "request_id": last.request_id,
        "text": "".join(token.text for token in tokens),
        "token_ids": [token.token_id for token in tokens],
        kind: _plain(getattr(last, kind)),
    }


# --- status --------------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    address = _address(options)
    with Client(address, keys_dir=_keys_dir(options)) as client:
        view = client.view()
    state = read_state(options.run_dir)
    if state is not None and state["address"] != address:
        state = None
    if options.json:
        print(json.dumps({"address": address, "view": _plain(view), "supervisor": state}))
        return 0
    print(f"{view.model} at {address}, scheduler pid {view.scheduler_pid}")
    _show_workers(view, state)
    _show_stores(view)
    counts = _plain(view.requests)
    print("requests: " + ", ".join(f"{name} {n}" for name, n in counts.items() if n))
    return 0


def _show_workers(view: cluster_pb2.ClusterView, state: dict[str, Any] | None) -> None:
    restarts = {e["name"]: e["restarts"] for e in state["processes"]} if state else {}
    head = f"{'worker':<14} {'host':<14} {'id':<8} {'state':<8} {'cores':<8}"
    print(f"{head} {'running':>7} {'restarts':>8}")
    for worker in view.workers:
        kind = cluster_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
        cores = ",".join(map(str, worker.cores))
        running, count = len(worker.running_requests), restarts.get(worker.name, "-")
        who = f"{worker.name:<14} {worker.host:<14} {worker.worker_id[:8]:<8}"
        print(f"{who} {kind:<8} {cores:<8} {running:>7} {count:>8}")


def _show_stores(view: cluster_pb2.ClusterView) -> None:
    print(f"{'store':<34} {'pages':>7} {'free':>7} {'open':>7} {'sealed':>7} {'cached':>7}")
    for store in view.stores:
        counts = (store.pages_total, store.pages_free, store.pages_open, store.pages_sealed)
        numbers = " ".join(f"{n:>7}" for n in (*counts, store.pages_cached))
        print(f"{store.store_id:<34} {numbers}{'' if store.reachable else '  unreachable'}")
        if notes := _store_notes(store):
            print("  " + ", ".join(notes))


def _store_notes(store: cluster_pb2.StorePages) -> list[str]:
    """What is worth a line below a store's pages: its disk, its pins, and what it has met."""
    counts = (
        "disk_blocks", "disk_bytes", "disk_hits", "disk_corrupt_files", "disk_write_failures",
        "disk_read_failures", "corrupt_cached", "corrupt_messages", "headers_repaired",
        "leases_expired", "pages_quarantined",
    )  # fmt: skip
    notes = [f"{name} {n}" for name in counts if (n := getattr(store, name))]
    if store.disk_paused:
        notes.append("not writing to disk")
    pins = [f"{pin.name} ({pin.cached_blocks} of {pin.blocks} blocks)" for pin in store.pins]
    return [*notes, f"pinned: {', '.join(pins)}"] if pins else notes


if __name__ == "__main__":
    sys.exit(main())
