"""Every process's config: options and variables agree, and bad values name themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from services.decode.config import DecodeConfig
from services.kv_store.config import KvStoreConfig
from services.ops.config import as_arguments, load, parse_cores
from services.ops.errors import ConfigError
from services.prefill.config import PrefillConfig
from services.scheduler.config import SchedulerConfig

CHANGED = [
    SchedulerConfig(listen="0.0.0.0:0", stores=("a:1", "unix:/b"), journal_fsync=True),
    KvStoreConfig(arena_bytes=1 << 21, cores=(1, 2), unsafe=("checksum",)),
    PrefillConfig(device="cuda:0", chunk_tokens=128, stream="whole", io_core=1),
    DecodeConfig(name="decode-7", cores=(0,), batch_max=1),
]
CLASSES = [type(config) for config in CHANGED]


@pytest.mark.parametrize("config", CHANGED, ids=lambda c: type(c).__name__)
def test_a_config_survives_its_command_line(config: Any) -> None:
    """`as_arguments` and `load` are each other's inverse, with nothing in the environment."""
    assert load(type(config), as_arguments(config), {}) == config


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_need_no_arguments(cls: type[Any]) -> None:
    """A config at its defaults is an empty command line."""
    assert as_arguments(cls()) == []
    assert load(cls, [], {}) == cls()


@pytest.mark.parametrize("config", CHANGED, ids=lambda c: type(c).__name__)
def test_variables_say_the_same_as_options(config: Any) -> None:
    """`--arena-dir=x` and BATON_ARENA_DIR=x mean the same."""
    pairs = (argument.removeprefix("--").split("=", 1) for argument in as_arguments(config))
    environ = {f"BATON_{name.replace('-', '_').upper()}": value for name, value in pairs}
    assert load(type(config), [], environ) == config


def test_the_option_wins_over_the_variable() -> None:
    """The command line is nearer to the user than the environment."""
    assert load(DecodeConfig, ["--name=a"], {"BATON_NAME": "b"}).name == "a"


@pytest.mark.parametrize("cls", CLASSES)
def test_every_option_has_help(cls: type[Any]) -> None:
    """An option without a word about it is no option."""
    assert all(field.metadata["help"] for field in dataclasses.fields(cls))


@pytest.mark.parametrize(
    ("cls", "argument"),
    [
        (SchedulerConfig, "--waiting-max=many"),
        (SchedulerConfig, "--journal-fsync=perhaps"),
        (SchedulerConfig, "--suspect-ms=100"),
        (SchedulerConfig, "--recover=never"),
        (SchedulerConfig, "--stores="),
        (KvStoreConfig, "--arena-bytes=4096"),
        (KvStoreConfig, "--streams-max=0"),
        (KvStoreConfig, "--cores=one"),
        (PrefillConfig, "--chunk-tokens=100"),
        (PrefillConfig, "--stream=sometimes"),
        (DecodeConfig, "--batch-max=0"),
        (DecodeConfig, "--heartbeat-ms=1.5"),
    ],
)
def test_a_bad_value_names_itself(cls: type[Any], argument: str) -> None:
    """The message begins with the field, so that it can be found in any configuration."""
    name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
    with pytest.raises(ConfigError, match=f"^{name}:"):
        load(cls, [argument], {})


def test_a_bad_variable_is_not_ignored() -> None:
    """A value from the environment is checked like one from the command line."""
    with pytest.raises(ConfigError, match=r"^batch_max:"):
        load(DecodeConfig, [], {"BATON_BATCH_MAX": "lots"})


def test_an_unknown_option_is_refused() -> None:
    """A misspelt option ends the process instead of being dropped."""
    with pytest.raises(SystemExit):
        load(DecodeConfig, ["--batchmax=1"], {})


def test_cores_are_read_as_people_write_them() -> None:
    """Ranges and lists, in the order given."""
    assert parse_cores("0-2,5") == (0, 1, 2, 5)
    assert parse_cores("") == ()
