"""Keyring: the keys that a store is encrypted with, read where the bot's actors run.

They are in a file, or in a variable of the environment, as JSON:

    {"current": "2026-11", "keys": {"2026-11": "<base64 of 32 bytes>"}}

What is written is encrypted with the current one, and what is read with whichever it was written with. Key
bytes are in no error, no log, no repr, and never travel: options only say where they are.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from fsm_ray.errors import EncryptionKeysUnusable

KEY_BYTES = 32
"""AES-256."""

_ID = re.compile(r"[A-Za-z0-9_.-]{1,32}", re.ASCII)

_FORBIDDEN = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP
"""What nobody but the owner may do with the file. The group may read it: Kubernetes mounts secrets so."""


class _File(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    current: str
    keys: dict[str, str]
    accept_plain: bool = False


@dataclass(frozen=True, slots=True)
class Keyring:
    """The keys by their ids."""

    current: str
    """The id of the key that is written with."""
    keys: Mapping[str, bytes] = field(repr=False)
    accepts_plain: bool = False
    """Whether records that are not encrypted are taken: only while a bot's store is being encrypted."""


def read_keyring(where: str) -> Keyring:
    """The keys that `BotOptions.encryption_keys` names.

    Raises:
        EncryptionKeysUnusable: they are not there, others may read them, or they are no keys.
    """
    kind, _, name = where.partition(":")
    text = _from_environment(name) if kind == "env" else _from_file(Path(name.removeprefix("//")))
    return _parsed(text, where)


def make_key_file(path: Path, key_id: str) -> None:
    """Make a file with one new key, readable by its owner alone.

    Raises:
        FileExistsError: there is one; `add_key` adds to it.
        EncryptionKeysUnusable: a key cannot have this id.
    """
    _write(path, _File(_checked_id(key_id), {key_id: _new_key()}), replaced=None)


def add_key(path: Path, key_id: str) -> None:
    """Add a new key to the file, with which all is written from the next `rotate_keys` on.

    The file is replaced as a whole, by one with its owner, group and mode: a process that reads it meanwhile
    finds the old one or the new one. Of several that add a key at a time, one waits for the other.

    Raises:
        EncryptionKeysUnusable: the file cannot be used, or replaced, or has a key of this id.
    """
    where = f"file://{path}"
    with _locked(path.parent):
        text = _from_file(path)
        before = _parsed(text, where)
        if _checked_id(key_id) in before.keys:
            raise EncryptionKeysUnusable(
                f"{path} has a key {key_id!r} already: give the new one another id (--id)"
            )
        file = msgspec.json.decode(text, type=_File)
        added = _File(key_id, {**file.keys, key_id: _new_key()}, file.accept_plain)
        _write(path, added, replaced=path.stat())


def is_key_id(text: str) -> bool:
    """Whether a key can be called so."""
    return _ID.fullmatch(text) is not None


def _from_environment(name: str) -> bytes:
    text = os.environ.get(name)
    if not text:
        raise EncryptionKeysUnusable(
            f"the environment variable {name} with the encryption keys is not set here: where a bot's "
            "actors run, set it before `ray start`, on every node"
        )
    return text.encode()


def _from_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            # Of the file that is open, which is the one that is read.
            found = os.fstat(file.fileno())
            if found.st_uid not in {0, os.geteuid()} or found.st_mode & _FORBIDDEN:
                raise EncryptionKeysUnusable(
                    f"the encryption keys in {path} are not safe from others: it has the mode "
                    f"{stat.S_IMODE(found.st_mode):04o} and belongs to user {found.st_uid}. Give it to the "
                    f"user that Ray runs as, and run chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise EncryptionKeysUnusable(
            f"the encryption keys in {path} cannot be read here: {error.strerror}. Every node on "
            "which shards may start needs the file; `fsm-ray keys new` makes one"
        ) from error


def _parsed(text: bytes, where: str) -> Keyring:
    try:
        file = msgspec.json.decode(text, type=_File)
        keys = {key_id: _key_bytes(key_id, encoded) for key_id, encoded in file.keys.items()}
        _checked_id(file.current)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        # Without the cause, whose traceback may show the text.
        raise EncryptionKeysUnusable(f"{where} holds no encryption keys: {error}") from None
    except EncryptionKeysUnusable as error:
        raise error.copied(f" ({where})") from None
    if file.current not in keys:
        raise EncryptionKeysUnusable(
            f"{where} says that its current key is {file.current!r}, and has none of that id",
            key_id=file.current,
        )
    return Keyring(file.current, keys, file.accept_plain)


def _key_bytes(key_id: str, encoded: str) -> bytes:
    _checked_id(key_id)
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"key {key_id!r} is not the base64 of {KEY_BYTES} bytes")
    return key


def _checked_id(key_id: str) -> str:
    if is_key_id(key_id):
        return key_id
    raise EncryptionKeysUnusable(f"key id {key_id!r}: an id is 1 to 32 letters, digits or _ . -")


def _new_key() -> str:
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep others from adding keys there meanwhile. Not by a lock of the file: it is replaced."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, file: _File, *, replaced: os.stat_result | None) -> None:
    """Write the file whole, or not at all: new, for its owner alone to read, or like the one it replaces."""
    text = msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"
    whole = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out:
            if replaced is not None:
                _make_like(out.fileno(), path, replaced)
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        if replaced is None:
            os.link(whole, path)  # unlike a rename, it replaces nothing
        else:
            whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _make_like(descriptor: int, path: Path, replaced: os.stat_result) -> None:
    """Give the file the owner, group and mode of the one that it replaces."""
    try:
        os.fchown(descriptor, replaced.st_uid, replaced.st_gid)
    except PermissionError as error:
        raise EncryptionKeysUnusable(
            f"{path} belongs to user {replaced.st_uid} and group {replaced.st_gid}, and this user can make "
            "no such file: nothing was changed; run the command as root"
        ) from error
    os.fchmod(descriptor, stat.S_IMODE(replaced.st_mode))
