"""The supervisor's rules, tried on real processes that do nothing but live and die."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.cluster import ClusterSpec, ProcessSpec
from baton.handle import StartFailed, end_leftovers, read_state, start_time
from baton.supervisor import BACKOFF_S_MAX, Child, RestartPolicy, Supervisor, exclusive
from services.ops.errors import ConfigError

pytestmark = pytest.mark.processes

LIVE = 'import signal; print(\'READY {"address": "h:%s"}\', flush=True); signal.pause()'
IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + LIVE
CRASH = "import sys; print('no such model', file=sys.stderr); sys.exit(2)"


def process(name: str, code: str = LIVE, role: str = "decode") -> ProcessSpec:
    return ProcessSpec(name, role, (sys.executable, "-S", "-c", code))


class Watch:
    """Waits for conditions on children, woken by each change instead of by the clock."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def __call__(self) -> None:
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await self._changed.wait()
                self._changed.clear()


@asynccontextmanager
async def running(spec: ProcessSpec, tmp_path: Path) -> AsyncIterator[tuple[Child, Watch]]:
    watch = Watch()
    child = Child(spec, tmp_path / "child.log", watch)
    task = asyncio.create_task(child.run())
    try:
        await watch.until(child.ready.is_set)
        yield child, watch
    finally:
        await child.stop(task)


def test_the_first_restart_is_at_once_and_later_ones_back_off() -> None:
    """A death costs no wait; only dying again within two seconds of a start does, up to 5 s."""
    policy = RestartPolicy()
    assert [policy.delay(0.5) for _ in range(4)] == [0.0, 0.1, 0.2, 0.4]
    assert policy.delay(60.0) == 0.0
    assert policy.delay(0.5) == 0.1
    assert [policy.delay(0.5) for _ in range(20)][-1] == BACKOFF_S_MAX


def test_a_killed_child_comes_back_as_another_process(tmp_path: Path) -> None:
    """SIGKILL is noticed without polling; the new process is ready and counted."""

    async def scenario() -> None:
        async with running(process("decode-0"), tmp_path) as (child, watch):
            first = child.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            await watch.until(lambda: child.restarts == 1 and child.ready.is_set())
            assert child.pid not in (None, first)
            assert start_time(first) is None

    asyncio.run(scenario())


WAIT = "import sys; sys.stdin.readline() or sys.exit(); " + LIVE


def with_spare(name: str) -> ProcessSpec:
    spec = process(name)
    return dataclasses.replace(spec, spare=(*spec.argv[:-1], WAIT))


async def spare_of(child: Child) -> int:
    """The pid of the child's spare, once it is there."""
    assert child._keeping is not None
    await asyncio.wait_for(asyncio.shield(child._keeping), 20)
    assert child._spare is not None
    return child._spare.pid


def test_a_spare_takes_over(tmp_path: Path) -> None:
    """The process that waited is the next life, and another one waits then."""

    async def scenario() -> None:
        async with running(with_spare("decode-0"), tmp_path) as (child, watch):
            waiting = await spare_of(child)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            await watch.until(lambda: child.restarts == 1 and child.ready.is_set())
            assert child.pid == waiting
            assert await spare_of(child) != waiting

    asyncio.run(scenario())


def test_a_dead_spare_is_not_waited_for(tmp_path: Path) -> None:
    """A child whose spare was killed too starts as any other."""

    async def scenario() -> None:
        async with running(with_spare("decode-0"), tmp_path) as (child, watch):
            waiting = await spare_of(child)
            assert child._spare is not None
            os.kill(waiting, signal.SIGKILL)
            await child._spare.wait()
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            await watch.until(lambda: child.restarts == 1 and child.ready.is_set())
            assert child.pid != waiting

    asyncio.run(scenario())


def test_no_spare_outlives_its_child(tmp_path: Path) -> None:
    """Stopping ends the process and the one that waits to be the next."""

    async def scenario() -> int:
        async with running(with_spare("decode-0"), tmp_path) as (child, _):
            return await spare_of(child)

    assert start_time(asyncio.run(scenario())) is None


def test_a_child_has_its_own_process_group(tmp_path: Path) -> None:
    """A signal to the supervisor's terminal reaches the supervisor alone."""

    async def scenario() -> None:
        async with running(process("decode-0"), tmp_path) as (child, _):
            assert child.pid is not None
            assert os.getpgid(child.pid) == child.pid

    asyncio.run(scenario())


