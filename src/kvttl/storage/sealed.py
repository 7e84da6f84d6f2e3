"""Values that others could have written: pickled, and signed with HMAC-SHA256.

Nothing is unpickled before its signature was checked: unpickling forged bytes
would run the forger's code.
"""

import contextlib
import fcntl
import hashlib
import hmac
import logging
import math
import os
import pickle
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from caching_heuristics import FINITE, check_number
from kvttl import user_path, whole_file

logger = logging.getLogger(__name__)

SECRET_BYTES = 32  # of a generated secret: HMAC-SHA256 gains nothing from more
MIN_SECRET_BYTES = 16  # of a given one: whoever guesses it can run code here
MAX_MTIME_S = 2.0**32  # year 2106; file systems differ in how far they go
STALE_TEMP_S = 3600.0  # a temp file this old is a crashed writer's, not a slow one's


def check_seconds(field: str, seconds: Any) -> float:
    """Return a time span as a float, or raise a ValueError that names the field."""
    return check_number(field, seconds, 0, FINITE, open_low=True)


def key_bytes(key: Any) -> bytes:
    """Return a key as bytes, or raise if it is not a non-empty str."""
    if not isinstance(key, str):
        raise TypeError(f"key must be a non-empty str, got {type(key).__name__}")
    if not key:
        raise ValueError("key must be a non-empty str, got ''")
    return key.encode("utf-8", "surrogatepass")


def sha256(name: bytes) -> bytes:
    """Return the 32-byte digest that a record is bound to and filed under."""
    return hashlib.sha256(name).digest()


def dump(value: Any) -> bytes:
    """Pickle a value, or raise a ValueError if it cannot be stored."""
    if value is None:
        raise ValueError("value must not be None: get() could not tell it from a miss")
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # a value's own __reduce__ may raise anything
        kind = type(value).__name__
        raise ValueError(f"value must be picklable, got a {kind}: {error}") from error


def load(payload: bytes | memoryview) -> Any:
    """Unpickle a payload whose origin is known; None, with a warning, if it is unreadable."""
    try:
        return pickle.loads(payload)  # noqa: S301 - its own bytes, or opened by a Signer
    except Exception as error:  # noqa: BLE001 - anything, such as a class that has moved since
        logger.warning("a stored value is no longer readable, taken as a miss: %r", error)
        return None


class Record(NamedTuple):
    """A payload and when it ends."""

    expires_at_s: float  # on the writer's clock
    payload: bytes | memoryview


class Signer:
    """Seals payloads, and opens only what the same secret sealed for the same tier and name."""

    _HEAD = struct.Struct("<8s32sd")  # tier, SHA-256 of the name, expiry in s; all of it signed

    def __init__(self, secret: bytes | None, tier: str):
        secret = secrets.token_bytes(SECRET_BYTES) if secret is None else secret
        if not isinstance(secret, bytes) or len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"secret must be at least {MIN_SECRET_BYTES} bytes")  # never shown
        self._secret = secret
        self._tier = tier.encode().ljust(8, b"\0")

    def seal(self, name: bytes, payload: bytes, expires_at_s: float = math.inf) -> bytes:
        """Return the signed record of a payload: MAC, tier, name, expiry, payload."""
        body = self._HEAD.pack(self._tier, name, expires_at_s) + payload
        return hmac.digest(self._secret, body, "sha256") + body

    def open(self, name: bytes, record: bytes) -> Record | None:
        """Return what was sealed under `name`; None, with a warning, for anything else."""
        mac, body = record[:32], memoryview(record)[32:]
        genuine = hmac.compare_digest(mac, hmac.digest(self._secret, body, "sha256"))
        if genuine and len(body) >= self._HEAD.size:
            tier, signed_name, expires_at_s = self._HEAD.unpack_from(body)
            if (tier, signed_name) == (self._tier, name):
                return Record(expires_at_s, body[self._HEAD.size :])
        logger.warning("%s is torn, forged or foreign, taken as a miss", name.hex())
        return None


