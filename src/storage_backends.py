"""Storage backends, one per tier, behind one small contract.

Every backend keeps a pickled copy, so a stored value does not change with the caller's object,
and all of them refuse the same keys, values and ttls. What others could have written (disk,
Redis) is unpickled only after its HMAC-SHA256 signature was checked: unpickling forged bytes
would run the forger's code.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import numbers
import os
import secrets
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis
from cachetools import TLRUCache

from kvttl.storage.sealed import (
    SECRET_BYTES,
    Record,
    Signer,
    check_seconds,
    dump,
    key_bytes,
    load,
    sha256,
)

logger = logging.getLogger(__name__)

MAX_REDIS_TTL_MS = 2**53  # 285,000 years; Redis refuses what overflows its 64-bit clock
MAX_MTIME_S = 2.0**32  # year 2106; file systems differ in how far they go
STALE_TEMP_S = 3600.0  # a temp file this old is a crashed writer's, not a slow one's


class BaseBackend(ABC):
    """The contract of every tier's storage; safe to share between threads.

    ``tier`` names the tier that a backend serves: ``"gpu"``, ``"disk"`` or ``"remote"``.
    """

    tier: str

    @abstractmethod
    def get(self, key: str) -> Any:
        """Return a copy of the value of ``key``, or None where it is absent or has expired."""

    @abstractmethod
    def set(self, key: str, value: Any, ttl: float) -> None:
        """Keep a copy of ``value`` for ``ttl`` seconds, in place of value and ttl of before.

        Parameters
        ----------
        key : str
            Any non-empty text.
        value : object
            Anything picklable but None.
        ttl : float
            Seconds, > 0 and finite.

        Raises
        ------
        TypeError, ValueError
            Names the field, the value and what is allowed; the value of before stays.
        """

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Forget ``key`` and return whether it was there."""

    def close(self) -> None:
        """Let go of connections; what is stored stays."""


class InMemoryBackend(BaseBackend):
    """Hot tier: pickled copies in this process; when full, the least recently used go.

    Parameters
    ----------
    max_bytes : int
        Bound on the pickled values, in bytes; an entry costs about 0.5 kB on top.
        A value over the bound is a ValueError.
    timer : callable
        Clock in seconds.

    Examples
    --------
    >>> hot = InMemoryBackend()
    >>> hot.set("chunk", [1, 2], ttl=60)
    >>> hot.get("chunk"), hot.delete("chunk"), hot.get("chunk")
    ([1, 2], True, None)
    """

    tier = "gpu"

    def __init__(self, max_bytes: int = 256 * 2**20, timer: Callable[[], float] = time.monotonic):
        if not isinstance(max_bytes, numbers.Integral) or max_bytes < 1:
            raise ValueError(f"max_bytes must be a whole number > 0, got {max_bytes!r}")
        self._cache = TLRUCache(
            max_bytes,
            ttu=lambda _name, record, _now: record.expires_at_s,
            timer=timer,
            getsizeof=lambda record: len(record.payload),
        )
        self._lock = threading.Lock()

    def get(self, key: str) -> Any:
        name = key_bytes(key)
        with self._lock:
            record = self._cache.get(name)
        return None if record is None else load(record.payload)

    def set(self, key: str, value: Any, ttl: float) -> None:
        name, payload, ttl_s = key_bytes(key), dump(value), check_seconds("ttl", ttl)
        if len(payload) > self._cache.maxsize:
            limit = f"at most max_bytes={self._cache.maxsize} bytes"
            raise ValueError(f"value must be {limit} when pickled, got {len(payload)}")
        with self._lock:
            self._cache[name] = Record(self._cache.timer() + ttl_s, payload)

    def delete(self, key: str) -> bool:
        name = key_bytes(key)
        with self._lock:
            return self._cache.pop(name, None) is not None