def test_a_child_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shutdown is bounded: after its time SIGKILL goes to that pid."""
    monkeypatch.setattr("baton.supervisor.STOP_S_MAX", 0.2)

    async def scenario() -> int:
        async with running(process("decode-0", IGNORE), tmp_path) as (child, _):
            assert child.pid is not None
            return child.pid

    assert start_time(asyncio.run(scenario())) is None


# --- the whole supervisor ------------------------------------------------------------------------


def plan(spec: ClusterSpec) -> list[ProcessSpec]:
    """A small cluster whose scheduler reports the port 7 when it was asked for port 0."""
    port = spec.listen.rpartition(":")[2].replace("0", "7")
    return [process("scheduler", LIVE % port, "scheduler"), process("decode-0")]


class Watched(Supervisor):
    """Tells `watch` of each change."""

    def __init__(self, spec: ClusterSpec, plan: Any) -> None:
        self.watch = Watch()
        super().__init__(spec, plan)

    def _on_change(self) -> None:
        super()._on_change()
        self.watch()


async def supervised(
    spec: ClusterSpec, body: Callable[[Supervisor, Watch], Any], plan: Any = plan
) -> Supervisor:
    """Runs a supervisor, does `body` once it is ready, stops it."""
    supervisor, stop = Watched(spec, plan), asyncio.Event()
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(supervisor.run(stop, ready.set_result))
    try:
        await asyncio.wait([ready, running], timeout=20, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            await body(supervisor, supervisor.watch)
    finally:
        stop.set()
        await running
    return supervisor


def test_the_state_file_tells_the_truth(tmp_path: Path) -> None:
    """Address, pids and restarts are those of now; after the end there is no file."""
    spec = ClusterSpec(run_dir=str(tmp_path), listen="h:0")

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        state = read_state(tmp_path)
        assert state is not None
        assert (state["pid"], state["address"], state["ready"]) == (os.getpid(), "h:7", True)
        pids = {entry["name"]: entry["pid"] for entry in state["processes"]}
        os.kill(pids["decode-0"], signal.SIGKILL)
        decode = supervisor.children[1]
        await watch.until(lambda: decode.restarts == 1 and decode.ready.is_set())
        entry = (read_state(tmp_path) or {})["processes"][1]
        assert (entry["restarts"], entry["pid"], entry["ready"]) == (1, decode.pid, True)

    asyncio.run(supervised(spec, body))
    assert read_state(tmp_path) is None
    assert not list(tmp_path.glob("*.json"))


def test_a_scheduler_that_comes_back_keeps_its_port(tmp_path: Path) -> None:
    """Port 0 is picked once; a restart listens where the clients look for it."""
    spec = ClusterSpec(run_dir=str(tmp_path), listen="h:0")

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        scheduler = supervisor.children[0]
        assert scheduler.pid is not None
        os.kill(scheduler.pid, signal.SIGKILL)
        await watch.until(lambda: scheduler.restarts == 1 and scheduler.ready.is_set())
        assert scheduler.spec == plan(ClusterSpec(run_dir=str(tmp_path), listen="h:7"))[0]
        assert supervisor.address == "h:7"

    asyncio.run(supervised(spec, body))


def test_a_process_that_gives_up_at_the_start_ends_the_cluster(tmp_path: Path) -> None:
    """A configuration that cannot work is an error with the process's own words, not a loop."""

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        raise AssertionError("was ready")

    def broken(spec: ClusterSpec) -> list[ProcessSpec]:
        return [process("decode-0"), process("decode-1", CRASH)]

    spec = ClusterSpec(run_dir=str(tmp_path))
    with pytest.raises(StartFailed, match=r"decode-1 ended with status 2:\nno such model"):
        asyncio.run(supervised(spec, body, broken))


# --- another number of decodes -------------------------------------------------------------------


def many(spec: ClusterSpec) -> list[ProcessSpec]:
    """A scheduler, and as many decodes with spares as are wanted; the fourth is a broken one."""
    good = [with_spare(f"decode-{n}") for n in range(min(spec.decode, 3))]
    bad = [process("decode-3", CRASH)] if spec.decode > 3 else []
    return [process("scheduler", LIVE % 7, "scheduler"), *good, *bad]


async def ask(supervisor: Supervisor, watch: Watch, decodes: int) -> list[str]:
    """Has it run so many; gives the names of those it runs once all are ready."""
    (supervisor.spec.path / "scale.json").write_text(json.dumps({"decode": decodes}))
    supervisor.asked.set()
    children = supervisor.children
    await watch.until(
        lambda: not supervisor.asked.is_set() and all(child.ready.is_set() for child in children)
    )
    return [child.spec.name for child in children if child.spec.role == "decode"]


def test_another_decode_comes_from_a_spare(tmp_path: Path) -> None:
    """The spare of one that runs becomes the new one; then both have a spare."""

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        first = supervisor.children[1]
        waiting = await spare_of(first)
        assert await ask(supervisor, watch, 2) == ["decode-0", "decode-1"]
        second = supervisor.children[2]
        assert second.pid == waiting
        assert waiting not in (await spare_of(first), await spare_of(second))

    asyncio.run(supervised(ClusterSpec(run_dir=str(tmp_path), decode=1), body, many))
    assert not list(tmp_path.glob("*.json"))


