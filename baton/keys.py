"""`baton keys DIR`: makes a cluster's certificate authority, and a certificate and a CURVE pair for each
role. Where the files lie is told in `services/ops/keys.py`.

`--renew` replaces all but the authority; processes take up new keys when they are restarted, one after
the other and in any order.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.ops.certificates import read_certificate
from services.ops.errors import ConfigError
from services.ops.keys import CURVE_ROLES, ROLES, KeyFiles, name_of

SERVERS = ("scheduler", "kv-store")  # only their certificates may be a server's
HOSTS = ("localhost", "127.0.0.1")  # in every server's certificate
DAYS = 90
CA_DAYS_MIN = 3650
SKEW = datetime.timedelta(minutes=5)  # how far hosts' clocks may be apart
_PRIVATE, _PUBLIC = 0o600, 0o644


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the keys are to lie")
    parser.add_argument(
        "--host", action="append", default=[], metavar="NAME_OR_IP",
        help="where clients reach a server; may be given again; localhost is always among them",
    )  # fmt: skip
    parser.add_argument(
        "--days", type=int, default=DAYS, help="life of the certificates (default: %(default)s)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--force", action="store_true", help="overwrite; the old keys are gone")
    again.add_argument("--renew", action="store_true", help="new keys of the same authority")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(options: argparse.Namespace) -> int:
    """Makes the keys and says what it has made. Raises ConfigError."""
    made = make(
        options.directory, options.host, days=options.days, force=options.force,
        renew=options.renew,
    )  # fmt: skip
    if options.json:
        print(json.dumps(made.plain()))
        return 0
    for path, what in made.written.items():
        print(f"  {path.stat().st_mode & 0o777:04o}  {path}  {what}")
    print(f"for {', '.join(made.hosts)}; certificates end {made.until:%Y-%m-%d %H:%M} UTC")
    if not options.renew:
        print(f"keep {made.files.ca_key.parent} away from the hosts: only --renew needs it")
    return 0


@dataclass
class Made:
    """What a call has written, and how long it holds."""

    files: KeyFiles
    hosts: list[str]
    until: datetime.datetime
    written: dict[Path, str] = field(default_factory=dict)

    def write(self, path: Path, data: bytes, mode: int, what: str) -> None:
        """In one step: whoever reads sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent)  # mode 0600 from the first byte on
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(fd, mode)
        os.replace(temporary, path)
        self.written[path] = what

    def plain(self) -> dict[str, object]:
        files = [
            {"path": str(path), "mode": f"{path.stat().st_mode & 0o777:04o}", "what": what}
            for path, what in self.written.items()
        ]
        return {
            "directory": str(self.files.root), "hosts": self.hosts,
            "until": self.until.isoformat(), "files": files,
        }  # fmt: skip


@dataclass(frozen=True)
class Authority:
    """The cluster's certificate authority."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make(
    directory: Path,
    hosts: Sequence[str] = (),
    *,
    days: int = DAYS,
    force: bool = False,
    renew: bool = False,
    now: datetime.datetime | None = None,
) -> Made:
    """Writes all keys, valid from `now` on, or with `renew` all but the authority's. Without `force`
    and `renew` it raises ConfigError when there is any file already."""
    if days < 1:
        raise ConfigError(f"days: {days} is less than 1")
    files = KeyFiles(directory)
    if not (force or renew):
        _refuse_to_overwrite(files)
    if renew and not hosts:
        hosts = _hosts(read_certificate(files.certificate(SERVERS[0])))
    now = now or datetime.datetime.now(datetime.UTC)
    made = Made(files, list(dict.fromkeys([*HOSTS, *hosts])), now + datetime.timedelta(days))
    names = [_name(host) for host in made.hosts]
    _make_directories(files)
    authority = _read_authority(files) if renew else _make_authority(made, now, days)
    made.until = min(made.until, authority.certificate.not_valid_after_utc)
    for role in ROLES:
        _make_certificate(made, role, authority, now, names if role in SERVERS else [])
    for role in CURVE_ROLES:
        _make_curve(made, role, renew)
    return made


def _refuse_to_overwrite(files: KeyFiles) -> None:
    for path in _all(files):
        if path.exists():
            raise ConfigError(f"{path} exists; --renew makes new keys, --force a new cluster's")


def _all(files: KeyFiles) -> Iterator[Path]:
    yield from (files.ca_key, files.ca)
    for role in ROLES:
        yield from (files.certificate(role), files.key(role))
    for role in CURVE_ROLES:
        yield from (files.curve(role), files.curve_secret(role))


def _make_directories(files: KeyFiles) -> None:
    """What is private lies in directories that only their owner can enter."""
    files.root.mkdir(parents=True, exist_ok=True)
    for path in (files.ca_key.parent, *(files.key(role).parent for role in ROLES)):
        path.mkdir(mode=0o700, exist_ok=True)


def _name(host: str) -> x509.GeneralName:
    """A host as it stands in a certificate. Raises ConfigError when it is neither name nor address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        labels = host.encode("idna").decode().split(".")
    except UnicodeError:
        labels = [""]
    if not all(label and label.replace("-", "").replace("_", "").isalnum() for label in labels):
        raise ConfigError(f"host: {host!r} is neither a host name nor an address")
    return x509.DNSName(".".join(labels))