class SealedFolder:
    """Signed records that expire, one file each; threads and processes may share the folder.

    A file is written aside and moved into place, so a crash leaves the old record or the new one.

    Parameters
    ----------
    path : str or Path
        Made with mode 0700 where it is missing.
    secret : bytes, optional
        By default the folder's ``.hmac_key``, made at random.
    tier : str
        Part of each signature.
    timer : callable
        Clock in seconds, the same for all that share the folder.

    Raises
    ------
    PermissionError
        Where others could have read or written ``.hmac_key``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        secret: bytes | None,
        tier: str,
        timer: Callable[[], float] = time.time,
    ) -> None:
        self._path = user_path(path).absolute()  # a later chdir must not split the cache
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._timer = timer
        self._signer = Signer(self._folder_secret() if secret is None else secret, tier)

    def read(self, name: bytes) -> Record | None:
        """Return a record that has not expired; one that has is removed."""
        record = self._open(name)
        if record is None or self._timer() < record.expires_at_s:
            return record
        self._drop_expired(name)
        return None

    def write(self, name: bytes, payload: bytes, ttl_s: float) -> None:
        """Keep a payload for `ttl_s` seconds."""
        expires_at_s = self._timer() + ttl_s
        hint_s = min(expires_at_s, MAX_MTIME_S)  # spares purge() the reading; the signed one rules
        with whole_file(self._path / name.hex(), 0o600, self._locked()) as file:
            file.write(self._signer.seal(name, payload, expires_at_s))
            file.flush()  # a later write would change the time
            os.utime(file.fileno(), (hint_s, hint_s))

    def delete(self, name: bytes) -> bool:
        """Remove a record; return whether it was there and had not expired."""
        with self._locked():
            record = self._open(name)
            (self._path / name.hex()).unlink(missing_ok=True)  # an unreadable one as well
        return record is not None and self._timer() < record.expires_at_s

    def purge(self) -> int:
        """Remove expired records, and what crashes left behind; return how many records went."""
        for temp in self._path.glob(".*.part"):
            if time.time() - _mtime_s(temp) > STALE_TEMP_S:
                temp.unlink(missing_ok=True)
        files = self._path.glob("[0-9a-f]" * 64)
        due = [file.name for file in files if _mtime_s(file) <= self._timer()]
        return sum(self._drop_expired(bytes.fromhex(name)) for name in due)

    def _open(self, name: bytes) -> Record | None:
        try:
            with open(self._path / name.hex(), "rb", opener=open_plain) as file:
                return self._signer.open(name, file.read())
        except FileNotFoundError:
            return None
        except OSError as error:  # such as a link or a folder in its place
            logger.warning("%s cannot be read, taken as a miss: %s", name.hex(), error)
            return None

    def _drop_expired(self, name: bytes) -> bool:
        with self._locked():  # looked at again: someone may just have renewed it
            record = self._open(name)
            expired = record is not None and not self._timer() < record.expires_at_s
            if expired:
                (self._path / name.hex()).unlink(missing_ok=True)
        return expired

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # holds off threads and processes alike
            yield
        finally:
            os.close(descriptor)  # which unlocks

    def _folder_secret(self) -> bytes:
        path = self._path / ".hmac_key"
        with self._locked():  # so that all who share the folder agree on one
            if not os.path.lexists(path):
                with whole_file(path, 0o600) as file:
                    file.write(secrets.token_bytes(SECRET_BYTES))
            with open(path, "rb", opener=open_plain) as file:
                info, secret = os.fstat(file.fileno()), file.read(SECRET_BYTES + 1)
        if info.st_uid != os.geteuid() or info.st_mode & 0o077 or len(secret) != SECRET_BYTES:
            raise PermissionError(f"{path} must hold {SECRET_BYTES} bytes, be yours and mode 0600")
        return secret


def open_plain(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=)`: no link, and no waiting pipe."""
    # Follows no link, and does not wait for a writer where someone has put a pipe.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _mtime_s(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # gone since it was listed
        return math.inf
