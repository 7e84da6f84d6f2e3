"""LMCache's adapter `fs` with files that end in a checksum: a damaged copy is a miss, once.

The adapter of LMCache 0.5.6 serves whatever a file holds: flipped bytes or another chunk's file
become a **wrong text**, also where a file is too long. A file that is too short is neither served
nor written again, and the directory shows for ever what somebody has deleted. Here such a copy is
deleted, and the directory told, before the load is reported as failed: vLLM computes the chunk
anew and LMCache stores it. `install_disk_adapter` puts this adapter in the other one's place.
"""

import asyncio
import errno
import itertools
import os

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.l2_adapters import factory, fs_l2_adapter
from lmcache.v1.mp_observability.event import Event, EventType

from kvttl.background import Repeater
from kvttl.lmcache.tiers import pages
from kvttl.storage.checksum import CHECKSUM_BYTES, checksum
from kvttl.storage.sealed import open_plain

_READERS = 4  # threads of one load
# The process lacks something; of the file nothing is known.
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


def verify_every_s() -> float:
    """Return how often a tier is asked whether it still has all chunks, seconds."""
    return float(os.environ.get("KV_REDIS_VERIFY_S", "10"))


class ChecksCopies:
    """What LMCache's L2 adapters have in common here: they say what is damaged or lost."""

    _damaged = 0

    def _verify_every(self, every_s: float) -> None:
        self._verifier = Repeater(self.verify, every_s)
        self._verifier.start()

    def close(self) -> None:
        """Stop verifying, then as LMCache does."""
        self._verifier.close()
        super().close()

    def report_status(self) -> dict[str, object]:
        """Return LMCache's status of the adapter, and the damaged copies since its start."""
        return super().report_status() | {"damaged_copies": self._damaged}

    def _count_damaged(self, tier: str, keys: list) -> None:
        """Say it in the server's log, in its /status and in its /metrics."""
        if not keys:
            return
        self._damaged += len(keys)
        print(
            f"{tier}: {len(keys)} damaged copies are deleted, to be computed and stored anew "
            f"(the first: chunk {keys[0].chunk_hash.hex()})",
            flush=True,
        )
        reason = {"reason": "damaged", "keys": keys}
        self._event_bus.publish(Event(EventType.L2_PREFETCH_FAILED, metadata=reason))


class DiskAdapter(ChecksCopies, fs_l2_adapter.FSL2Adapter):
    """LMCache's adapter with checked files; also tells the directory of files that are gone.

    Parameters
    ----------
    config : FSL2AdapterConfig
        See LMCache's `fs`.
    """

    def __init__(self, config: fs_l2_adapter.FSL2AdapterConfig) -> None:
        super().__init__(config)
        for half_written in self._base_path.glob("*@*@*@*.tmp"):  # by a server that was killed
            half_written.unlink(missing_ok=True)
        keys = map(fs_l2_adapter._filename_to_object_key, os.listdir(self._base_path))
        # Key -> bytes that LMCache has counted; nothing in an earlier life of the server.
        self._known = dict.fromkeys(filter(None, keys), 0)
        self._verify_every(verify_every_s())

    def verify(self) -> None:
        """Report files that are gone: a demotion would trust them, and delete the last copy."""
        there, name_of = set(os.listdir(self._base_path)), fs_l2_adapter._object_key_to_filename
        gone = [key for key in tuple(self._known) if name_of(key) not in there]
        self._loop.call_soon_threadsafe(self._report_gone, gone)

    async def _execute_store(self, keys, objects, task_id):
        names = (self._key_to_path(key).name for key in keys)
        await super()._execute_store(keys, map(_WithChecksum, names, objects), task_id)

    async def _key_exists_on_disk(self, key):
        there = await super()._key_exists_on_disk(key)
        if not there:
            self._report_gone([key])
        return there

    async def _execute_load(self, keys, objects, task_id):
        loaded = Bitmap(len(keys))
        try:
            pairs = list(zip(keys, objects, strict=True))
            parts = pages(pairs, -(-len(pairs) // _READERS) or 1)
            reads = (self._loop.run_in_executor(None, self._read_all, part) for part in parts)
            first_try = itertools.chain.from_iterable(await asyncio.gather(*reads))
            # Read again, where no store of this server can end meanwhile: it may have been stored.
            found = [good or self._read(pair) for good, pair in zip(first_try, pairs)]
            for at in (at for at, good in enumerate(found) if good):
                loaded.set(at)
            self._delete_damaged([key for key, good in zip(keys, found) if good is False])
            if accessed := [key for key, good in zip(keys, found) if good]:
                self._notify_keys_accessed(accessed)
        finally:  # whatever happens: who waits for this load must hear of it
            with self._lock:
                self._completed_load_tasks[task_id] = loaded
            self._load_efd.notify()

    async def _execute_delete(self, keys):
        for key in keys:
            self._known.setdefault(key, 0)  # perhaps stored by another server
        await super()._execute_delete(keys)
        self._report_gone(keys)
        return [], []  # all is reported

    def _read_all(self, pairs):
        return list(map(self._read, pairs))

    def _read(self, pair):
        """Fill an object from its file: True, or False if that is damaged; None: nothing known."""
        path, view = self._key_to_path(pair[0]), pair[1].byte_array
        try:
            with open(path, "rb", opener=open_plain) as file:
                size_bytes, end = file.readinto(view), file.read(CHECKSUM_BYTES + 1)
        except OSError as error:  # one that is not there is no less gone
            return None if error.errno in _PASSING else False
        return size_bytes == len(view) and end == checksum(path.name, view)

    def _delete_damaged(self, keys):
        damaged = []
        for key in keys:
            try:
                self._key_to_path(key).unlink()
                damaged.append(key)
            except FileNotFoundError:
                continue
            except OSError as error:
                print(f"disk: a damaged copy cannot be deleted: {error}", flush=True)
        self._count_damaged("disk", damaged)
        self._report_gone(keys)

    # ---- on the loop's thread, where the end of a store is reported, too -------------------

    def _report_gone(self, keys):
        known = [key for key in keys if key in self._known]
        if gone := [key for key in known if not os.path.lexists(self._key_to_path(key))]:
            self._notify_keys_deleted(gone, [self._known.pop(key) for key in gone])

    def _notify_keys_stored(self, keys, sizes):
        self._known.update(zip(keys, sizes))
        super()._notify_keys_stored(keys, sizes)


class _WithChecksum:
    """An object of LMCache as it is written; made only for a file that is not there yet."""

    def __init__(self, name, memory_object):
        self._name, self._object = name, memory_object

    @property
    def byte_array(self):
        payload = self._object.byte_array
        return b"".join((payload, checksum(self._name, payload)))


def install_disk_adapter() -> None:
    """Let LMCache's servers in this process use `DiskAdapter` where they ask for `fs`."""
    factory.ensure_adapter_loaded("fs")
    factory._L2_ADAPTER_FACTORY_REGISTRY["fs"] = lambda config, _l1=None: DiskAdapter(config)
