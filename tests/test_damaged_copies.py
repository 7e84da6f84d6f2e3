"""A damaged copy of a chunk, on disk or in Redis, is a miss, once: never a wrong text.

The adapters first, as LMCache's server calls them, then the real stack.
"""

from __future__ import annotations

import json
import os
import resource
import select
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
import requests
import torch
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import parse_args
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from lmcache.v1.distributed.storage_manager import StorageManager
from waiting import LIMIT_S, wait_until

from cache_controller import LMCacheController
from caching_heuristics import TIERS
from kvttl.lmcache.client import LMCacheHTTP
from kvttl.lmcache.tiers import ChunkKey, parse_key
from kvttl.stack.child import install_adapters
from kvttl.stack.disk_adapter import DiskAdapter
from kvttl.stack.reconcile import redis_contents
from kvttl.stack.redis_adapter import RedisClient, RedisL2Adapter
from kvttl.storage.checksum import CHECKSUM_BYTES

SIZE_BYTES = 40_000


def flipped(data, _other):
    return bytes(byte ^ 0x5A if at % 2 else byte for at, byte in enumerate(data))


def one_bit_flipped(data, _other):
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


DAMAGE = {
    "truncated": lambda data, _other: data[: len(data) // 2],
    "last byte gone": lambda data, _other: data[:-1],
    "empty": lambda data, _other: b"",
    "flipped": flipped,
    "one bit flipped": one_bit_flipped,
    "zeros": lambda data, _other: bytes(len(data)),  # a block that a crash has left unwritten
    "checksum flipped": lambda data, _other: data[:-1] + bytes([data[-1] ^ 0x80]),
    "longer": lambda data, _other: data + b"x",
    "twice": lambda data, _other: data + data,
    "another's": lambda _data, other: other,
    "without a checksum": lambda data, _other: data[:-CHECKSUM_BYTES],  # as before this version
}


# ---- where the copies lie ------------------------------------------------------------------


class DiskPlace:
    """The files of a folder."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def copies(self):
        return {parse_key(file.stem): file for file in self.folder.glob("*.data")}

    def read(self, file):
        return file.read_bytes()

    def write(self, file, data):
        file.write_bytes(data)

    def remove(self, file):
        file.unlink()


class RedisPlace:
    """The values of a Redis."""

    def __init__(self, url):
        self.client = redis.Redis.from_url(url)

    def copies(self):
        names = self.client.scan_iter(match="*@*@*@*", count=1000)
        return {parse_key(name.decode()): name for name in names}

    def read(self, name):
        return self.client.get(name)

    def write(self, name, data):
        self.client.set(name, data)

    def remove(self, name):
        self.client.delete(name)


def damage(place, chunks, how):
    """Damage the copies of these chunks; return their names there and what is there now."""
    names = [place.copies()[chunk] for chunk in chunks]
    before = [place.read(name) for name in names]
    for name, data, other in zip(names, before, [*before[1:], before[0]]):
        place.write(name, how(data, other))
    return {name: place.read(name) for name in names}


# ---- the adapters --------------------------------------------------------------------------


class Memory:
    """An object of LMCache's memory tier."""

    def __init__(self, data):
        self.byte_array = memoryview(bytearray(data))


class Heard(L2AdapterListener):
    """What an adapter reports, which is what the directory shows."""

    def __init__(self):
        self.shown = set()

    def on_l2_keys_stored(self, keys, sizes):
        self.shown |= set(keys)

    def on_l2_keys_accessed(self, keys):
        pass

    def on_l2_keys_deleted(self, keys):
        self.shown -= set(keys)


class Tier:
    """An adapter with the place that it writes to, asked one task at a time."""

    def __init__(self, adapter, place):
        self.adapter, self.place, self.heard = adapter, place, Heard()
        adapter.set_backend_identity("test")
        adapter.register_listener(self.heard)

    def _answer(self, descriptor, ask):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(LIMIT_S * 1000), "no answer"
        os.eventfd_read(descriptor)
        return ask()

    def store(self, contents):
        keys, objects = list(contents), list(map(Memory, contents.values()))
        task = self.adapter.submit_store_task(keys, objects)
        done = self._answer(
            self.adapter.get_store_event_fd(), self.adapter.pop_completed_store_tasks
        )
        assert done[task].is_successful()
        wait_until(lambda: set(keys) <= self.heard.shown)

    def there(self, keys):
        task = self.adapter.submit_lookup_and_lock_task(list(keys), {})
        found = self._answer(
            self.adapter.get_lookup_and_lock_event_fd(),
            lambda: self.adapter.query_lookup_and_lock_result(task),
        )
        return [found.test(at) for at in range(len(keys))]

    def load(self, keys, size_bytes=SIZE_BYTES):
        """Return each key's content, None where the load failed."""
        objects = [Memory(bytes(size_bytes)) for _ in keys]
        task = self.adapter.submit_load_task(list(keys), objects)
        loaded = self._answer(
            self.adapter.get_load_event_fd(), lambda: self.adapter.query_load_result(task)
        )
        return [bytes(o.byte_array) if loaded.test(at) else None for at, o in enumerate(objects)]

    def damaged_copies(self):
        return self.adapter.report_status()["damaged_copies"]


@pytest.fixture
def contents():
    """Four chunks, one of them another tenant's."""
    return {
        ObjectKey(os.urandom(32), "org/model", 0x01000100, 0, salt): os.urandom(SIZE_BYTES)
        for salt in ("", "", "", "tenant")
    }


def disk_tier(folder):
    return Tier(DiskAdapter(FSL2AdapterConfig(str(folder))), DiskPlace(folder))


@pytest.fixture(params=["disk", "remote"])
def tier(request, tmp_path, redis_url):
    if request.param == "disk":
        one = disk_tier(tmp_path)
    else:
        client = RedisClient(redis.Redis.from_url(redis_url), workers=2)
        one = Tier(RedisL2Adapter(client, verify_every_s=600), RedisPlace(redis_url))
    yield one
    one.adapter.close()


def chunk_of(key):
    return ChunkKey(
        key.model_name, key.kv_rank, key.object_group_id, key.chunk_hash.hex(), key.cache_salt
    )


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_copy_fails_alone_is_gone_and_can_be_stored_again(tier, contents, how):
    keys, first = list(contents), list(contents)[:2]
    tier.store(contents)
    assert tier.load(keys) == list(contents.values())
    names = damage(tier.place, list(map(chunk_of, first)), DAMAGE[how])
    assert tier.load(keys) == [None, None, *list(contents.values())[2:]]
    assert tier.heard.shown == set(keys[2:]) and tier.damaged_copies() == 2
    assert set(names).isdisjoint(tier.place.copies().values())
    assert tier.there(keys) == [False, False, True, True]
    tier.store(contents)
    assert tier.load(keys) == list(contents.values()) and tier.damaged_copies() == 2


def test_a_copy_of_another_shape_is_damaged(tier, contents):
    """A model of the same name in another dtype: LMCache would fill half a chunk, or read half."""
    tier.store(contents)
    keys = list(contents)
    assert tier.load(keys[:1], 2 * SIZE_BYTES) == tier.load(keys[1:2], SIZE_BYTES // 2) == [None]
    assert tier.heard.shown == set(keys[2:])


def test_a_copy_that_vanishes_between_look_up_and_load_leaves_the_directory(tier, contents):
    tier.store(contents)
    key = next(iter(contents))
    tier.place.remove(tier.place.copies()[chunk_of(key)])
    assert tier.load([key]) == [None]
    assert key not in tier.heard.shown and tier.damaged_copies() == 0


@pytest.mark.parametrize("notice", ["look-up", "delete", "verify"])
def test_a_copy_that_somebody_removed_leaves_the_directory(tier, contents, notice):
    tier.store(contents)
    key = next(iter(contents))
    tier.place.remove(tier.place.copies()[chunk_of(key)])
    if notice == "delete":
        tier.adapter.delete([key])
    elif notice == "verify":  # as it does again and again: nobody may look a hot chunk up
        tier.adapter.verify()
    else:
        assert tier.there([key]) == [False]
    wait_until(lambda: tier.heard.shown == set(contents) - {key})


def test_what_redis_brings_back_from_a_snapshot_is_shown_again(redis_url, contents):
    client, raw = redis.Redis.from_url(redis_url), redis.Redis.from_url(redis_url)
    tier = Tier(RedisL2Adapter(RedisClient(client), verify_every_s=600), RedisPlace(redis_url))
    try:
        tier.store(contents)
        key = next(iter(contents))
        name = tier.place.copies()[chunk_of(key)]
        value = raw.get(name)
        tier.adapter.delete([key])
        wait_until(lambda: key not in tier.heard.shown)
        raw.set(name, value)
        client.connection_pool.disconnect()  # as when it is started again
        tier.adapter.verify()
        assert key not in tier.heard.shown  # it might be a store that is under way
        tier.adapter.verify()
        assert key in tier.heard.shown and tier.load([key]) == [contents[key]]
        tier.adapter.delete([key])
        assert not raw.exists(name)
    finally:
        tier.adapter.close()


def test_lmcaches_own_adapter_serves_what_is_damaged(tmp_path, contents):
    """Why the kit brings one of its own; if this fails, LMCache has been repaired."""
    tier = Tier(FSL2Adapter(FSL2AdapterConfig(str(tmp_path))), DiskPlace(tmp_path))
    try:
        tier.store(contents)
        one, *_ = contents
        damage(tier.place, [chunk_of(one)], flipped)
        assert tier.load([one]) == [flipped(contents[one], b"")]
        damage(tier.place, [chunk_of(one)], DAMAGE["empty"])
        assert tier.load([one]) == [None] and tier.there([one]) == [True]
    finally:
        tier.adapter.close()


def test_lmcaches_own_client_is_not_given_values_with_checksums(redis_url, contents, monkeypatch):
    """It would take what stands behind a value for its next answer: see test_production_redis."""
    client = redis.Redis.from_url(redis_url)
    tier = Tier(RedisL2Adapter(RedisClient(client, workers=2)), RedisPlace(redis_url))
    tier.store(contents)
    plain = f"org/model@01000100@0@{'ab' * 32}"
    client.set(plain, b"x" * SIZE_BYTES)
    monkeypatch.setenv("KV_REDIS_URL", redis_url)
    ours = set(map(chunk_of, contents))
    assert ours < redis_contents("", 0).keys()
    monkeypatch.setenv("KV_REDIS_CLIENT", "lmcache")
    found = redis_contents("", 0)
    assert parse_key(plain) in found and ours.isdisjoint(found)
    assert ours.isdisjoint(tier.place.copies())
    client.delete(plain)
    tier.adapter.close()


# ---- files in particular ---------------------------------------------------------------------


def test_files_of_an_earlier_life_are_known_and_half_written_ones_are_removed(tmp_path, contents):
    one = disk_tier(tmp_path)
    one.store(contents)
    one.adapter.close()
    name = next(tmp_path.glob("*.data"))
    (half, other) = (name.with_suffix(".tmp"), tmp_path / "notes.tmp")
    for file in (half, other):
        file.write_bytes(b"x")
    later = disk_tier(tmp_path)
    try:
        later.heard.shown = set(contents)  # as `reconcile` tells the directory
        assert (half.exists(), other.exists()) == (False, True)
        assert later.load(contents) == list(contents.values())
        key = next(iter(contents))
        damage(later.place, [chunk_of(key)], flipped)
        assert later.load([key]) == [None] and key not in later.heard.shown
        assert later.adapter.get_usage().total_bytes_used == 0
    finally:
        later.adapter.close()


def test_no_copy_is_taken_for_damaged_because_the_process_lacks_descriptors(tmp_path, contents):
    one = disk_tier(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        one.store(contents)
        assert one.load(contents) == list(contents.values())  # its threads have been started
        os.close(lowest_free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        assert one.load(contents) == [None] * 4
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert one.load(contents) == list(contents.values()) and one.damaged_copies() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        one.adapter.close()


@pytest.mark.parametrize("what", ["pipe", "link", "folder"])
def test_what_is_no_file_is_a_miss_and_holds_nothing_up(tmp_path, contents, what):
    one = disk_tier(tmp_path)
    try:
        one.store(contents)
        key, kept = list(contents)[:2]
        copies = one.place.copies()
        file, target = copies[chunk_of(key)], copies[chunk_of(kept)]
        file.unlink()
        make = {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda at: os.symlink(target, at)}
        make[what](file)
        assert one.load([key, kept]) == [None, contents[kept]]
        assert os.path.lexists(file) is (what == "folder")
    finally:
        one.adapter.close()


# ---- LMCache's own storage manager over both adapters ----------------------------------------

LAYOUT = MemoryLayoutDesc(shapes=[torch.Size([2, 4, 32, 64])], dtypes=[torch.bfloat16])


class Storage:
    """All of an LMCache server but its sockets: memory, store and prefetch controllers, adapters.

    Chunk number n holds the value n + 1 everywhere.
    """

    def __init__(self, folder, redis_url):
        adapters = [
            {"type": "fs", "base_path": str(folder)},
            {"type": "resp", "host": "127.0.0.1", "port": urlsplit(redis_url).port},
        ]
        arguments = ["--l1-size-gb", "0.1", "--eviction-policy", "LRU"]
        for adapter in adapters:
            arguments += ["--l2-adapter", json.dumps(adapter)]
        self.manager = StorageManager(parse_args(arguments))
        self.places = {"disk": DiskPlace(folder), "remote": RedisPlace(redis_url)}
        self.keys = [ObjectKey(os.urandom(32), "org/m", 0x01000100, 0, "") for _ in range(6)]
        self.chunks = list(map(chunk_of, self.keys))

    def compute(self):
        """Write what memory lacks, as an engine does, and wait for the copies on disk and Redis."""
        reserved = self.manager.reserve_write(self.keys, LAYOUT)
        for key, memory in reserved.items():
            memory.tensor.fill_(self.keys.index(key) + 1)
        self.manager.finish_write(list(reserved))
        for place in self.places.values():
            wait_until(lambda place=place: set(self.chunks) <= place.copies().keys())

    def is_idle(self):
        """Say whether nothing is being written: a late write would mend what a test damages."""
        status = self.manager.report_status()
        (memory,), (stores,) = (status[n].values() for n in ("l1_managers", "store_controllers"))
        waiting = stores["pending_keys_count"] + stores["in_flight_task_count"]
        return waiting + memory["read_locked_count"] + memory["write_locked_count"] == 0

    def keep_only(self, tier):
        for _ in range(2):  # between the queue and the first lock of a store nothing counts it
            wait_until(self.is_idle)
            time.sleep(0.05)
        self.manager.clear(force=True)
        for other, place in self.places.items():
            for chunk, name in place.copies().items() if other != tier else ():
                if chunk in self.chunks:  # Redis is the whole session's
                    place.remove(name)

    def load(self):
        """Return the values of the chunks that a prompt of all of them would be served."""
        prompt = PrefetchTaskSpec([GroupedObjectKeys(self.keys, 0, LAYOUT)])
        handle = self.manager.submit_prefetch_task(prompt)
        answer = wait_until(lambda: self.manager.query_prefetch_status(handle))
        hits = self.keys[: answer.hit_cells[0].popcount()]
        if not hits:
            return []
        with self.manager.read_prefetched_results(hits) as objects:
            values = [set(memory.tensor.flatten().tolist()) for memory in objects]
        self.manager.finish_read_prefetched(hits)
        return [value for one in values for value in one]

    def close(self):
        self.keep_only(None)
        self.manager.close()


@pytest.fixture(scope="module")
def storage(tmp_path_factory, redis_url):
    """The registry keeps the kit's adapters: nothing else in this process asks for any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KV_REDIS_URL", redis_url)
        install_adapters(own_redis_client=True)
        one = Storage(tmp_path_factory.mktemp("storage"), redis_url)
        yield one
        one.close()


@pytest.mark.parametrize("tier", ["disk", "remote"])
@pytest.mark.parametrize("how", DAMAGE)
def test_lmcache_serves_what_stands_before_the_damage_and_stores_the_rest_again(storage, tier, how):
    storage.compute()
    storage.keep_only(tier)
    damaged = damage(storage.places[tier], storage.chunks[2:4], DAMAGE[how])
    assert storage.load() == [1.0, 2.0]
    storage.compute()
    storage.keep_only(tier)
    assert storage.load() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    place = storage.places[tier]
    assert [name for name, data in damaged.items() if place.read(name) == data] == []


# ---- the real stack --------------------------------------------------------------------------


@pytest.fixture(params=["disk", "remote"])
def tier_and_place(request, stack, redis_url):
    """A tier's name and where it stores."""
    disk = request.param == "disk"
    return request.param, DiskPlace(stack.config.disk_path) if disk else RedisPlace(redis_url)


class Deployment:
    """The shared engine and stack, as somebody sees them who only generates."""

    def __init__(self, stack, llm, sampling):
        self._stack, self._llm, self._sampling = stack, llm, sampling
        self.http = LMCacheHTTP(stack.coordinator_url, read_timeout_s=LIMIT_S)
        self.controller = LMCacheController(stack.host, stack.port, instance_id=stack.instance_id)
        self.controller.attach_engine(llm)

    def serve(self, texts):
        """Return each answer, and how many complete chunks of each prompt were not computed.

        One after the other: what shares a batch can change a greedy answer's last bits.
        """
        answers, hits = [], []
        for text in texts:
            (output,) = self._llm.generate(text, self._sampling, use_tqdm=False)
            answers.append(output.outputs[0].text)
            # A prompt that is all chunks is computed from its last token on.
            hits.append(-(-output.num_cached_tokens // 32))
        return answers, hits

    def layouts(self, texts):
        return [self.controller.layout(self.controller.tokenize(text)) for text in texts]

    def keys(self, texts):
        """Return LMCache's keys of each text's chunks."""
        layouts = self.layouts(texts)
        return [[key for name in one.keys for key in one.handles[name]] for one in layouts]

    def held(self, texts):
        """Return the combinations of tiers in which the directory shows any of their chunks."""
        name = self._stack.instance_id
        return {tiers for one in self.layouts(texts) for tiers in one.of(name)}

    def keep_only(self, tier, texts):
        """Wait until all tiers have what `tier` has not alone, then delete it from the others."""
        wait_until(lambda: self.held(texts) - {(tier,)} == {TIERS})
        others = [one for one in TIERS if one != tier]
        keys = [key for of_text in self.keys(texts) for key in of_text]
        wait_until(lambda: self.http.delete(self._stack.instance_id, others, keys) == 0)
        wait_until(lambda: self.held(texts) == {(tier,)})

    def damaged_copies(self):
        """Return how many the server has counted, by its /status."""
        url = f"{self._stack.config.server_http_url}/status"
        adapters = requests.get(url, timeout=LIMIT_S).json()["storage_manager"]["l2_adapters"]
        return sum(adapter["damaged_copies"] for adapter in adapters)

    def close(self):
        self.http.close()
        self.controller.close()


@pytest.fixture
def deployment(stack, llm, greedy):
    one = Deployment(stack, llm, greedy)
    yield one
    one.close()


def test_a_damaged_copy_is_computed_once_and_stored_again(tier_and_place, deployment, fresh_text):
    tier, place = tier_and_place
    texts = [fresh_text() for _ in DAMAGE]
    answers, _ = deployment.serve(texts)
    deployment.keep_only(tier, texts)
    whole = list(map(len, deployment.keys(texts)))
    assert deployment.serve(texts) == (answers, whole)
    counted = deployment.damaged_copies()

    damaged = {}
    for keys, how in zip(deployment.keys(texts), DAMAGE.values()):
        chunks = [ChunkKey(**key) for key in keys[1:]]  # the first one stays good
        damaged |= damage(place, chunks, how)
    assert deployment.serve(texts) == (answers, [1] * len(texts))
    assert deployment.damaged_copies() == counted + len(damaged)

    deployment.keep_only(tier, texts)  # all is there again, in the other tiers, too
    assert [name for name, data in damaged.items() if place.read(name) == data] == []
    assert deployment.serve(texts) == (answers, whole)
    assert deployment.damaged_copies() == counted + len(damaged)
