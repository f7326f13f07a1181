"""Certificates for tests of TLS: an authority, and files as Ray's environment variables name them."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """Signs certificates. They name no host, as few of those made for Ray do, unless told to."""

    def __init__(self, directory: Path) -> None:
        """Make one that keeps its files in this directory."""
        directory.mkdir()
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("authority")
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        unsigned = _unsigned(self._name, self._name, self._key).add_extension(constraints, critical=True)
        self._path = directory / "authority.crt"
        self._path.write_bytes(_pem(unsigned.sign(self._key, hashes.SHA256())))

    def environment(self, name: str, hosts: tuple[str, ...] = ()) -> dict[str, str]:
        """The variables of a process that has a certificate of this name."""
        key = ec.generate_private_key(ec.SECP256R1())
        unsigned = _unsigned(_name(name), self._name, key)
        if hosts:
            names = [name for host in hosts for name in _alternatives(host)]
            unsigned = unsigned.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate, private = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        certificate.write_bytes(_pem(unsigned.sign(self._key, hashes.SHA256())))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(certificate),
            "RAY_TLS_SERVER_KEY": str(private),
            "RAY_TLS_CA_CERT": str(self._path),
        }


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternatives(host: str) -> Iterator[x509.GeneralName]:
    yield x509.DNSName(host)
    with contextlib.suppress(ValueError):
        yield x509.IPAddress(ipaddress.ip_address(host))


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