def test_decodes_that_are_too_many_end(tmp_path: Path) -> None:
    """The last ones go, and their spares with them; the others live on."""

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        pids = [child.pid for child in supervisor.children]
        leaving = supervisor.children[3]
        spare = await spare_of(leaving)
        ending = supervisor._tasks["decode-2"]
        assert await ask(supervisor, watch, 2) == ["decode-0", "decode-1"]
        assert [child.pid for child in supervisor.children] == pids[:3]
        await asyncio.wait_for(ending, 20)
        assert (leaving.pid, start_time(spare)) == (None, None)

    asyncio.run(supervised(ClusterSpec(run_dir=str(tmp_path), decode=3), body, many))


def test_a_decode_that_cannot_be_added_leaves_the_others_alone(tmp_path: Path) -> None:
    """It is not there, the cluster is."""

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        pids = [child.pid for child in supervisor.children]
        assert await ask(supervisor, watch, 4) == ["decode-0", "decode-1", "decode-2"]
        assert [child.pid for child in supervisor.children] == pids

    asyncio.run(supervised(ClusterSpec(run_dir=str(tmp_path), decode=3), body, many))


def test_a_spare_that_was_lent_in_vain_is_made_again(tmp_path: Path) -> None:
    """The added decode dies of its start; whose spare it was keeps another."""

    def plan(spec: ClusterSpec) -> list[ProcessSpec]:
        first = dataclasses.replace(
            process("decode-0"), spare=(sys.executable, "-S", "-c", f"input(); {CRASH}")
        )
        second = dataclasses.replace(first, name="decode-1")
        return [process("scheduler", LIVE % 7, "scheduler"), first, second][: 1 + spec.decode]

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        lent = await spare_of(supervisor.children[1])
        assert await ask(supervisor, watch, 2) == ["decode-0"]
        assert await spare_of(supervisor.children[1]) != lent

    asyncio.run(supervised(ClusterSpec(run_dir=str(tmp_path), decode=1), body, plan))


@pytest.mark.parametrize("words", [None, "", "[]", "{}", '{"decode": "many"}', '{"decode": 0}'])
def test_a_wish_that_cannot_be_read_changes_nothing(tmp_path: Path, words: str | None) -> None:
    """Whoever sends the signal, with or without a file: the cluster is as it was."""

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        pids = [child.pid for child in supervisor.children]
        if words is not None:
            (tmp_path / "scale.json").write_text(words)
        supervisor.asked.set()
        await watch.until(lambda: not supervisor.asked.is_set())
        assert await ask(supervisor, watch, 2) == ["decode-0", "decode-1"]
        assert [child.pid for child in supervisor.children[:2]] == pids

    asyncio.run(supervised(ClusterSpec(run_dir=str(tmp_path), decode=1), body, many))


def test_a_decode_without_room_for_a_process_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to make one."""

    async def body(supervisor: Supervisor, watch: Watch) -> None:
        pids = [child.pid for child in supervisor.children]

        async def refused(*_: object, **__: object) -> None:
            raise BlockingIOError("Resource temporarily unavailable")

        monkeypatch.setattr(asyncio, "create_subprocess_exec", refused)
        assert await ask(supervisor, watch, 2) == ["decode-0"]
        assert [child.pid for child in supervisor.children] == pids

    def plan(spec: ClusterSpec) -> list[ProcessSpec]:
        decodes = [process(f"decode-{n}") for n in range(spec.decode)]
        return [process("scheduler", LIVE % 7, "scheduler"), *decodes]

    asyncio.run(supervised(ClusterSpec(run_dir=str(tmp_path), decode=1), body, plan))


def test_one_supervisor_per_run_dir(tmp_path: Path) -> None:
    """A second one is refused before it touches anything."""
    with exclusive(tmp_path), pytest.raises(ConfigError, match="run_dir"), exclusive(tmp_path):
        pass


def test_a_state_file_of_a_dead_supervisor_counts_for_nothing(tmp_path: Path) -> None:
    """Pid and start time together name a process; a reused pid has another start time."""
    path = tmp_path / "supervisor.json"
    path.write_text(json.dumps({"pid": os.getpid(), "start_time": start_time(os.getpid())}))
    assert read_state(tmp_path) is not None
    path.write_text(json.dumps({"pid": os.getpid(), "start_time": 1}))
    assert read_state(tmp_path) is None


def test_what_a_killed_supervisor_left_behind_is_ended(tmp_path: Path) -> None:
    """A process of the last cluster that does not go by itself is killed, and no other one is."""
    left = subprocess.Popen([sys.executable, "-S", "-c", LIVE], stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-S", "-c", LIVE], stdout=subprocess.PIPE)
    entries = [
        {"name": "decode-0", "pid": left.pid, "start_time": start_time(left.pid)},
        {"name": "decode-1", "pid": other.pid, "start_time": 1},
        {"name": "decode-2", "pid": None, "start_time": None},
    ]
    state = {"pid": os.getpid(), "start_time": 1, "processes": entries}
    (tmp_path / "supervisor.json").write_text(json.dumps(state))
    end_leftovers(tmp_path, deadline_s=0.1)
    assert left.wait(20) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait(20)
    for process in (left, other):
        assert process.stdout is not None
        process.stdout.close()
