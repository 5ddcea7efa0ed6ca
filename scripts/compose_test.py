"""Runs the Compose deployment for real and kills decode containers under running streams.

Builds the images, starts every container, checks that prefill and decode share no core, then streams
from this machine while the container that decodes is killed: once with `docker kill`, once by killing
its process, after which Docker must bring it back. Tokens must equal those of an undisturbed run.

Needs root and what `scripts/install_docker.sh` installs. Starts a Docker daemon when none answers and
ends only that one. The last line is one JSON object; the exit status is 0 when everything held.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from baton.client import Client
from baton.handle import wait_until
from baton.v1 import inference_pb2 as pb
from services.ops.config import parse_cores

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("kv-store", "scheduler", "prefill", "decode-0", "decode-1")
PROMPT = "import os\n\n\ndef first_line(path):\n"
SAMPLING: dict[str, Any] = {"temperature": 0.8, "seed": 11, "max_tokens": 600, "ignore_eos": True}
KILL_AT = 40
HEALTHY_S_MAX = 120.0
RESTART_S_MAX = 60.0


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
    """One Compose project. `cores` is what prefill gets and what all others share."""

    def __init__(self) -> None:
        plugin = succeeds("docker", "compose", "version")
        self._compose = ("docker", "compose") if plugin else ("docker-compose",)
        cpus = sorted(os.sched_getaffinity(0))
        self.separate = len(cpus) > 1
        self._env = {
            "COMPOSE_PROJECT_NAME": f"baton-{uuid.uuid4().hex[:8]}",
            "BATON_IMAGE": "baton:compose-test",
            "BATON_PORT": "0",
            "PREFILL_CPUS": str(cpus[0]),
            "DECODE_CPUS": ",".join(map(str, cpus[1:] or cpus)),
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

    def __enter__(self) -> Deployment:
        say("starting the containers")
        self.compose("config", "--quiet")
        self.compose("up", "-d", "--no-build")
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            print(self.compose("logs", "--tail", "40"), file=sys.stderr)
        self.compose("down", "-v", "--timeout", "10")

    def container(self, service: str) -> str:
        return self.compose("ps", "-q", service)

    def inspect(self, service: str) -> Any:
        return json.loads(run("docker", "inspect", self.container(service)))[0]

    def pid(self, service: str) -> int:
        """The process's pid on this machine."""
        return int(self.inspect(service)["State"]["Pid"])

    def healthy(self, service: str) -> bool:
        return bool(self.inspect(service)["State"].get("Health", {}).get("Status") == "healthy")

    def wait_healthy(self) -> float:
        """Waits for all services; gives the seconds that took."""
        started = time.monotonic()
        for service in SERVICES:
            wait_until(lambda name=service: self.healthy(name), HEALTHY_S_MAX, f"health: {service}")
        return round(time.monotonic() - started, 1)

    def address(self) -> str:
        port = self.compose("port", "scheduler", "50051").rpartition(":")[2]
        return f"127.0.0.1:{port}"


def stream(client: Client, at_kill: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Streams one completion; calls `at_kill` with the request id in the middle of it."""
    request_id, tokens, pause_s = uuid.uuid4().hex, list[int](), 0.0
    last, final = time.monotonic(), pb.GenerateEvent()
    for event in client.generate(PROMPT, request_id=request_id, timeout_s=120.0, **SAMPLING):
        now = time.monotonic()
        pause_s, last, final = max(pause_s, now - last), now, event
        if event.HasField("token"):
            tokens.append(event.token.token_id)
            if at_kill and event.token.index == KILL_AT:
                at_kill(request_id)
    usage, timing = final.finished.usage, final.finished.timing
    return {
        "finished": final.HasField("finished"),
        "tokens": tokens,
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
    """A stream whose decode service is killed by `kill`, compared with the undisturbed one."""
    victims: list[str] = []

    def at_kill(request_id: str) -> None:
        victims.append(runs_on(client, request_id))
        kill(victims[0])

    result = stream(client, at_kill)
    result["same_tokens"] = result.pop("tokens") == reference
    result["killed"] = victims[0]
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


def check(deployment: Deployment) -> dict[str, Any]:
    """The whole story on a running deployment."""
    result: dict[str, Any] = {"healthy_s": deployment.wait_healthy()}
    result["confinement"] = confinement(deployment)
    with Client(deployment.address()) as client:
        say("an undisturbed stream")
        reference = stream(client)
        tokens = reference.pop("tokens")
        result["undisturbed"] = {**reference, "ok": reference["finished"], "count": len(tokens)}

        say("docker kill in the middle of a stream")
        killing: Callable[[str], Any] = lambda name: run(
            "docker", "kill", deployment.container(name)
        )
        result["docker_kill"] = killed = disturbed(client, tokens, killing)
        run("docker", "start", deployment.container(killed["killed"]))
        deployment.wait_healthy()

        say("kill -9 of a container's process in the middle of a stream")
        pids = {name: deployment.pid(name) for name in SERVICES}
        result["process_kill"] = killed = disturbed(
            client, tokens, lambda name: os.kill(pids[name], signal.SIGKILL)
        )
        killed["back_s"] = restarted(deployment, killed["killed"], pids[killed["killed"]])
        deployment.wait_healthy()
        again = stream(client)
        result["afterwards"] = {"ok": again["finished"] and again["tokens"] == tokens}
    return result


def main() -> int:
    deployment = Deployment()
    with docker_daemon():
        deployment.build()
        with deployment:
            result = check(deployment)
    parts = [part for part in result.values() if isinstance(part, dict)]
    ok = all(part["ok"] for part in parts)
    print(json.dumps({"ok": ok, **result}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
