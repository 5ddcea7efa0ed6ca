"""From one spec to command lines: names, sockets, arenas and cores."""

from __future__ import annotations

import os
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


def test_keys_are_for_every_process_or_for_none() -> None:
    """A relative directory is made absolute: a process need not run where the supervisor does."""
    assert {c.keys_dir for c in parsed(SPEC).values()} == {""}  # type: ignore[attr-defined]
    keyed = parsed(replace(SPEC, keys_dir="keys"))
    assert {c.keys_dir for c in keyed.values()} == {os.path.abspath("keys")}  # type: ignore[attr-defined]


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


HOST_A = replace(SPEC, advertise="10.0.0.1", host="a", roles=("kv-store", "prefill"),
                 scheduler="10.0.0.2:50052")  # fmt: skip
HOST_B = replace(SPEC, advertise="10.0.0.2", host="b", roles=("scheduler", "kv-store", "decode"),
                 remote_stores=("10.0.0.1:50061",))  # fmt: skip


def test_a_host_s_part_runs_only_its_roles_under_its_own_names() -> None:
    """Nobody's name is another's on some other host."""
    assert list(parsed(HOST_A)) == ["kv-store-0@a", "prefill-0@a"]
    assert list(parsed(HOST_B)) == ["kv-store-0@b", "scheduler@b", "decode-0@b", "decode-1@b"]


def test_what_one_host_listens_on_is_what_the_others_dial() -> None:
    """Stores, control and announcements have addresses that the other host can reach."""
    a, b = parsed(HOST_A), parsed(HOST_B)
    store, prefill, scheduler, decode = (
        a["kv-store-0@a"], a["prefill-0@a"], b["scheduler@b"], b["decode-1@b"],
    )  # fmt: skip
    assert isinstance(store, KvStoreConfig)
    assert isinstance(prefill, PrefillConfig)
    assert isinstance(scheduler, SchedulerConfig)
    assert isinstance(decode, DecodeConfig)
    assert prefill.scheduler == decode.scheduler == scheduler.control_listen == "10.0.0.2:50052"
    assert scheduler.stores == ("10.0.0.2:50061", store.listen)
    assert store.ingest_listen == store.ingest_advertise == "tcp://10.0.0.1:50062"
    assert decode.announce_advertise == "tcp://10.0.0.2:50072"
    assert prefill.host == "a"


def test_a_host_may_listen_elsewhere_than_it_is_found() -> None:
    """Behind an address translation one listens on all and advertises another address."""
    made = parsed(replace(HOST_B, bind="0.0.0.0"))
    scheduler, store = made["scheduler@b"], made["kv-store-0@b"]
    assert isinstance(scheduler, SchedulerConfig)
    assert isinstance(store, KvStoreConfig)
    assert scheduler.control_listen == "0.0.0.0:50052"
    assert store.ingest_listen == "tcp://0.0.0.0:50062"
    assert store.ingest_advertise == "tcp://10.0.0.2:50062"
    assert scheduler.stores[0] == "10.0.0.2:50061"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"roles": ("prefil",)}, "roles"),
        ({"roles": ("prefill",)}, "advertise"),
        ({"advertise": "10.0.0.1", "medium": "zmq"}, "medium"),
        ({"advertise": "10.0.0.1", "roles": ("prefill",)}, "scheduler"),
        ({"scheduler": "10.0.0.2:50052"}, "scheduler"),
        ({"advertise": "10.0.0.1", "roles": ("scheduler",)}, "remote_stores"),
        ({"advertise": "10.0.0.1", "roles": ("prefill",), "scheduler": "10.0.0.2:1",
          "remote_stores": ("10.0.0.2:2",)}, "remote_stores"),
        ({"arena": "/dev/shm/x"}, "arena"),
    ],
)  # fmt: skip
def test_a_host_that_does_not_fit_the_others_is_refused(
    change: dict[str, object], field: str
) -> None:
    """The message begins with the option to change."""
    with pytest.raises(ConfigError, match=f"^{field}: "):
        replace(SPEC, **change)  # type: ignore[arg-type]


def test_a_decode_beside_another_supervisor_s_store_maps_its_arena() -> None:
    """A container of one worker: nothing else of its host runs there."""
    spec = replace(SPEC, advertise="10.0.0.3", roles=("decode",), decode=1, host="b1",
                   scheduler="10.0.0.2:50052", arena="/dev/shm/b")  # fmt: skip
    [decode] = parsed(spec).values()
    assert isinstance(decode, DecodeConfig)
    assert decode.arena_dir == "/dev/shm/b"
