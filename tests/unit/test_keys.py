"""Keys: what `baton keys` makes, and what a process refuses to start with."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from baton import cli
from baton.keys import make
from services.ops.certificates import read_certificate
from services.ops.errors import ConfigError
from services.ops.keys import (
    CURVE_ROLES,
    ROLES,
    KeyFiles,
    load,
    name_of,
    role_of,
)

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture
def files(tmp_path: Path) -> KeyFiles:
    return make(tmp_path / "keys").files


def extension(files: KeyFiles, role: str, kind: type) -> list[object]:
    certificate = read_certificate(files.certificate(role))
    value = certificate.extensions.get_extension_for_class(kind).value
    return list(value)


def test_every_role_can_load_its_own(files: KeyFiles) -> None:
    """All roles have a certificate, those with ZeroMQ sockets a CURVE pair, and no two a key in
    common."""
    loaded = [load(str(files.root), role) for role in ROLES]
    assert all(loaded)
    assert [keys.role for keys in loaded if keys and keys.curve] == list(CURVE_ROLES)
    assert len({keys.key for keys in loaded if keys}) == len(ROLES)
    assert len({keys.curve.public for keys in loaded if keys and keys.curve}) == len(CURVE_ROLES)


def test_without_a_directory_there_are_no_keys() -> None:
    """An empty option means plain, and nothing is looked for."""
    assert load("", "decode") is None


def test_a_role_needs_nothing_of_the_others(files: KeyFiles) -> None:
    """`public` and its own directory suffice: that is all that its host or container is given."""
    for name in {"ca", *ROLES} - {"prefill"}:
        shutil.rmtree(files.root / name)
    keys = load(str(files.root), "prefill")
    assert keys is not None
    assert keys.curve_keys("kv-store")


def test_private_files_are_their_owners_alone(files: KeyFiles) -> None:
    """Private keys 0600 in directories of 0700; what is public can be read."""
    private = [files.ca_key, *(files.key(r) for r in ROLES), *map(files.curve_secret, CURVE_ROLES)]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in private} == {0o700}
    public = [files.ca, *(files.certificate(r) for r in ROLES), *map(files.curve, CURVE_ROLES)]
    assert {path.stat().st_mode & 0o777 for path in public} == {0o644}
    everything = {path for path in files.root.rglob("*") if path.is_file()}
    assert everything == {*private, *public}


def test_secrets_are_not_printed(files: KeyFiles) -> None:
    """Neither a log line nor a traceback with the object in it gives a key away."""
    keys = load(str(files.root), "decode")
    assert keys is not None
    assert keys.curve is not None
    assert "PRIVATE" not in repr(keys)
    assert keys.curve.secret.decode() not in repr(keys)


def test_servers_are_named_and_clients_cannot_be_servers(tmp_path: Path) -> None:
    """Every certificate has its role's name; only servers have hosts and may serve."""
    files = make(tmp_path, ["kv.example.org", "10.1.2.3", "::1"]).files
    for role in ROLES:
        names = [n.value for n in extension(files, role, x509.SubjectAlternativeName)]  # type: ignore[attr-defined]
        usages = extension(files, role, x509.ExtendedKeyUsage)
        serves = role in ("scheduler", "kv-store")
        assert names[0] == name_of(role)
        assert ("localhost" in names and "kv.example.org" in names) is serves
        assert {"127.0.0.1", "10.1.2.3", "::1"} <= set(map(str, names)) or not serves
        assert (ExtendedKeyUsageOID.SERVER_AUTH in usages) is serves
        assert ExtendedKeyUsageOID.CLIENT_AUTH in usages


def test_names_stand_for_roles() -> None:
    """A name is a role's or nobody's."""
    assert [role_of(name_of(role)) for role in ROLES] == list(ROLES)
    assert role_of("decode") == role_of("localhost") == role_of("root.baton.internal") == ""


@pytest.mark.parametrize("host", ["", "a b", "x..y", "http://x", "10.0.0.1:5"])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match=r"^host:"):
        make(tmp_path / "k", [host])
    assert not (tmp_path / "k").exists()


def test_nothing_is_overwritten_unasked(files: KeyFiles) -> None:
    """Any file of an earlier time is in the way; --force makes a new cluster, whose old keys are of no
    use any more."""
    before = load(str(files.root), "decode")
    with pytest.raises(ConfigError, match="exists"):
        make(files.root)
    assert load(str(files.root), "decode") == before
    old = files.certificate("client").read_bytes()
    make(files.root, force=True)
    files.certificate("client").write_bytes(old)
    with pytest.raises(ConfigError, match=r"client/tls.crt: was not issued by .*public/ca.crt"):
        load(str(files.root), "client")


def test_renewal_keeps_the_authority_and_the_hosts(tmp_path: Path) -> None:
    """New certificates of the same authority, for the same hosts; a CURVE key before it stays known,
    the one before that is forgotten."""
    files = make(tmp_path, ["h.example"]).files
    authority, first = files.ca.read_bytes(), load(str(tmp_path), "decode")
    made = make(tmp_path, renew=True)
    second = load(str(tmp_path), "decode")
    assert files.ca.read_bytes() == authority
    assert "h.example" in made.hosts
    assert first
    assert second
    assert first.curve
    assert second.curve
    assert first.key != second.key
    assert first.curve_keys("decode") == [second.curve.public, first.curve.public]
    make(tmp_path, renew=True)
    assert second.curve_keys("decode")[1:] == [second.curve.public]


