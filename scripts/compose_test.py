"""Runs the Compose deployment for real and kills decode containers under running streams.

Builds the images, starts every container, checks that prefill and decode share no core, then streams
from this machine while the container that decodes is killed: once with `docker kill`, once by killing
its process, after which Docker must bring it back. Tokens must equal those of an undisturbed run. Then
the same deployment with keys: the same tokens, and no client without keys.

Needs root and what `scripts/install_docker.sh` installs. Starts a Docker daemon when none answers and
ends only that one. The last line is one JSON object; the exit status is 0 when everything held.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from baton.client import Client, Unreachable
from baton.handle import wait_until
from baton.keys import make
from baton.v1 import inference_pb2 as pb
from services.ops.config import parse_cores

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("kv-store", "scheduler", "prefill", "decode-0", "decode-1")
PROMPT = "import os\n\n\ndef first_line(path):\n"
SAMPLING: dict[str, Any] = {"temperature": 0.8, "seed": 11, "max_tokens": 600, "ignore_eos": True}
KILL_AT = 40
HEALTHY_S_MAX = 120.0
RESTART_S_MAX = 60.0
CONTAINER_USER = 10001


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """Runs a command in the repository; gives its output. Its errors go where ours go."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, check=True, stdout=subprocess.PIPE
    )
    return done.stdout.decode().strip()


def succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def say(text: str) -> None:
    print(f"compose_test: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def docker_daemon() -> Iterator[None]:
    """The daemon that runs already, or one of our own for as long as this lasts."""
    if succeeds("docker", "info"):
        yield
        return
    say("starting dockerd")
    with tempfile.NamedTemporaryFile("ab", suffix=".dockerd.log", delete=False) as log:
        daemon = subprocess.Popen(["dockerd"], stdout=log, stderr=log)
    try:
        wait_until(lambda: succeeds("docker", "info"), 60, f"dockerd, whose log is {log.name}")
        yield
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
    Path(log.name).unlink()


class Deployment:
    """One Compose project: prefill on the first core, all others on the rest."""

    def __init__(self, keys_dir: str = "") -> None:
        plugin = succeeds("docker", "compose", "version")
        self._compose = ("docker", "compose") if plugin else ("docker-compose",)
        cpus = sorted(os.sched_getaffinity(0))
        self.separate = len(cpus) > 1
        self.containers: dict[str, str] = {}
        self.keys_dir = keys_dir
        overlay = ":deploy/compose.keys.yml" if keys_dir else ""
        self._env = {
            "COMPOSE_FILE": f"docker-compose.yml{overlay}",
            "KEYS_DIR": keys_dir,
            "COMPOSE_PROJECT_NAME": f"baton-{uuid.uuid4().hex[:8]}",
            "BATON_IMAGE": "baton:compose-test",
            "BATON_PORT": "0",
            "PREFILL_CPUS": str(cpus[0]),
            "DECODE_CPUS": ",".join(map(str, cpus[1:] or cpus)),
            "PREFILL_IO_CPU": str((cpus[1:] or cpus)[0]),
        }

    def compose(self, *arguments: str) -> str:
        return run(*self._compose, *arguments, env=self._env)

    def build(self) -> None:
        """Both base images, then the image, which needs no network any more."""
        say("building images")
        run("sh", "scripts/make_base_image.sh", env={"PYTHON": sys.executable})
        bases = ("BASE_IMAGE=baton-base", "BUILD_IMAGE=baton-build", "PIP_NO_INDEX=1")
        arguments = [part for base in bases for part in ("--build-arg", base)]
        tag = self._env["BATON_IMAGE"]
        command = ("docker", "build", "--quiet", "--network", "none", *arguments, "-t", tag, ".")
        run(*command, env={"DOCKER_BUILDKIT": "0"})

    def start(self) -> None:
        say("starting the containers")
        self.compose("config", "--quiet")
        self.compose("up", "-d", "--no-build")
        self.containers = {service: self.compose("ps", "-q", service) for service in SERVICES}

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Leaves no container, network or volume behind, and the logs when something went wrong."""
        if kind is not None:
            print(self.compose("logs", "--tail", "40"), file=sys.stderr)
        self.compose("down", "-v", "--timeout", "10")

    def inspect(self, service: str) -> Any:
        return json.loads(run("docker", "inspect", self.containers[service]))[0]

    def pid(self, service: str) -> int:
        """The process's pid on this machine."""
        return int(self.inspect(service)["State"]["Pid"])

    def healthy(self, service: str) -> bool:
        return bool(self.inspect(service)["State"].get("Health", {}).get("Status") == "healthy")

    def wait_healthy(self) -> float:
        """Waits for all services; gives the seconds that took."""
        started = time.monotonic()
        for service in SERVICES:
            healthy = functools.partial(self.healthy, service)
            wait_until(healthy, HEALTHY_S_MAX, f"health of {service}")
        return round(time.monotonic() - started, 1)

    def address(self) -> str:
        port = self.compose("port", "scheduler", "50051").rpartition(":")[2]
        return f"127.0.0.1:{port}"


def stream(client: Client, kill: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Streams one completion. In the middle of it, and without holding up the reader, calls `kill`
    with the request id, which gives the name of what it has killed."""
    request_id, tokens, pause_s = uuid.uuid4().hex, list[int](), 0.0
    last, final, killing = time.monotonic(), pb.GenerateEvent(), None
    with ThreadPoolExecutor(1) as executor:
        for event in client.generate(PROMPT, request_id=request_id, timeout_s=120.0, **SAMPLING):
            now = time.monotonic()
            pause_s, last, final = max(pause_s, now - last), now, event
            if event.HasField("token"):
                tokens.append(event.token.token_id)
                if kill and event.token.index == KILL_AT:
                    killing = executor.submit(kill, request_id)
    usage, timing = final.finished.usage, final.finished.timing
    return {
        "finished": final.HasField("finished"),
        "tokens": tokens,
        "killed": killing.result() if killing else "",
        "takeovers": timing.takeovers,
        "pause_ms": round(1000 * pause_s, 1),
        "recomputed_tokens": usage.recomputed_tokens,
    }


def runs_on(client: Client, request_id: str) -> str:
    """The decode service that runs a request now; it is named like its container."""
    for worker in client.view().workers:
        if worker.name in SERVICES[3:] and request_id in worker.running_requests:
            return str(worker.name)
    raise AssertionError(f"{request_id}: no decode worker runs it")


def disturbed(client: Client, reference: list[int], kill: Callable[[str], None]) -> dict[str, Any]:
    """A stream whose decode service `kill` ends, compared with the undisturbed one."""

    def at_kill(request_id: str) -> str:
        victim = runs_on(client, request_id)
        kill(victim)
        return victim

    result = stream(client, at_kill)
    result["same_tokens"] = result.pop("tokens") == reference
    held = result["finished"] and result["same_tokens"] and result["takeovers"] > 0
    result["ok"] = held and result["recomputed_tokens"] == 0
    return result


def status_field(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{field}:")).split(":")[1].strip()


def confinement(deployment: Deployment) -> dict[str, Any]:
    """What the kernel says about cores and users of the processes."""
    pids = {service: deployment.pid(service) for service in SERVICES}
    cores = {name: status_field(pid, "Cpus_allowed_list") for name, pid in pids.items()}
    sets = {name: set(parse_cores(text)) for name, text in cores.items()}
    disjoint = not sets["prefill"] & (sets["decode-0"] | sets["decode-1"])
    users = {status_field(pid, "Uid").split()[1] for pid in pids.values()}
    ok = users == {"10001"} and disjoint is deployment.separate
    return {"ok": ok, "cores": cores, "disjoint": disjoint, "users": sorted(users)}


def restarted(deployment: Deployment, service: str, old_pid: int) -> float:
    """Waits until Docker has brought a service back and it is healthy; gives the seconds."""
    started = time.monotonic()
    wait_until(lambda: deployment.pid(service) not in (0, old_pid), RESTART_S_MAX, "restart")
    wait_until(lambda: deployment.healthy(service), RESTART_S_MAX, f"health of {service}")
    return round(time.monotonic() - started, 1)


def check_docker_kill(deployment: Deployment, client: Client, tokens: list[int]) -> dict[str, Any]:
    """The container is killed; Docker leaves it down, as it was asked to."""
    say("docker kill in the middle of a stream")

    def kill(service: str) -> None:
        run("docker", "kill", deployment.containers[service])

    result = disturbed(client, tokens, kill)
    run("docker", "start", deployment.containers[result["killed"]])
    deployment.wait_healthy()
    return result


def check_process_kill(deployment: Deployment, client: Client, tokens: list[int]) -> dict[str, Any]:
    """The container's process dies; Docker restarts the container."""
    say("kill -9 of a container's process in the middle of a stream")
    pids = {name: deployment.pid(name) for name in SERVICES}
    result = disturbed(client, tokens, lambda name: os.kill(pids[name], signal.SIGKILL))
    killed = result["killed"]
    return {**result, "back_s": restarted(deployment, killed, pids[killed])}


def check(deployment: Deployment) -> dict[str, Any]:
    """The whole story on a running deployment; every part has an `ok`."""
    healthy_s, confined = deployment.wait_healthy(), confinement(deployment)
    with Client(deployment.address()) as client:
        say("an undisturbed stream")
        undisturbed = stream(client)
        tokens = undisturbed["tokens"]
        docker_kill = check_docker_kill(deployment, client, tokens)
        process_kill = check_process_kill(deployment, client, tokens)
        again = stream(client)
    return {
        "up": {"ok": True, "healthy_s": healthy_s},
        "confinement": confined,
        "undisturbed": {"ok": undisturbed["finished"], "count": len(tokens), **undisturbed},
        "docker_kill": docker_kill,
        "process_kill": process_kill,
        "afterwards": {"ok": again["finished"] and again["tokens"] == tokens},
    }


def make_keys(directory: Path) -> None:
    """A cluster's keys; what containers mount belongs to their user."""
    make(directory, ["kv-store", "scheduler"])
    for name in ("public", "scheduler", "kv-store", "prefill", "decode"):
        for path in (directory / name, *(directory / name).rglob("*")):
            os.chown(path, CONTAINER_USER, CONTAINER_USER)


def check_keys(deployment: Deployment, reference: list[int]) -> dict[str, Any]:
    """With keys: all are healthy, the tokens are the same, and a client without keys is refused."""
    healthy_s = deployment.wait_healthy()
    with Client(deployment.address(), keys_dir=deployment.keys_dir) as client:
        streamed = stream(client)
    same = streamed["finished"] and streamed.pop("tokens") == reference
    with Client(deployment.address(), retry_s=0.5) as stranger:
        try:
            stranger.view()
            refused = False
        except Unreachable:
            refused = True
    return {"ok": same and refused, "healthy_s": healthy_s, "same_tokens": same, "refused": refused}


def main() -> int:
    deployment = Deployment()
    with docker_daemon(), tempfile.TemporaryDirectory(prefix="baton-keys-") as keys_dir:
        deployment.build()
        with deployment:
            deployment.start()
            result = check(deployment)
            reference = result["undisturbed"].pop("tokens")
        make_keys(Path(keys_dir))
        say("the same with keys")
        with Deployment(keys_dir) as keyed:
            keyed.start()
            result["keys"] = check_keys(keyed, reference)
    ok = all(part["ok"] for part in result.values())
    print(json.dumps({"ok": ok, **result}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