class LocalDiskBackend(BaseBackend):
    """Warm tier: one signed file per key, named after the key's SHA-256; survives a restart.

    A file is written aside and moved into place, so a crash leaves the old value or the new one.

    Parameters
    ----------
    path : str or Path
        Folder; made with mode 0700 where it is missing. Processes may share it.
    secret : bytes, optional
        Signs the files, 16 bytes or more. By default the folder's ``.hmac_key``, made at random.
    timer : callable
        Clock in seconds, the same for all that share the folder.

    Raises
    ------
    PermissionError
        Where others could have read or written ``.hmac_key``.

    Examples
    --------
    >>> folder = tempfile.TemporaryDirectory()
    >>> LocalDiskBackend(folder.name).set("chunk", [1, 2], ttl=60)
    >>> LocalDiskBackend(folder.name).get("chunk")
    [1, 2]
    >>> folder.cleanup()
    """

    tier = "disk"

    def __init__(
        self,
        path: str | os.PathLike[str] = "./cache_warm/",
        secret: bytes | None = None,
        timer: Callable[[], float] = time.time,
    ):
        self._folder = Path(path).absolute()  # a later chdir must not split the cache
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._timer = timer
        self._signer = Signer(self._folder_secret() if secret is None else secret, self.tier)
        self.purge()

    def get(self, key: str) -> Any:
        name = sha256(key_bytes(key))
        record = self._read(name)
        if record is not None and self._timer() < record.expires_at_s:
            return load(record.payload)
        if record is not None:
            self._drop_expired(name)
        return None

    def set(self, key: str, value: Any, ttl: float) -> None:
        name, payload, ttl_s = sha256(key_bytes(key)), dump(value), check_seconds("ttl", ttl)
        expires_at_s, target = self._timer() + ttl_s, self._folder / name.hex()
        hint_s = min(expires_at_s, MAX_MTIME_S)  # spares purge() the reading; the signed one rules
        with self._staged(self._signer.seal(name, payload, expires_at_s)) as temp, self._locked():
            os.replace(temp, target)
            os.utime(target, (hint_s, hint_s))

    def delete(self, key: str) -> bool:
        name = sha256(key_bytes(key))
        with self._locked():
            record = self._read(name)
            (self._folder / name.hex()).unlink(missing_ok=True)  # an unreadable one as well
        return record is not None and self._timer() < record.expires_at_s

    def purge(self) -> int:
        """Remove expired entries, and what crashes left behind; return how many entries went."""
        for temp in self._folder.glob(".tmp-*"):
            if time.time() - _mtime_s(temp) > STALE_TEMP_S:
                temp.unlink(missing_ok=True)
        files = self._folder.glob("[0-9a-f]" * 64)
        due = [file.name for file in files if _mtime_s(file) <= self._timer()]
        return sum(self._drop_expired(bytes.fromhex(name)) for name in due)

    def _read(self, name: bytes) -> Record | None:
        try:
            with open(self._folder / name.hex(), "rb", opener=_open_plain) as file:
                return self._signer.open(name, file.read())
        except FileNotFoundError:
            return None
        except OSError as error:  # such as a link or a folder in its place
            logger.warning("%s cannot be read, taken as a miss: %s", name.hex(), error)
            return None

    def _drop_expired(self, name: bytes) -> bool:
        with self._locked():  # looked at again: someone may just have renewed it
            record = self._read(name)
            expired = record is not None and not self._timer() < record.expires_at_s
            if expired:
                (self._folder / name.hex()).unlink(missing_ok=True)
        return expired

    @contextlib.contextmanager
    def _staged(self, content: bytes) -> Iterator[str]:
        descriptor, temp = tempfile.mkstemp(prefix=".tmp-", dir=self._folder)  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name on no data
            yield temp
        finally:
            Path(temp).unlink(missing_ok=True)  # still there only if it was not moved into place

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(self._folder / ".lock", flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # holds off threads and processes alike
            yield
        finally:
            os.close(descriptor)  # which unlocks

    def _folder_secret(self) -> bytes:
        path = self._folder / ".hmac_key"
        with self._locked():  # so that all who share the folder agree on one
            if not os.path.lexists(path):
                with self._staged(secrets.token_bytes(SECRET_BYTES)) as temp:
                    os.replace(temp, path)
            with open(path, "rb", opener=_open_plain) as file:
                info, secret = os.fstat(file.fileno()), file.read(SECRET_BYTES + 1)
        if info.st_uid != os.geteuid() or info.st_mode & 0o077 or len(secret) != SECRET_BYTES:
            raise PermissionError(f"{path} must hold {SECRET_BYTES} bytes, be yours and mode 0600")
        return secret


def _open_plain(path: str, flags: int) -> int:
    # Follows no link, and does not wait for a writer where someone has put a pipe.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _mtime_s(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # gone since it was listed
        return math.inf


class RemoteBackend(BaseBackend):
    """Cold tier: signed values in Redis, which expires them itself.

    Parameters
    ----------
    url : str, optional
        ``redis://[user:password@]host:port/db``, or ``rediss://`` for TLS. Without it and
        ``client``: a private fakeredis in this process.
    key_prefix : str
        Stands before every key in Redis.
    secret : bytes, optional
        Signs the values, 16 bytes or more; all who share data must share it. By default random:
        then only this instance can read what it has written.
    client : redis.Redis, optional
        Used as it is instead of ``url``, and left open by ``close()``.
    timeout_s : float
        Longest wait in seconds for a connection, and for an answer.
    **options
        Passed on to ``redis.Redis.from_url``, such as ``ssl_ca_certs``.

    Raises
    ------
    ValueError
        Where an argument cannot be used.
    ConnectionError
        From get, set and delete where Redis fails; names its address without the password.

    Examples
    --------
    >>> cold = RemoteBackend()
    >>> cold.set("chunk", [1, 2], ttl=0.5)
    >>> cold.get("chunk")
    [1, 2]
    """

    tier = "remote"

    def __init__(
        self,
        url: str | None = None,
        key_prefix: str = "kvttl:",
        secret: bytes | None = None,
        client: redis.Redis | None = None,
        timeout_s: float = 5.0,
        **options: Any,
    ):
        if client is not None and url is not None or options and url is None:
            raise ValueError("give a url (options only with it) or a client, not both")
        timeout_s = check_seconds("timeout_s", timeout_s)
        self._prefix = key_prefix.encode()
        self._signer = Signer(secret, self.tier)
        self._owns_client = client is None
        self._client = _connect(url, timeout_s, options) if client is None else client
        if self._client.get_encoder().decode_responses:
            raise ValueError("decode_responses must be off: the values are bytes")
        self.address = _address(self._client)

    def get(self, key: str) -> Any:
        redis_key = self._redis_key(key)
        with self._calling():
            sealed = self._client.get(redis_key)
        record = None if sealed is None else self._signer.open(sha256(redis_key), sealed)
        return None if record is None else load(record.payload)

    def set(self, key: str, value: Any, ttl: float) -> None:
        redis_key, payload, ttl_s = self._redis_key(key), dump(value), check_seconds("ttl", ttl)
        ttl_ms = math.ceil(min(ttl_s * 1000, MAX_REDIS_TTL_MS))  # up: 0 ms would be refused
        with self._calling():
            self._client.set(redis_key, self._signer.seal(sha256(redis_key), payload), px=ttl_ms)

    def delete(self, key: str) -> bool:
        redis_key = self._redis_key(key)
        with self._calling():
            return bool(self._client.delete(redis_key))

    def close(self) -> None:
        if self._owns_client:
            self._client.close()

    def _redis_key(self, key: str) -> bytes:
        return self._prefix + key_bytes(key)

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise ConnectionError(f"Redis at {self.address} failed: {error}") from error


def _connect(url: str | None, timeout_s: float, options: dict[str, Any]) -> redis.Redis:
    if url is None:
        import fakeredis  # here, since a deployment with a real Redis need not have it

        return fakeredis.FakeRedis(server=fakeredis.FakeServer())
    defaults = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    try:
        return redis.Redis.from_url(url, **(defaults | options))
    except (ValueError, AttributeError):  # not chained: redis-py shows parts of the password
        raise ValueError("url must look like redis[s]://[user:password@]host:port/db") from None


def _address(client: redis.Redis) -> str:
    # Not cut out of the url, where a strange password could slip through.
    pool = client.connection_pool
    options = pool.connection_kwargs
    scheme = "rediss" if issubclass(pool.connection_class, redis.SSLConnection) else "redis"
    login = "***@" if options.get("password") else ""
    host = options.get("path") or f"{options.get('host')}:{options.get('port', 6379)}"
    return f"{scheme}://{login}{host}/{options.get('db', 0)}"
