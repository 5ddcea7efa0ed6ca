"""One crash as plain data: the requests, the moment and the victim. Its JSON form is the recording.

It knows no cluster: `plan.py` draws scenarios, `runner.py` performs them, on any machine, any time.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
TRIGGERS = ("token", "placed", "failpoint", "pressure")
ROLES = ("kv-store", "scheduler", "prefill")
VICTIMS = ("owner", "busiest", "link", *ROLES)
SIGNALS = ("KILL", "STOP", "CUT", "LOSE")
LINKS = ("prefill/decode", "scheduler/prefill", "scheduler/decode", "scheduler/owner")


@dataclass(frozen=True)
class Ask:
    """One request: token ids and how to continue them. End-of-text never ends it."""

    token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.token_ids or self.max_tokens < 1:
            raise ValueError("requests: a prompt and at least one new token are needed")


@dataclass(frozen=True)
class Crash:
    """What dies and when.

    token: the victim is signalled once the client holds token `index` of request `stream`;
    placed: as soon as the requests have workers, while the prompts are still being computed;
    failpoint: whoever reaches `point` (at `index`, if given) kills itself there;
    pressure: nothing dies, there is only less room than the requests want at once.
    """

    trigger: str
    stream: int = 0
    index: int | None = None
    point: str = ""
    victim: str = "owner"  # of request `stream`; or the decode with most requests; or a role
    signal: str = "KILL"  # or STOP; CUT is for a link; LOSE takes the victim's whole host
    between: str = ""  # of a CUT over hosts: one of LINKS; empty: a link that the set-up has
    also: str = ""  # the role of a process that dies in the same moment
    then: str = ""  # a failpoint for whoever takes over, armed with the first death
    pause_ms: int = 0  # of a STOP or a CUT; 0: until another process has taken over
    # of a LOSE: until the host is switched on again; 0: at the end
    expires: bool = False  # a STOP lasts until the store has released what nobody renews
    keeps_epoch: bool = False  # nobody can succeed the victim: no stream may be taken over

    def __post_init__(self) -> None:
        known = (
            ("trigger", self.trigger, TRIGGERS),
            ("victim", self.victim, VICTIMS),
            ("signal", self.signal, SIGNALS),
            ("also", self.also, ("", *ROLES)),
            ("between", self.between, ("", *LINKS)),
        )
        for name, value, allowed in known:
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is none of {', '.join(map(repr, allowed))}")
        if (self.trigger == "failpoint") != bool(self.point):
            raise ValueError("point: belongs to the trigger failpoint, and only to it")
        if self.then and self.trigger == "failpoint":
            raise ValueError("then: is armed by a signal, not by another failpoint")
        if self.trigger == "token" and self.index is None:
            raise ValueError("index: the trigger token needs one")
        if (self.signal == "CUT") != (self.victim == "link"):
            raise ValueError("signal: CUT is for the link, and nothing else is")
        if self.expires and (self.signal, self.victim) != ("STOP", "scheduler"):
            raise ValueError("expires: only the scheduler renews, and it has to come back")
        if self.between and self.signal != "CUT":
            raise ValueError("between: only a link that is cut lies between two hosts")
        if self.signal == "LOSE" and self.trigger == "failpoint":
            raise ValueError("signal: a failpoint takes one process, not its host")
        if self.signal == "CUT" and not self.pause_ms:
            raise ValueError("pause_ms: a link that is cut needs a time to heal")

    @property
    def spares_the_prompt(self) -> bool:
        """Whether prefill and the pages outlive it, so that no prompt token may be computed twice."""
        of_prefill = self.point.startswith(("prefill.", "handoff."))
        alive = "prefill" not in (self.victim, self.also) and self.signal not in ("CUT", "LOSE")
        beyond = self.between in ("scheduler/decode", "scheduler/owner")  # prefill is still there
        return (alive or beyond) and not of_prefill and not self.expires

    @property
    def counts_the_prompt(self) -> bool:
        """Whether it is known which prompt tokens nobody may compute a second time."""
        return self.spares_the_prompt or self.point == "prefill.mid_chunk"

    @property
    def only_a_decode(self) -> bool:
        """Whether one decode dies, another lives, and so do all others."""
        alone = self.victim in ("owner", "busiest") and not (self.also or self.then)
        return self.spares_the_prompt and self.signal == "KILL" and alone

    @property
    def kills_scheduler(self) -> bool:
        """Whether the client's streams themselves break."""
        points = (self.point, self.then)
        dies = "scheduler" in (self.victim, self.also) and self.signal == "KILL"
        return dies or any(p.startswith("scheduler.") for p in points)

    @property
    def moves_streams(self) -> bool:
        """Whether streams go on in another decode, so that one that has not moved was spared."""
        return not self.keeps_epoch and self.victim in ("owner", "busiest")


@dataclass(frozen=True)
class Scenario:
    """Everything one run needs. `seed` and `run` say where it came from."""

    name: str
    seed: int
    run: int
    requests: tuple[Ask, ...]
    crash: Crash
    unsafe: tuple[str, ...] = ()
    recover: str = "takeover"
    setup: str = "standard"  # the cluster it is performed on, by its name in `setups`

    def __post_init__(self) -> None:
        if not 0 <= self.crash.stream < len(self.requests):
            raise ValueError(f"stream: there is no request {self.crash.stream}")

    @property
    def label(self) -> str:
        return f"{self.name}-{self.seed}-{self.run}"

    def to_json(self) -> str:
        """One line per request, so that a recording can be read and compared."""
        value = dataclasses.asdict(self)
        requests = ",\n  ".join(json.dumps(r, separators=(",", ":")) for r in value.pop("requests"))
        head = json.dumps({"format": FORMAT, **value}, indent=1)
        return f'{head[:-2]},\n "requests": [\n  {requests}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Scenario:
        """Raises ValueError, naming what does not fit."""
        value: dict[str, Any] = json.loads(text)
        if value.pop("format", None) != FORMAT:
            raise ValueError(f"format: this reads recordings of format {FORMAT}")
        try:
            asks = tuple(
                Ask(**{**ask, "token_ids": tuple(ask["token_ids"])}) for ask in value["requests"]
            )
            more = {"requests": asks, "crash": Crash(**value["crash"])}
            return cls(**{**value, **more, "unsafe": tuple(value["unsafe"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"recording: {error}") from None

    def write(self, directory: Path) -> Path:
        """Records itself; gives the file."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.label}.json"
        path.write_text(self.to_json())
        return path

    @classmethod
    def read(cls, path: Path) -> Scenario:
        return cls.from_json(path.read_text())
