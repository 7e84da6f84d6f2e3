"""Values that others could have written: pickled, and signed with HMAC-SHA256.

Nothing is unpickled before its signature was checked: unpickling forged bytes
would run the forger's code.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import math
import numbers
import pickle
import secrets
import struct
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

SECRET_BYTES = 32  # of a generated secret: HMAC-SHA256 gains nothing from more
MIN_SECRET_BYTES = 16  # of a given one: whoever guesses it can run code here


def check_seconds(field: str, seconds: Any) -> float:
    """Return a time span as a float, or raise a ValueError that names the field."""
    if isinstance(seconds, numbers.Real) and not isinstance(seconds, bool):
        with contextlib.suppress(OverflowError):  # an int too big for a float
            if 0 < float(seconds) < math.inf:  # false for NaN
                return float(seconds)
    raise ValueError(f"{field} must be a number of seconds > 0, got {seconds!r:.60}")


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
