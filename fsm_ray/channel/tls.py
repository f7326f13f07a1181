"""TLS between nodes, with the certificates that Ray itself uses when it runs with RAY_USE_TLS.

Both sides show a certificate, and each is checked against RAY_TLS_CA_CERT. Names in certificates are not
looked at: few of those made for Ray name their node. Instead, the certificate that a shard shows is part of
the handshake's proof, so that nobody else who has one of the same authority can stand between.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from fsm_ray.errors import ConfigurationError

CERTIFICATE = "RAY_TLS_SERVER_CERT"
KEY = "RAY_TLS_SERVER_KEY"
AUTHORITY = "RAY_TLS_CA_CERT"


def is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Ray, and so the channel between nodes, uses TLS here."""
    return environment.get("RAY_USE_TLS", "").lower() in {"1", "true"}


def server_context() -> tuple[ssl.SSLContext, bytes]:
    """What a listener needs: the context, and the transport as it is in proofs.

    Raises:
        ConfigurationError: a file is not named, not there, or not what it should be.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    return context, transport_of(ssl.PEM_cert_to_DER_cert(_first_certificate(_path(CERTIFICATE))))


def client_context() -> ssl.SSLContext:
    """What a client needs; raises as `server_context`."""
    return _context(ssl.PROTOCOL_TLS_CLIENT)


def transport_of(certificate: bytes | None) -> bytes:
    """The transport, as it is in proofs, to a server with this certificate, DER-encoded."""
    return b"tls" + hashlib.sha256(certificate or b"").digest()


def _context(protocol: int) -> ssl.SSLContext:
    certificate, key, authority = (_path(each) for each in (CERTIFICATE, KEY, AUTHORITY))
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        # An encrypted key would have OpenSSL ask for its password at a terminal.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"RAY_USE_TLS is set, and {CERTIFICATE}={certificate} with {KEY}={key} is no certificate with "
            f"its unencrypted key, both as PEM: {error}"
        ) from error
    try:
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"RAY_USE_TLS is set, and {AUTHORITY}={authority} holds no certificate as PEM: {error}"
        ) from error
    return context


def _path(variable: str) -> str:
    """The readable file that this variable names."""
    path = os.environ.get(variable)
    if not path:
        raise ConfigurationError(
            f"RAY_USE_TLS is set, and {variable} is not: set it to the file's path on all nodes, as for Ray"
        )
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise ConfigurationError(
            f"RAY_USE_TLS is set, and {variable}={path} cannot be read: {error.strerror}"
        ) from error
    return path


def _first_certificate(path: str) -> str:
    """The certificate that a chain begins with."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    text = Path(path).read_text(encoding="ascii", errors="replace")
    return begin + text.partition(begin)[2].partition(end)[0] + end
