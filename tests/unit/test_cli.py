"""The command line: what it prints is for people, or with --json for programs, and never both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton import cli
from baton.v1 import cluster_pb2
from tests.support.scripted import finished, say, serve, token


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/s.sock"


def test_text_is_streamed(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json the text is all there is on standard output."""
    server, _ = serve(address, [say(token(0, text="Hel"), token(1, text="lo"), finished())])
    assert cli.main(["generate", "x", "--address", address]) == 0
    server.stop(None).wait()
    assert capsys.readouterr() == ("Hello\n", "")


def test_the_last_line_of_json_is_the_summary(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every event is a JSON line; the last one has the whole text, and numbers are numbers."""
    server, _ = serve(address, [say(token(0, text="Hel"), token(1, text="lo"), finished())])
    assert cli.main(["generate", "x", "--json", "--address", address]) == 0
    server.stop(None).wait()
    *events, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert [event["token"]["index"] for event in events[:-1]] == [0, 1]
    assert (summary["text"], summary["token_ids"]) == ("Hello", [11, 22])
    assert summary["finished"]["timing"]["kv_bytes"] == 1 << 40


def test_nobody_there_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A connection that fails names the address, on one line, and the status says so."""
    assert cli.main(["status", "--address", address]) == 1
    assert cli.main(["generate", "x", "--retry-s", "0", "--address", address]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert [address in line for line in output.err.splitlines()] == [True, True]


def test_a_refusal_is_one_line(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A value that cannot be sent is named, and nothing is retried."""
    assert cli.main(["generate", "x", "--max-tokens", "-1", "--address", address]) == 1
    assert "max_tokens" in capsys.readouterr().err


def test_what_a_store_has_met_is_a_line_below_its_pages() -> None:
    """Damage of every kind, and nothing of what has not been met."""
    store = cluster_pb2.StorePages(corrupt_messages=3, corrupt_cached=1)
    assert cli._store_notes(store) == ["corrupt_cached 1", "corrupt_messages 3"]


def test_down_without_a_cluster_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What should not run does not run: that is what was asked for."""
    assert cli.main(["down", "--json", "--run-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["was_running"] is False


def test_scale_needs_a_cluster_and_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing to scale, and no decode at all, are refused."""
    assert cli.main(["scale", "--decode=2", "--run-dir", str(tmp_path)]) == 1
    assert "no cluster" in capsys.readouterr().err
    assert cli.main(["scale", "--decode=0", "--run-dir", str(tmp_path)]) == 1
    assert "decode: 0" in capsys.readouterr().err


def test_a_bad_option_of_up_names_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`up` checks everything before it starts anything."""
    assert cli.main(["up", "--run-dir", str(tmp_path), "--medium", "rdma"]) == 1
    assert "medium:" in capsys.readouterr().err