def test_renewal_needs_the_authority_s_key(files: KeyFiles) -> None:
    """Which is kept elsewhere, or lost, or another one's."""
    files.ca_key.write_text("junk")
    with pytest.raises(ConfigError, match=r"ca\.key: is not"):
        make(files.root, renew=True)
    files.ca_key.unlink()
    with pytest.raises(ConfigError, match=r"ca\.key: .*--renew needs it"):
        make(files.root, renew=True)


Harm = Callable[[KeyFiles], object]


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


HARMS: dict[str, tuple[Harm, str]] = {
    "no authority": (lambda f: f.ca.unlink(), "public/ca.crt: no such file"),
    "no certificate": (lambda f: f.certificate("decode").unlink(), "tls.crt: no such file"),
    "no key": (lambda f: f.key("decode").unlink(), "tls.key: no such file"),
    "no pair": (lambda f: f.curve_secret("decode").unlink(), "curve.key_secret: no such file"),
    "no public half": (lambda f: f.curve("decode").unlink(), "curve/decode.key: no such file"),
    "a directory": (
        lambda f: (f.key("decode").unlink(), f.key("decode").mkdir()),
        "tls.key: is a directory",
    ),
    "junk for a certificate": (
        lambda f: f.certificate("decode").write_text("junk"), "tls.crt: is not a certificate",
    ),
    "junk for an authority": (
        lambda f: f.ca.write_text("junk"), "ca.crt: is not a certificate",
    ),
    "junk for a key": (
        lambda f: f.key("decode").write_text("junk"), "tls.key: is not an unencrypted private key",
    ),
    "junk for a pair": (
        lambda f: f.curve_secret("decode").write_text("junk"), "key_secret: is not a CURVE key",
    ),
    "a short pair": (
        lambda f: f.curve_secret("decode").write_text('public-key = "x"\nsecret-key = "y"\n'),
        "key_secret: is not a CURVE key",
    ),
    "a key of another": (
        lambda f: _copy(f.key("prefill"), f.key("decode")), "tls.key: does not belong to",
    ),
    "a role of another": (
        lambda f: (
            _copy(f.key("prefill"), f.key("decode")),
            _copy(f.certificate("prefill"), f.certificate("decode")),
        ),
        "tls.crt: is not the certificate of a decode: it lacks decode.baton.internal",
    ),
    "a pair of another": (
        lambda f: _copy(f.curve_secret("prefill"), f.curve_secret("decode")),
        "curve/decode.key: is not the public key of",
    ),
    "only half a pair": (
        lambda f: _copy(f.curve("decode"), f.curve_secret("decode")), "does not hold a CURVE pair",
    ),
    "a key for everybody": (
        lambda f: f.key("decode").chmod(0o604), "tls.key: mode 0604 lets everybody read",
    ),
    "a pair for everybody": (
        lambda f: f.curve_secret("decode").chmod(0o644), "key_secret: mode 0644 lets everybody",
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_bad_keys_name_the_file_and_the_reason(files: KeyFiles, harm: str) -> None:
    """The process does not start, and says which file it was and what is wrong with it."""
    do, words = HARMS[harm]
    do(files)
    with pytest.raises(ConfigError) as caught:
        load(str(files.root), "decode")
    assert caught.value.message.startswith(f"keys_dir: {files.root}/")
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("made", "days", "words"),
    [
        (NOW - 10 * DAY, 2, f"expired at {NOW - 8 * DAY:%Y-%m-%d %H:%M} UTC"),
        (NOW + 10 * DAY, 2, "is valid from "),
    ],
    ids=["past", "future"],
)
def test_a_certificate_out_of_its_time_is_refused(
    tmp_path: Path, made: datetime.datetime, days: int, words: str
) -> None:
    """Expired or not yet valid; the time is told."""
    make(tmp_path, days=days, now=made)
    with pytest.raises(ConfigError, match=words):
        load(str(tmp_path), "scheduler")


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    """Renewing shortly before the authority's end gives certificates that end with it."""
    first = make(tmp_path, now=NOW - 3600 * DAY)
    authority = read_certificate(first.files.ca)
    made = make(tmp_path, days=200, renew=True)
    assert made.until == authority.not_valid_after_utc
    load(str(tmp_path), "client")


def test_the_command_tells_what_it_has_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file with its mode for people, one object for programs; a refusal is one line."""
    where = str(tmp_path / "k")
    assert cli.main(["keys", where, "--host", "db-1", "--days", "3", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    modes = {entry["path"]: entry["mode"] for entry in made["files"]}
    assert modes[f"{where}/decode/tls.key"] == "0600"
    assert made["hosts"] == ["localhost", "127.0.0.1", "db-1"]
    until = datetime.datetime.fromisoformat(made["until"])
    assert 2 * DAY < until - datetime.datetime.now(datetime.UTC) < 3 * DAY
    assert cli.main(["keys", where]) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main(["keys", where, "--renew"]) == 0
    assert f"0600  {where}/client/tls.key" in capsys.readouterr().out
    assert cli.main(["keys", where, "--force", "--days", "0"]) == 1
    assert "days:" in capsys.readouterr().err
