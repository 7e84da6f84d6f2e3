"""LMCache's adapter `resp` for Redis, with a client that survives what Redis answers.

The client that comes with LMCache 0.5.6 reads as many bytes as a *good* answer has. After an
error (Redis full, read-only, cluster redirect) all later answers on that connection belong to
earlier questions, so a chunk can be served with **another chunk's bytes**; a chunk that was
evicted since it was looked up, and a Redis that hangs, block a connection, and generations
with it, for good; and it never connects again. This one uses redis-py: TLS, time limits,
reconnecting. `install_redis_adapter` puts it in the other one's place; LMCache sees no difference.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import redis
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import factory, native_connector_l2_adapter

from kvttl.lmcache.client import CircuitBreaker
from kvttl.lmcache.tiers import pages, parse_key
from kvttl.stack.disk_adapter import ChecksCopies, verify_every_s
from kvttl.stack.reconcile import chunk_names, sizes_of
from kvttl.storage.checksum import CHECKSUM_BYTES, checksum
from kvttl.storage.redis_client import connect_as_server

_object_key_to_string = native_connector_l2_adapter._object_key_to_string
_SOCKET_READ_BYTES = 2**20  # a chunk can have megabytes
_TILE_KEYS = 16  # a command's share of a batch: large answers of many chunks in parts
_VERIFY_KEYS = 1000
_LOOKS = 3  # for what a store that failed may have written
_RETRY_AFTER_S = 1.0

Completion = tuple[int, bool, str, list[bool] | None]


class RedisClient:
    """Answers batches of keys on a few threads, in the shape of LMCache's native clients.

    Parameters
    ----------
    connection : redis.Redis
        After a wait that was too long Redis counts as away: all fails at once until a PING,
        sent once a second beside the callers, comes back.
    workers : int
        Threads, and connections.
    """

    def __init__(self, connection: redis.Redis, workers: int = 8) -> None:
        self._redis, self._has_new_connection = connection, False
        connection.connection_pool.connection_kwargs["redis_connect_func"] = self._on_connect
        self._breaker = CircuitBreaker(_RETRY_AFTER_S)
        self._pool = ThreadPoolExecutor(workers, "redis-l2")
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._done: list[Completion] = []
        self._ids = itertools.count(1)
        self.on_absent: Callable[[list[str]], None] = lambda _keys: None
        self.on_doubt: Callable[[list[str]], None] = lambda _keys: None
        self.on_damaged: Callable[[list[str]], None] = lambda _keys: None
        self.is_known: Callable[[str], bool] = lambda _key: True  # a guess; it saves commands

    def event_fd(self) -> int:
        """Return the descriptor that is readable when a batch is done."""
        return self._event_fd

    def submit_batch_get(self, keys: Sequence[str], views: Sequence[memoryview]) -> int:
        """Fill each view with its key's value; one that is absent or damaged is False, and gone."""
        return self._submit(self._get, list(keys), list(views))

    def submit_batch_set(self, keys: Sequence[str], views: Sequence[memoryview]) -> int:
        """Store all; after an error some may be there, whole ones, and `on_doubt` hears of it."""
        return self._submit(self._set, list(keys), list(views))

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Say which keys there are."""
        return self._submit(self._exists, list(keys))

    def drain_completions(self) -> list[Completion]:
        """Return what is done: (future id, success, error, result of each key)."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._event_fd)
            done, self._done = self._done, []
        return done

    def delete(self, keys: Sequence[str]) -> None:
        """Delete keys, now; raises where Redis fails."""
        self._ask(lambda: [self._redis.delete(*part) for part in pages(list(keys), _TILE_KEYS)])

    def probe(self) -> bool:
        """Say whether Redis answers now; if so, batches are sent to it again."""
        try:
            self._redis.ping()
        except (redis.RedisError, OSError) as error:
            self._breaker.failed(str(error))
            return False
        self._breaker.succeeded()
        return True

    def sizes(self, keys: Sequence[str]) -> list[int]:
        """Return each key's bytes, now, 0 where there is none; raises where Redis fails."""
        return [max(0, size - CHECKSUM_BYTES) for size in sizes_of(self._redis, keys)]

    def names_of_new_redis(self) -> list[str]:
        """Return the names of all chunks if Redis may be another one than at the last call."""
        looks, self._has_new_connection = self._has_new_connection, False
        return chunk_names(self._redis) if looks else []

    def close(self) -> None:
        """End the threads, close the connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._redis.close()
        os.close(self._event_fd)

    def _on_connect(self, connection):
        self._has_new_connection = True
        connection.on_connect()

    # ---- on a worker's thread ------------------------------------------------------

    def _submit(self, work, *arguments):
        future_id = next(self._ids)
        self._pool.submit(self._run, future_id, work, arguments)
        return future_id

    def _run(self, future_id, work, arguments):
        try:
            done = (future_id, True, "", self._ask(lambda: work(*arguments)))
        except Exception as error:  # whatever it is: who waits for this batch must hear of it
            done = (future_id, False, f"{type(error).__name__}: {error}", None)
            print(f"redis: {done[2]}", flush=True)
        with self._lock:
            self._done.append(done)
            os.eventfd_write(self._event_fd, 1)

    def _ask(self, question):
        """Ask Redis under the breaker: only a Redis that does not answer opens it."""
        self._breaker.check("Redis", ConnectionError, lambda: self._pool.submit(self.probe))
        try:
            return question()
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            self._breaker.failed(str(error))
            raise

    def _get(self, keys, views):
        values = (value for part in pages(keys, _TILE_KEYS) for value in self._redis.mget(part))
        found = list(map(_fill, keys, views, values))
        if not all(found):
            self._drop([key for key, good in zip(keys, found) if good is False])
            self.on_absent([key for key, good in zip(keys, found) if not good])
        return list(map(bool, found))

    def _drop(self, damaged):
        try:
            self.delete(damaged)
            self.on_damaged(damaged)
        except redis.ResponseError as error:  # such as a replica's; the others are good
            print(f"redis: damaged copies cannot be deleted: {error}", flush=True)

    def _set(self, keys, views):
        try:
            for part in pages(list(zip(keys, views)), _TILE_KEYS):
                with self._redis.pipeline(transaction=False) as pipe:
                    for key, view in part:
                        pipe.set(key, b"".join((view, checksum(key, view))))
                    pipe.execute()
        except redis.RedisError:
            self.on_doubt(keys)
            raise

    def _exists(self, keys):
        known = set(filter(self.is_known, keys))
        groups = [k for k in keys if k in known], [k for k in keys if k not in known]
        there = {key for group in groups for key in self._existing(group)}
        if absent := [key for key in keys if key not in there]:
            self.on_absent(absent)
        return [key in there for key in keys]

    def _existing(self, keys):
        """Return those that exist: one command where it is all or none, as it mostly is."""
        count = self._redis.exists(*keys) if keys else 0
        if count in (0, len(keys)):
            return keys if count else []
        return [key for key, size in zip(keys, self.sizes(keys)) if size]


def _fill(key, view, value):
    """Copy a value into its buffer: True, or False if it is damaged; None: it is absent."""
    if value is None:
        return None
    payload = memoryview(value)[:-CHECKSUM_BYTES]
    if len(payload) != len(view) or value[-CHECKSUM_BYTES:] != checksum(key, payload):
        return False
    np.frombuffer(view, np.uint8)[:] = np.frombuffer(payload, np.uint8)
    return True


class RedisL2Adapter(ChecksCopies, native_connector_l2_adapter.NativeConnectorL2Adapter):
    """LMCache's adapter over `RedisClient`; also tells the directory of chunks that are gone.

    LMCache's own reports the deletion of what it has stored in this life of the server, if it
    was still there: the directory would show for ever what Redis evicted, or lost in a restart.

    Parameters
    ----------
    client : RedisClient
        The connections.
    max_capacity_gb : float
        See LMCache's `resp`.
    verify_every_s : float
        How often Redis is asked whether it still has all chunks, seconds.
    """

    def __init__(
        self, client: RedisClient, max_capacity_gb: float = 0, verify_every_s: float = 10.0
    ) -> None:
        super().__init__(client, max_capacity_gb=max_capacity_gb, type_name="RedisClient")
        self._present: dict[str, object] = {}  # name in Redis -> LMCache's key
        self._doubtful: dict[str, int] = {}  # names of failed stores -> looks that are left
        client.on_absent, client.on_doubt = self._report_absent, self._doubt
        client.on_damaged = lambda names: self._count_damaged("remote", list(map(_key_of, names)))
        client.is_known = self._present.__contains__
        self._verify_every(verify_every_s)

    def know(self, names: Iterable[str]) -> None:
        """Take up what an earlier life of the server has stored."""
        self._present.update((name, _key_of(name)) for name in names)

    def verify(self) -> None:
        """Report the chunks that Redis lost, and those that it has in spite of an error.

        Or that it has again: one that comes back from a snapshot has what was deleted since.
        """
        if not self._client.probe():
            return
        try:
            for part in pages(list(self._present), _VERIFY_KEYS):
                self._report_absent(part)
            for part in pages(list(self._doubtful), _VERIFY_KEYS):
                self._report_found(part, self._client.sizes(part))
            # Looked at next time: a store that is under way reports its chunks itself.
            self._doubt([n for n in self._client.names_of_new_redis() if n not in self._present])
        except (redis.RedisError, OSError):
            return  # away: nothing is known, so nothing is said

    def delete(self, keys: list) -> None:
        """Delete and report it, whether the chunks were still there or not."""
        names = [_object_key_to_string(key) for key in keys]
        if names:
            self._client.delete(names)
            self._present.update(zip(names, keys))  # perhaps stored by another server
            self._report_gone(names)

    def _notify_keys_stored(self, keys, sizes):
        self._present.update((_object_key_to_string(key), key) for key in keys)
        super()._notify_keys_stored(keys, sizes)

    def _doubt(self, names):
        self._doubtful.update(dict.fromkeys(names, _LOOKS))

    def _report_found(self, names, sizes):
        """Count what is there as stored; what is not may still come from a slow Redis."""
        found = {name: size for name, size in zip(names, sizes) if size}
        for name in names:
            left = self._doubtful.pop(name, 0) - 1
            if name not in found and left > 0:
                self._doubtful[name] = left
        new = {_key_of(name): size for name, size in found.items() if name not in self._present}
        with self._lock:
            self._key_sizes.update(new)
        if new:
            self._notify_keys_stored(list(new), list(new.values()))

    def _report_absent(self, names):
        """Look which chunks are gone; after a miss once more, since a store may just have ended."""
        ours = [name for name in names if name in self._present]
        sizes = self._client.sizes(ours) if ours else ()
        self._report_gone([name for name, size in zip(ours, sizes) if not size])

    def _report_gone(self, names):
        keys = [key for name in names if (key := self._present.pop(name, None)) is not None]
        with self._lock:
            sizes = [self._key_sizes.pop(key, 0) for key in keys]
        if keys:
            self._notify_keys_deleted(keys, sizes)


def _key_of(name):
    model, rank, group, chunk, salt = parse_key(name)
    return ObjectKey(bytes.fromhex(chunk), model, rank, group, salt)


def install_redis_adapter() -> None:
    """Let LMCache's servers in this process use `RedisL2Adapter` where they ask for `resp`."""
    factory.ensure_adapter_loaded("resp")
    factory._L2_ADAPTER_FACTORY_REGISTRY["resp"] = _create


def _create(config, l1_memory_desc=None):
    connection = connect_as_server(config.host, config.port, socket_read_size=_SOCKET_READ_BYTES)
    client = RedisClient(connection, config.num_workers)
    adapter = RedisL2Adapter(client, config.max_capacity_gb, verify_every_s())
    adapter.know(chunk_names(connection))
    return adapter
