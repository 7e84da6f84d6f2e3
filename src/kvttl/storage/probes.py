"""Tries a tier with a small value: it is written, read, listed and deleted; failures in words."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import ssl
import tempfile
from pathlib import Path

import redis

LEAST_FREE_BYTES = 16 * 2**20  # a chunk of a large model
# Like a chunk's name, since it needs the same rights; but none that LMCache could read.
_PROBE_NAME = "kvttl-probe@probe@0@"
_PROBE_TTL_MS = 60_000  # where deleting fails
_RESP, _TLS_ALERT = (b"+", b"-"), b"\x15"  # what an answer begins with
_LOOK_S = 1.0
_RIGHTS = "+ping +set +mget +get +exists +strlen +scan +del ~*"
_UNTRUSTED = "give ?ssl_ca_certs=<file> with the certificate of who signed it"
_OTHER_NAME = "use a name that it holds, or ?ssl_check_hostname=false"
# By OpenSSL's code.
_CERTIFICATES = {10: "renew it on the server", 62: _OTHER_NAME, 64: _OTHER_NAME}
_NO_CLUSTER = "it is a node of a Redis Cluster, which is not supported"
_REPLICA = "it is a replica: give the address of the master"
_ERRORS = redis.exceptions
_ANSWERS = (  # a kind of error, what its text has, and what to say; the first one counts
    (redis.ResponseError, "MISCONF", "it refuses writes, since it could not save them (MISCONF)"),
    (redis.AuthenticationError, "HELLO|equired|NOAUTH", "it asks for a password"),
    (redis.AuthenticationError, "", "it refused the user or password"),
    (_ERRORS.NoPermissionError, "", "{0}; it needs " + _RIGHTS),
    (_ERRORS.ReadOnlyError, "", _REPLICA),
    (_ERRORS.OutOfMemoryError, "", "it is full: {0}"),
    ((_ERRORS.ClusterError, _ERRORS.ClusterCrossSlotError, _ERRORS.AskError), "", _NO_CLUSTER),
    (redis.ResponseError, "protected mode", "it is in protected mode: set a password there"),
    (redis.ResponseError, "unknown command", "it lacks commands of Redis: a Sentinel, or a proxy"),
    (redis.InvalidResponse, "", "what answers there is no Redis: {0}"),
)


class TierError(RuntimeError):
    """A tier cannot be used; the message has the cause in one line."""


def probe_folder(folder: str | os.PathLike) -> None:
    """Write, read, list and delete a file in a folder, which is made where it is missing.

    Raises
    ------
    TierError
        With the cause: no folder, no permission, read-only, full.
    """
    value = secrets.token_bytes(64)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".kvttl-probe-", dir=folder) as file:
            file.write(value)
            file.flush()
            os.fsync(file.fileno())
            there = Path(file.name).name in os.listdir(folder)
            if not there or Path(file.name).read_bytes() != value:
                raise TierError("what is written there does not come back")
        free_bytes = shutil.disk_usage(folder).free
    except FileExistsError:
        raise TierError("it is a file, not a folder") from None
    except OSError as error:
        raise TierError(error.strerror or str(error)) from error
    if free_bytes < LEAST_FREE_BYTES:
        least = f"at least {LEAST_FREE_BYTES / 2**20:.0f} MiB are needed"
        raise TierError(f"the disk is full: {free_bytes / 2**20:.1f} MiB free, {least}")


def hold_folder(folder: str | os.PathLike) -> int:
    """Take a disk tier's folder for one server of this kit; returns the descriptor that holds it.

    It holds until it is closed or the process ends, however that ends. Servers of one folder
    would delete each other's KV; those of one coordinator see each other, others only this.

    Raises
    ------
    TierError
        A server has it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise TierError("another LMCache server uses it: each needs a folder of its own") from None
    except OSError:  # a network's file system without locks
        return descriptor
    return descriptor


def probe_redis(client: redis.Redis) -> str:
    """Write, read, list and delete two values as `redis_adapter` does.

    Returns
    -------
    str
        What is risky about this Redis, or an empty text.

    Raises
    ------
    TierError
        With the cause; see `reason_of`.
    """
    names = [_PROBE_NAME + secrets.token_hex(8) for _ in range(2)]
    value = secrets.token_bytes(64)
    try:
        client.ping()
        with client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.set(name, value, px=_PROBE_TTL_MS)
            pipe.execute()
        came_back = client.mget(names) == [value] * 2 and client.strlen(names[0]) == len(value)
        client.scan(match=_PROBE_NAME + "*", count=1)
        if not came_back or client.exists(*names) != 2 or client.delete(*names) != 2:
            raise TierError("what is written there does not come back")
        with contextlib.suppress(redis.ResponseError):  # without the right to ask
            return _risk(client.info())
    except (redis.RedisError, OSError) as error:
        if isinstance(error, redis.ResponseError):
            with contextlib.suppress(redis.RedisError):
                client.delete(*names)
        raise TierError(reason_of(error, client)) from error
    return ""


def _risk(info):
    if info.get("role") == "slave":
        raise TierError(_REPLICA)
    policy = str(info.get("maxmemory_policy", ""))
    if policy.startswith("allkeys") and info.get("maxmemory"):
        return f"it evicts (maxmemory-policy {policy}), and what it drops is computed again"
    return ""


def reason_of(error: Exception, client: redis.Redis) -> str:
    """Return in one line why a call of Redis failed, and what to do about it."""
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            advice = _CERTIFICATES.get(cause.verify_code, _UNTRUSTED)
            return f"certificate verify failed: {cause.verify_message.rstrip('.')}; {advice}"
        if isinstance(cause, ssl.SSLError) and "CERTIFICATE" in (cause.reason or ""):
            files = "see ssl_ca_certs, ssl_certfile and ssl_keyfile"
            return f"{cause.reason.replace('_', ' ').lower()}: {files}"
    text = re.sub(r"^Command # .* of pipeline caused error: ", "", " ".join(str(error).split()))
    for kind, pattern, said in _ANSWERS:
        if isinstance(error, kind) and re.search(pattern, text):
            return said.format(text.rstrip("."))
    if isinstance(error, redis.ResponseError):
        return text
    hangs = isinstance(error, redis.TimeoutError) and "reading" in text
    if not hangs and (hint := _other_protocol(client.connection_pool)):
        return hint
    refused = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    return f"no Redis answers there ({refused[-1] if refused else text})"


def _chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _other_protocol(pool):
    """Say so if TLS is spoken where it was not expected, or not where it was, or no Redis."""
    options = pool.connection_kwargs
    if "host" not in options:
        return ""
    address = options["host"], options.get("port", 6379)
    reply, expects_tls = _reply(address), issubclass(pool.connection_class, redis.SSLConnection)
    if expects_tls and reply.startswith(_RESP):
        return "it does not speak TLS: write redis://"
    if not expects_tls and _speaks_tls(address):
        return "it speaks TLS: write rediss://"
    if reply and not reply.startswith((*_RESP, _TLS_ALERT)):
        return f"what answers there is no Redis: {reply.splitlines()[0]!r}"
    return ""


def _reply(address):
    with contextlib.suppress(OSError), socket.create_connection(address, _LOOK_S) as plain:
        plain.sendall(b"PING\r\n")
        return plain.recv(80)
    return b""


def _speaks_tls(address):
    with contextlib.suppress(OSError):
        return bool(ssl.get_server_certificate(address, timeout=_LOOK_S))
    return False
