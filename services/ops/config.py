"""One frozen dataclass per process becomes its command line and its environment variables.

A field `arena_dir` is the option `--arena-dir` and the variable `BATON_ARENA_DIR`; the option wins. A
value that does not parse stops the process and names itself. Field metadata `help` is the help text.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from services.ops.errors import ConfigError

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A config field with a default and its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


def _parse(kind: Any, name: str, text: str) -> Any:
    try:
        if kind is bool:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if kind == tuple[int, ...]:
            return parse_cores(text)
        if kind == tuple[str, ...]:
            return tuple(part for part in text.split(",") if part)
        return kind(text)
    except (KeyError, ValueError):
        raise ConfigError(
            f"{name}: {text!r} is not a valid {getattr(kind, '__name__', kind)}"
        ) from None


def parse_cores(text: str) -> tuple[int, ...]:
    """`0-2,5` as (0, 1, 2, 5); empty text as ()."""
    cores: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cores.extend(range(int(first), int(last or first) + 1))
    return tuple(cores)


def load(
    cls: type[T], argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ
) -> T:
    """Builds `cls` from the command line and the environment.

    Raises ConfigError naming the option. Unknown options end the process with argparse's message.
    """
    assert dataclasses.is_dataclass(cls)
    hints = get_type_hints(cls)
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        text = f"{field.metadata.get('help', '')} (default: {field.default!r})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        variable = f"BATON_{field.name.upper()}"
        value = given[field.name] if given[field.name] is not None else environ.get(variable)
        if value is not None:
            values[field.name] = _parse(hints[field.name], field.name, value)
    return cls(**values)


def as_arguments(config: Any) -> list[str]:
    """The command line that gives `config` back; what the supervisor starts a process with."""
    arguments: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        arguments.append(f"--{field.name.replace('_', '-')}={text}")
    return arguments
