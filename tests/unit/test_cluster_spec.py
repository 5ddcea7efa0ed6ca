"""From one spec to command lines: names, sockets, arenas and cores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.cluster import ClusterSpec, ProcessSpec, default_run_dir, processes
from services.decode.config import DecodeConfig
from services.kv_store.config import KvStoreConfig
from services.ops.config import as_arguments, load
from services.ops.errors import ConfigError
from services.prefill.config import PrefillConfig
from services.scheduler.config import SchedulerConfig

CONFIGS = {
    "kv-store": KvStoreConfig,
    "scheduler": SchedulerConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
}
SPEC = ClusterSpec(run_dir="/run/b", model="/models/m", cpus=(0, 1, 2))


def parsed(spec: ClusterSpec) -> dict[str, object]:
    """What each process will be configured with, by name."""
    return {p.name: load(CONFIGS[p.role], p.argv[3:], {}) for p in processes(spec)}


def named(spec: ClusterSpec, name: str) -> ProcessSpec:
    return next(p for p in processes(spec) if p.name == name)


def test_one_arena_for_all_in_shared_memory() -> None:
    """With medium shm there is one store, and every worker maps its arena."""
    made = parsed(SPEC)
    assert list(made) == ["kv-store-0", "scheduler", "prefill-0", "decode-0", "decode-1"]
    arenas = {c.arena_dir for name, c in made.items() if name != "scheduler"}  # type: ignore[attr-defined]
    assert arenas == {SPEC.arena_dir(0)}
    assert SPEC.arena_dir(0).startswith("/dev/shm/baton-")


def test_two_arenas_over_zmq() -> None:
    """With medium zmq prefill and decode have an arena each; the scheduler knows both stores."""
    made = parsed(replace(SPEC, medium="zmq"))
    prefill, decode = made["prefill-0"], made["decode-1"]
    scheduler = made["scheduler"]
    assert isinstance(prefill, PrefillConfig)
    assert isinstance(decode, DecodeConfig)
    assert isinstance(scheduler, SchedulerConfig)
    assert prefill.arena_dir == SPEC.arena_dir(0)
    assert decode.arena_dir == SPEC.arena_dir(1)
    assert scheduler.stores == ("unix:/run/b/kv-store-0.sock", "unix:/run/b/kv-store-1.sock")


def test_workers_dial_the_scheduler_s_control_socket() -> None:
    """Internal addresses are unix sockets below run_dir, the same on both sides."""
    made = parsed(SPEC)
    control = "unix:/run/b/scheduler.sock"
    scheduler, prefill, decode = made["scheduler"], made["prefill-0"], made["decode-0"]
    assert isinstance(scheduler, SchedulerConfig)
    assert isinstance(prefill, PrefillConfig)
    assert isinstance(decode, DecodeConfig)
    assert scheduler.control_listen == prefill.scheduler == decode.scheduler == control


def test_prefill_has_the_first_core_and_the_others_share_the_rest() -> None:
    """No core is in both sets; ZeroMQ's thread runs on a core of the decode side."""
    made = parsed(SPEC)
    prefill = made["prefill-0"]
    assert isinstance(prefill, PrefillConfig)
    assert (prefill.cores, prefill.io_core) == ((0,), 1)
    others = {c.cores for name, c in made.items() if name != "prefill-0"}  # type: ignore[attr-defined]
    assert others == {(1, 2)}


def test_cores_that_are_asked_for_are_used() -> None:
    """Both sets can be given, and decode's complement follows prefill's."""
    assert replace(SPEC, prefill_cores=(2,)).cores() == ((2,), (0, 1))
    assert replace(SPEC, prefill_cores=(2,), decode_cores=(0,)).cores() == ((2,), (0,))


def test_a_single_core_is_not_pinned() -> None:
    """With one core nobody is pinned, and ZeroMQ's thread goes where it likes."""
    spec = replace(SPEC, cpus=(3,))
    assert spec.cores() == ((), ())
    prefill = parsed(spec)["prefill-0"]
    assert isinstance(prefill, PrefillConfig)
    assert prefill.io_core == -1


def test_a_run_dir_too_long_for_a_socket_names_itself() -> None:
    """The kernel's limit on socket paths is a clear error and not a failed bind."""
    with pytest.raises(ConfigError, match="run_dir"):
        ClusterSpec(run_dir="/" + "x" * 95)


@pytest.mark.parametrize(
    "wrong", [{"medium": "rdma"}, {"decode": 0}, {"prefill": 0}, {"extra": ("decode",)}]
)
def test_a_bad_value_names_its_field(wrong: dict[str, object]) -> None:
    """Which option is wrong is the first word of the message."""
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}:"):
        ClusterSpec(run_dir="/run/b", **wrong)  # type: ignore[arg-type]


def test_extra_options_go_to_a_role_or_to_one_process() -> None:
    """`extra` reaches what the spec has no field for."""
    spec = replace(SPEC, extra=("decode:--batch-max=3", "decode-1:--heartbeat-ms=50"))
    first, second = parsed(spec)["decode-0"], parsed(spec)["decode-1"]
    assert isinstance(first, DecodeConfig)
    assert isinstance(second, DecodeConfig)
    assert (first.batch_max, first.heartbeat_ms) == (3, 100)
    assert (second.batch_max, second.heartbeat_ms) == (3, 50)


def test_the_caller_s_environment_does_not_configure_the_children() -> None:
    """What the command line leaves at its default stays there, whatever BATON_ variables say."""
    environ = {"BATON_LISTEN": "x", "BATON_ARENA_DIR": "y", "PATH": "/bin"}
    env = named(SPEC, "decode-0").environment(environ)
    assert env == {"PATH": "/bin", "TMPDIR": "/run/b", "BATON_NAME": "decode-0"} | {
        "BATON_LISTEN": "x"  # not an option of decode
    }


def test_a_spec_survives_its_own_command_line() -> None:
    """What a supervisor is started with gives the same spec back."""
    spec = replace(SPEC, medium="zmq", unsafe=("a", "b"), extra=("prefill:--chunk-tokens=128",))
    assert load(ClusterSpec, as_arguments(spec), {}) == spec


def test_the_default_run_dir_is_the_user_s() -> None:
    """BATON_RUN_DIR, else below XDG_RUNTIME_DIR, else in /tmp with the user's number."""
    assert default_run_dir({"BATON_RUN_DIR": "/b", "XDG_RUNTIME_DIR": "/run/user/7"}) == "/b"
    assert default_run_dir({"XDG_RUNTIME_DIR": "/run/user/7"}) == "/run/user/7/baton"
    assert default_run_dir({}).startswith("/tmp/baton-")
