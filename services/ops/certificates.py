"""Whether a certificate is the one that a role of this cluster must have, and a key its own.

Apart from `keys`, because importing cryptography takes longer than all else that a process without keys
needs of them.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from services.ops import log
from services.ops.keys import KeyFiles, name_of, read, wrong

SOON = datetime.timedelta(days=7)  # before the end of a certificate's life it is warned of
_logger = log.get("keys")


def read_certificate(path: Path) -> x509.Certificate:
    """Raises ConfigError when it cannot be read."""
    return _certificate(path, read(path))


def _certificate(path: Path, pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise wrong(path, "is not a certificate in PEM") from None


def check(files: KeyFiles, role: str, ca_pem: bytes, pem: bytes) -> None:
    """In its time, of this role, and issued by the authority; else raises ConfigError."""
    path, now = files.certificate(role), datetime.datetime.now(datetime.UTC)
    ca, certificate = _certificate(files.ca, ca_pem), _certificate(path, pem)
    for each, where in ((ca, files.ca), (certificate, path)):
        if now >= each.not_valid_after_utc:
            raise wrong(where, f"expired at {each.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
        if now < each.not_valid_before_utc:
            raise wrong(where, f"is valid from {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on")
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        raise wrong(path, f"was not issued by {files.ca}") from None
    if name_of(role) not in _dns_names(certificate):
        raise wrong(path, f"is not the certificate of a {role}: it lacks {name_of(role)}")
    if certificate.not_valid_after_utc - now < SOON:
        until = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        _logger.warning("certificate ends soon", file=str(path), until=until)


def _dns_names(certificate: x509.Certificate) -> list[str]:
    """The host and role names a certificate is for, addresses not included."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return list(extension.value.get_values_for_type(x509.DNSName))


def check_key(path: Path, pem: bytes, certificate_pem: bytes) -> None:
    """Raises ConfigError when the private key is not the certificate's."""
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise wrong(path, "is not an unencrypted private key in PEM") from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    certified = x509.load_pem_x509_certificate(certificate_pem).public_key()
    if key.public_key().public_bytes(*form) != certified.public_bytes(*form):
        raise wrong(path, "does not belong to the certificate beside it")