def _hosts(certificate: x509.Certificate) -> list[str]:
    """The hosts a server's certificate was made for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    roles = {name_of(role) for role in ROLES}
    return [
        *(n for n in dns if n not in roles),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]


def _builder(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates,
        crl_sign=signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _make_authority(made: Made, now: datetime.datetime, days: int) -> Authority:
    # P-256: the curve that gRPC's BoringSSL takes by default; it refuses Ed25519.
    key = ec.generate_private_key(ec.SECP256R1())
    # A serial number in the name keeps the authorities of two clusters apart in error messages.
    name = f"baton cluster {x509.random_serial_number() >> 128:08x}"
    certificate = (
        _builder(name, _subject(name), key.public_key(), now)
        .not_valid_after(now + datetime.timedelta(max(days, CA_DAYS_MIN)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    made.write(made.files.ca_key, _pem(key), _PRIVATE, "signs certificates")
    ca_pem = certificate.public_bytes(Encoding.PEM)
    made.write(made.files.ca, ca_pem, _PUBLIC, "the cluster's authority")
    return Authority(certificate, key)


def _read_authority(files: KeyFiles) -> Authority:
    certificate = read_certificate(files.ca)
    try:
        key = load_pem_private_key(files.ca_key.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"{files.ca_key}: {error.strerror}; --renew needs it") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{files.ca_key}: is not an unencrypted private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{files.ca_key}: is not an ECDSA key")
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{files.ca_key}: does not belong to {files.ca}")
    return Authority(certificate, key)


def _make_certificate(
    made: Made, role: str, authority: Authority, now: datetime.datetime,
    hosts: Sequence[x509.GeneralName],
) -> None:  # fmt: skip
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role in SERVERS:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    issuer = authority.key.public_key()
    certificate = (
        _builder(role, authority.certificate.subject, key.public_key(), now)
        .not_valid_after(made.until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name_of(role)), *hosts]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False
        )
        .sign(authority.key, hashes.SHA256())
    )  # fmt: skip
    made.write(made.files.key(role), _pem(key), _PRIVATE, f"{role}: private key")
    pem = certificate.public_bytes(Encoding.PEM)
    made.write(made.files.certificate(role), pem, _PUBLIC, f"{role}: certificate")


def _make_curve(made: Made, role: str, renew: bool) -> None:
    """A CURVE pair. On renewal the public key before stays known, for processes not yet restarted."""
    public, secret = (part.decode() for part in zmq.curve_keypair())
    path, previous = made.files.curve(role), made.files.curve_previous(role)
    if renew and path.exists():
        made.write(previous, path.read_bytes(), _PUBLIC, f"{role}: CURVE public key before this")
    else:
        previous.unlink(missing_ok=True)
    text = f'metadata\n    role = "{role}"\ncurve\n    public-key = "{public}"\n'
    made.write(path, text.encode(), _PUBLIC, f"{role}: CURVE public key")
    text += f'    secret-key = "{secret}"\n'
    made.write(made.files.curve_secret(role), text.encode(), _PRIVATE, f"{role}: CURVE pair")


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
