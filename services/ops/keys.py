"""A process's own keys, read from the directory that `baton keys` makes, and checked before use.

    DIR/ca/ca.key                the cluster's certificate authority; no process needs it
    DIR/public/ca.crt            its certificate
    DIR/public/curve/ROLE.key    CURVE public keys; ROLE.previous.key is the one before the last renewal
    DIR/ROLE/tls.crt, tls.key    a role's certificate, for gRPC
    DIR/ROLE/curve.key_secret    a role's CURVE pair, for ZeroMQ

A process needs `public` and the directory of its own role, nothing else. Peers are known by role and not
by address: a role's certificate carries the name `ROLE.baton.internal`. This module reads bytes; it
opens no connection and does not know what the roles may do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import zmq

from services.ops.errors import ConfigError

ROLES = ("scheduler", "kv-store", "prefill", "decode", "client")
CURVE_ROLES = ("kv-store", "prefill", "decode")  # who has ZeroMQ sockets
_DOMAIN = ".baton.internal"


def name_of(role: str) -> str:
    """The DNS name in a role's certificate. `.internal` is nobody's in the public DNS."""
    return role + _DOMAIN


def role_of(name: str) -> str:
    """The role that a certificate's name stands for; empty when it is no role's."""
    role = name.removesuffix(_DOMAIN)
    return role if name.endswith(_DOMAIN) and role in ROLES else ""


@dataclass(frozen=True)
class KeyFiles:
    """Where everything lies in a directory of keys."""

    root: Path

    @property
    def ca_key(self) -> Path:
        return self.root / "ca" / "ca.key"

    @property
    def ca(self) -> Path:
        return self.root / "public" / "ca.crt"

    def certificate(self, role: str) -> Path:
        return self.root / role / "tls.crt"

    def key(self, role: str) -> Path:
        return self.root / role / "tls.key"

    def curve_secret(self, role: str) -> Path:
        return self.root / role / "curve.key_secret"

    def curve(self, role: str) -> Path:
        return self.root / "public" / "curve" / f"{role}.key"

    def curve_previous(self, role: str) -> Path:
        return self.root / "public" / "curve" / f"{role}.previous.key"


@dataclass(frozen=True)
class CurvePair:
    """A CURVE key pair in Z85 text, 40 bytes each."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class Keys:
    """What one process holds: PEM of the authority, of its certificate and of its private key, and its
    CURVE pair if its role has ZeroMQ sockets."""

    role: str
    files: KeyFiles
    ca: bytes = field(repr=False)
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    curve: CurvePair | None

    def curve_keys(self, role: str) -> list[bytes]:
        """The public keys by which processes of `role` may be known now: the present one first, then
        the one before the last renewal. Read anew each time, since keys are renewed while this process
        runs. Raises ConfigError."""
        present, previous = self.files.curve(role), self.files.curve_previous(role)
        return [_curve(path)[0] for path in (present, previous) if path is present or path.exists()]


def load(keys_dir: str, role: str) -> Keys | None:
    """A role's keys, checked; None when `keys_dir` is empty. Raises ConfigError naming the file at fault
    and what is wrong with it."""
    assert role in ROLES, f"no such role: {role}"
    if not keys_dir:
        return None
    from services.ops import certificates  # only who has keys pays for importing cryptography

    files = KeyFiles(Path(keys_dir))
    ca = read(files.ca)
    certificate = read(files.certificate(role))
    key = _read_private(files.key(role))
    certificates.check(files, role, ca, certificate)
    certificates.check_key(files.key(role), key, certificate)
    curve = _curve_pair(files, role) if role in CURVE_ROLES else None
    return Keys(role, files, ca, certificate, key, curve)


def wrong(path: Path, reason: str) -> ConfigError:
    """The error for a file of keys that is not as it should be."""
    return ConfigError(f"keys_dir: {path}: {reason}")


def read(path: Path) -> bytes:
    """Raises ConfigError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise wrong(path, (error.strerror or str(error)).lower()) from None


def _read_private(path: Path) -> bytes:
    """A private file's bytes. One that everybody can read is no secret, and refused."""
    data = read(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o007:
        raise wrong(path, f"mode {mode:04o} lets everybody read this private key; chmod 600 it")
    return data


def _curve(path: Path) -> tuple[bytes, bytes | None]:
    """A CURVE file's public key and, if it holds one, its secret key."""
    import zmq.auth

    read(path)  # says why when it cannot be
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise wrong(path, f"is not a CURVE key: {error}") from None
    if not all(key is None or len(key) == 40 for key in (public, secret)):
        raise wrong(path, "is not a CURVE key: 40 characters of Z85 are expected")
    return public, secret


def _curve_pair(files: KeyFiles, role: str) -> CurvePair:
    """The pair in a role's own file, whose public half must be the one that is published."""
    path = files.curve_secret(role)
    _read_private(path)
    public, secret = _curve(path)
    if secret is None or zmq.curve_public(secret) != public:
        raise wrong(path, "does not hold a CURVE pair")
    if _curve(files.curve(role))[0] != public:
        raise wrong(files.curve(role), f"is not the public key of {path}")
    return CurvePair(public, secret)
