"""Redis as production has it: TLS and password; full, evicting, slow, hung, restarted.

The backend first, then the client under LMCache's remote tier, then the whole managed loop.
"""

from __future__ import annotations

import select
import signal
import time

import pytest
import redis
from lmcache.lmcache_redis import LMCacheRedisClient
from redis_fixtures import free_port, make_tls, redis_url, start_redis, stop_redis
from waiting import wait_until

from cache_controller import LMCacheController
from caching_heuristics import TIERS, HeuristicConfig
from kvttl.stack.lifecycle import LMCacheStack, load_config
from kvttl.stack.redis_adapter import RedisClient
from kvttl.storage.redis_client import RedisLimits, connect
from tiered_caching import MultiTierCache, RemoteBackend

PASSWORD = "pass-w0rd"
HOT = {"perplexity": 12.0, "time_variance": 0.0}
COLD = {"perplexity": 80.0, "time_variance": 0.0}
ALL = list(TIERS)
SIZE = 32_768  # bytes of a value here
LONG_S = 600.0
BOUNDED_S = 30.0  # far over every time-out here, far under "for good"


class Server:
    """A redis-server with TLS and a password, and the hands of whoever runs it."""

    def __init__(self, folder, tls=True):
        self._folder, self.port = folder, free_port()
        self._tls = folder if tls else None
        if tls:
            make_tls(folder)
        self.start()

    @property
    def options(self):
        return {"ssl_ca_certs": str(self._folder / "ca.crt")} if self._tls else {}

    @property
    def url(self):
        return redis_url(self.port, PASSWORD, self._tls)

    def start(self):
        self._process = start_redis(self.port, PASSWORD, self._tls, str(self._folder))
        # Patient: all commands wait while clients are paused.
        self.admin = redis.Redis.from_url(self.url, socket_timeout=BOUNDED_S, **self.options)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def send(self, number):
        self._process.send_signal(number)

    def limit(self, size_bytes, policy="noeviction"):
        self.admin.config_set("maxmemory-policy", policy)
        self.admin.config_set("maxmemory", size_bytes)

    def pause(self, seconds, mode="ALL"):
        self.admin.execute_command("CLIENT", "PAUSE", int(seconds * 1000), mode)

    def unpause(self):
        self.admin.execute_command("CLIENT", "UNPAUSE")

    def unlimited(self):
        self.limit(0)

    def close(self):
        self.send(signal.SIGCONT)
        stop_redis(self._process)


@pytest.fixture(scope="module")
def tls_redis(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("tls"))
    yield server
    server.close()


@pytest.fixture
def server(tls_redis):
    """The module's Redis, made well again afterwards."""
    yield tls_redis
    tls_redis.send(signal.SIGCONT)
    tls_redis.unpause()
    tls_redis.unlimited()
    tls_redis.admin.execute_command("REPLICAOF", "NO", "ONE")


# ---- RemoteBackend -------------------------------------------------------------------------


@pytest.fixture
def remote(server):
    backend = RemoteBackend(server.url, "backend:", timeout_s=0.5, **server.options)
    yield backend
    backend.close()


def test_full_redis_refuses_a_write_and_loses_nothing(server, remote):
    remote.set("old", "value", LONG_S)
    server.limit(1)
    for key in ("old", "new"):
        with pytest.raises(ConnectionError, match="maxmemory") as caught:
            remote.set(key, b"x" * SIZE, LONG_S)
        assert remote.address in str(caught.value) and PASSWORD not in str(caught.value)
    assert (remote.get("old"), remote.get("new")) == ("value", None)
    assert remote.delete("old") is True
    server.unlimited()
    remote.set("new", "later", LONG_S)
    assert remote.get("new") == "later"


def test_slow_redis_is_an_error_in_bounded_time_and_nothing_is_half_written(server, remote):
    remote.set("key", "old", LONG_S)
    server.pause(2 * BOUNDED_S, "WRITE")
    started_s = time.monotonic()
    with pytest.raises(ConnectionError, match="[Tt]imeout|timed out"):
        remote.set("key", b"x" * SIZE, LONG_S)
    assert time.monotonic() - started_s < BOUNDED_S
    server.unpause()
    assert remote.get("key") in ("old", b"x" * SIZE)  # Redis may still have carried it out
    remote.set("key", "new", LONG_S)
    assert remote.get("key") == "new"


def test_restarted_redis_is_used_again(server, remote):
    remote.set("key", "old", LONG_S)
    server.kill()
    for call in (remote.get, remote.delete):
        with pytest.raises(ConnectionError, match="refused|closed|reset"):
            call("key")
    server.start()
    remote.set("key", "new", LONG_S)
    assert remote.get("key") == "new"


# ---- the client under LMCache's adapter --------------------------------------------------------


class Batches:
    """A client of LMCache's adapter, asked one batch at a time."""

    def __init__(self, client):
        self.client = client
        self._poll = select.poll()
        self._poll.register(client.event_fd(), select.POLLIN)
        self._kept = []

    def _answer(self, limit_s=BOUNDED_S):
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            if self._poll.poll(100) and (done := self.client.drain_completions()):
                return done[0]
        return None

    def put(self, **values):
        """Store bytes of one value each; True = LMCache would count them as stored."""
        views = [memoryview(bytearray(bytes([value]) * SIZE)) for value in values.values()]
        self._kept += views
        self.client.submit_batch_set(list(values), views)
        return self._answer()[1]

    def get(self, key, limit_s=BOUNDED_S):
        """Return a key's value, False where there is none, None where no answer came."""
        buffer = bytearray(SIZE)
        self._kept.append(buffer)
        self.client.submit_batch_get([key], [memoryview(buffer)])
        answer = self._answer(limit_s)
        if answer is None:
            return None
        return answer[3] is not None and answer[3][0] and {*buffer}.pop()

    def exists(self, *keys):
        self.client.submit_batch_exists(list(keys))
        return self._answer()[3]


@pytest.fixture
def batches(server):
    url = f"{server.url}?ssl_ca_certs={server.options['ssl_ca_certs']}"
    server.admin.flushall()
    client = RedisClient(connect(url, RedisLimits(0.5, 0.5)), workers=1)
    yield Batches(client)
    client.close()


def values_after_an_error(batches, server):
    """Store 1 to 9, meet a full Redis once, and read them all afterwards."""
    for number in range(1, 10):
        assert batches.put(**{f"k{number}": number})
    server.limit(1)
    assert not batches.put(x=99)
    server.unlimited()
    batches.put(y=98)
    early = [batches.get(f"k{number}") for number in range(1, 7)]
    batches.put(z=97)
    return early + [batches.get(f"k{number}") for number in range(7, 10)]


def test_lmcaches_own_client_confuses_chunks_after_an_error(tmp_path):
    """Why the kit brings a client of its own; if this fails, LMCache has been repaired."""
    server = Server(tmp_path, tls=False)
    try:
        own = LMCacheRedisClient("127.0.0.1", server.port, 1, "", PASSWORD)
        served = values_after_an_error(Batches(own), server)
        assert served[:6] == [False] * 6 and served[6:] == [1, 2, 3]  # as 7, 8 and 9
        own = Batches(LMCacheRedisClient("127.0.0.1", server.port, 1, "", PASSWORD))
        for key in ("absent", "k1"):  # nor does anything else come back, or only a miss
            assert own.get(key, limit_s=2.0) in (None, False)
    finally:
        server.close()


def test_an_error_confuses_nothing(batches, server):
    assert values_after_an_error(batches, server) == list(range(1, 10))
    assert batches.exists("k1", "x", "y") == [True, False, True]


def test_absent_and_foreign_values_are_misses(batches, server):
    assert batches.put(k=1)
    server.admin.set("foreign", b"x" * (SIZE - 1))
    assert [batches.get(key) for key in ("absent", "foreign", "k")] == [False, False, 1]


def test_a_batch_that_does_not_fit_is_an_error_and_what_was_written_is_whole(batches, server):
    doubtful = []
    batches.client.on_doubt = doubtful.extend
    assert batches.put(old=1)
    server.limit(server.admin.info("memory")["used_memory"] + 20 * SIZE)
    new = {f"n{number}": 2 for number in range(60)}
    assert not batches.put(**new)
    there = server.admin.keys("n*")
    assert 0 < len(there) < 60 and set(batches.client.sizes(there)) == {SIZE}
    assert doubtful == list(new) and batches.get("old") == 1
    server.unlimited()
    assert batches.put(**new) and server.admin.dbsize() == 61


def test_a_replica_refuses_writes_and_serves_reads(batches, server):
    assert batches.put(k=1)
    server.admin.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    assert not batches.put(new=2)
    assert batches.get("k") == 1
    server.admin.execute_command("REPLICAOF", "NO", "ONE")
    assert batches.put(new=2) and batches.get("new") == 2


def test_a_damaged_value_in_a_replica_is_a_miss_until_it_can_be_deleted(batches, server):
    assert batches.put(good=1, bad=2)
    server.admin.setrange("bad", 100, b"?")
    server.admin.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    buffers = [bytearray(SIZE), bytearray(SIZE)]
    batches.client.submit_batch_get(["good", "bad"], list(map(memoryview, buffers)))
    assert batches._answer()[1:] == (True, "", [True, False])
    server.admin.execute_command("REPLICAOF", "NO", "ONE")
    assert batches.exists("good", "bad") == [True, True]
    assert batches.get("bad") is False and batches.exists("good", "bad") == [True, False]


def test_a_hung_redis_costs_one_time_out_and_is_found_again(batches, server):
    assert batches.put(k=1)
    server.send(signal.SIGSTOP)
    started_s = time.monotonic()
    assert [batches.get("k") for _ in range(100)] == [False] * 100
    assert time.monotonic() - started_s < BOUNDED_S  # 100 time-outs would be 50 s
    server.send(signal.SIGCONT)
    wait_until(lambda: batches.get("k") == 1)


def test_a_store_that_timed_out_may_yet_be_carried_out_and_is_looked_for(batches, server):
    assert batches.put(k=1)
    doubtful = []
    batches.client.on_doubt = doubtful.extend
    server.send(signal.SIGSTOP)
    assert not batches.put(late=2)
    assert doubtful == ["late"]
    server.send(signal.SIGCONT)
    wait_until(lambda: batches.client.sizes(["late", "absent"]) == [SIZE, 0])


def test_a_restarted_redis_is_found_again(batches, server):
    assert batches.put(k=1)
    server.kill()
    assert not batches.put(new=2)
    server.start()
    wait_until(lambda: batches.put(new=2))
    assert (batches.get("k"), batches.get("new")) == (False, 2)


# ---- the managed loop ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def managed_stack(tls_redis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    url = f"{tls_redis.url.removesuffix('/0')}?ssl_ca_certs={tls_redis.options['ssl_ca_certs']}"
    config = load_config(
        redis_url=url,
        disk_path=str(folder / "disk"),
        run_dir=str(folder / "run"),
        l1_size_gb=0.1,
        inside=False,
        redis_timeout_s=1.5,
        redis_verify_s=2,
    )
    with LMCacheStack(config, free_ports=True) as running:
        yield running


@pytest.fixture(scope="module")
def engine(managed_stack):
    from vllm import LLM

    from kvttl.session.demo_model import model_path

    engine = LLM(**managed_stack.engine_kwargs(model_path()))
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture
def make_cache(server, managed_stack, engine):
    made = []

    def make(move_timeout_s=2.0, **options):
        stack = managed_stack
        controller = LMCacheController(stack.host, stack.port, move_timeout_s=move_timeout_s)
        options = {"notify": None, "sweep_every_s": None, "config": HeuristicConfig(), **options}
        made.append(MultiTierCache(controller, engine, **options))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


@pytest.fixture
def cache(make_cache):
    return make_cache()


def held(cache, text):
    """Return the tiers that hold all of a prompt."""
    found = cache.controller.lookup(cache.controller.tokenize(text))
    return found.get(cache.controller.instance_id, [])


def wait_for(cache, text, tiers):
    wait_until(lambda: held(cache, text) == tiers)


def reasons(cache):
    return [move["reason"] for move in cache.records[-1].moves if move["status"] != "done"]


def serve(cache, text, greedy):
    """Generate without deciding anything; return the text and what was not computed."""
    output = cache._llm.generate(text, greedy, use_tqdm=False)[0]
    return output.outputs[0].text, output.num_cached_tokens or 0


def test_the_remote_tier_is_behind_tls_and_a_password(
    cache, managed_stack, server, greedy, fresh_text
):
    text = fresh_text()
    answer = cache.generate_and_manage(text, greedy, COLD)
    wait_for(cache, text, ["remote"])
    assert server.admin.config_get("port") == {"port": "0"}  # no way around TLS
    assert cache.generate_and_manage(text, greedy, COLD) == answer
    assert set(cache.records[-1].hit_tokens) == {"remote"}
    assert PASSWORD not in managed_stack.logs("server", 1000)


def test_full_redis_costs_no_copy_and_later_kv_moves_again(cache, server, greedy, fresh_text):
    early, late = fresh_text(), fresh_text()
    first = cache.generate_and_manage(early, greedy, HOT)
    wait_for(cache, early, ALL)
    server.limit(1)
    answer = cache.generate_and_manage(late, greedy, COLD)
    assert any("no copy in remote" in reason for reason in reasons(cache))
    assert held(cache, late) == ["gpu", "disk"]
    assert cache.generate_and_manage(late, greedy, COLD) == answer  # a hit now, and it says why
    assert any("no copy in remote" in reason for reason in reasons(cache))
    assert held(cache, late) == ["gpu", "disk"]
    assert cache._decider.settler.unsettled == 1
    assert cache.generate_and_manage(early, greedy, COLD) == first
    wait_for(cache, early, ["remote"])  # what Redis has, it has, and serves
    text, hits = serve(cache, early, greedy)  # vLLM computes a prompt's last token always
    record = cache.records[-1]
    assert (text, hits) == (first, min(record.chunks * 32, record.prompt_tokens - 1))
    server.unlimited()
    later = fresh_text()
    cache.generate_and_manage(later, greedy, COLD)
    wait_for(cache, later, ["remote"])
    # LMCache writes once: the other stays above until its TTL ends, and is new after that.
    cache.sweep(time.time() + 1e7)
    wait_for(cache, late, [])
    assert cache.generate_and_manage(late, greedy, COLD) == answer
    wait_for(cache, late, ["remote"])


def chunk_names(server):
    return list(server.admin.scan_iter(match="*@*@*@*", count=1000))


def evict_all(server):
    """Let Redis evict every chunk, by its own policy, for the sake of newer keys."""
    server.admin.config_set("maxmemory-samples", 64)  # almost exactly the least recently used
    server.limit(server.admin.info("memory")["used_memory"] + 4 * SIZE, "allkeys-lru")
    for number in range(200):
        if not chunk_names(server):
            return
        server.admin.set(f"filler:{number}", b"x" * 8 * SIZE)
    raise AssertionError("Redis did not evict")


def test_evicted_chunks_are_recomputed_and_leave_the_directory(cache, server, greedy, fresh_text):
    cold, hot, hasty = fresh_text(), fresh_text(), fresh_text()
    first = cache.generate_and_manage(cold, greedy, COLD)
    kept = cache.generate_and_manage(hot, greedy, HOT)
    risked = cache.generate_and_manage(hasty, greedy, HOT)
    for text, tiers in ((cold, ["remote"]), (hot, ALL), (hasty, ALL)):
        wait_for(cache, text, tiers)
    evict_all(server)
    # At once, on the word of a directory that is behind: the worst is a recompute.
    cache.generate_and_manage(hasty, greedy, COLD)
    assert serve(cache, hasty, greedy)[0] == risked
    assert serve(cache, cold, greedy) == (first, 0)
    wait_for(cache, hot, ["gpu", "disk"])  # within the adapter's next look at Redis
    server.admin.flushall()
    server.unlimited()
    assert cache.generate_and_manage(hot, greedy, COLD) == kept
    assert held(cache, hot) == ["gpu", "disk"]  # the last copies stay
    assert any("no copy in remote" in reason for reason in reasons(cache))


def test_slow_writes_are_waited_for_by_a_later_sweep(make_cache, server, greedy, fresh_text):
    cache = make_cache(move_timeout_s=0.1, sweep_every_s=0.2)
    text = fresh_text()
    server.pause(LONG_S, "WRITE")
    answer = cache.generate_and_manage(text, greedy, COLD)
    assert cache.records[-1].moves[0]["status"] == "timeout"
    assert "no copy in remote" in reasons(cache)[0]
    assert held(cache, text)[:1] == ["gpu"]
    server.unpause()
    wait_for(cache, text, ["remote"])
    served = serve(cache, text, greedy)
    assert served[0] == answer and served[1] > 0


def in_redis(cache, text, server):
    """Say of each chunk whether Redis has it."""
    keys = cache.controller.layout(cache.controller.tokenize(text)).keys
    names = b" ".join(chunk_names(server)).decode()
    return [key in names for key in keys]


def test_a_prompt_that_fits_in_part_is_shown_as_it_is(cache, server, greedy, fresh_text):
    text = fresh_text(400)
    server.limit(server.admin.info("memory")["used_memory"] + 12 * SIZE)
    answer = cache.generate_and_manage(text, greedy, HOT)

    def tiers():
        layout = cache.controller.layout(cache.controller.tokenize(text))
        return layout.of(cache.controller.instance_id)

    def shown():
        return ["remote" in one for one in tiers()]

    wait_until(lambda: any(shown()) and shown() == in_redis(cache, text, server))
    assert len(shown()) > 15 and not all(shown())
    assert cache.generate_and_manage(text, greedy, COLD) == answer
    wait_until(lambda: {one[0] for one in tiers()} == {"gpu", "remote"})  # none without a copy
    assert serve(cache, text, greedy)[0] == answer


def test_generations_return_while_redis_hangs(cache, server, greedy, fresh_text):
    stored, new = fresh_text(), fresh_text()
    answer = cache.generate_and_manage(stored, greedy, COLD)
    wait_for(cache, stored, ["remote"])
    server.send(signal.SIGSTOP)
    started_s = time.monotonic()
    assert serve(cache, stored, greedy) == (answer, 0)  # recomputed
    cache.generate_and_manage(new, greedy, COLD)
    assert time.monotonic() - started_s < BOUNDED_S
    assert any("no copy in remote" in reason for reason in reasons(cache))
    assert held(cache, new) == ["gpu", "disk"]
    server.send(signal.SIGCONT)

    works_again(cache, greedy, fresh_text)


def works_again(cache, greedy, fresh_text):
    """Wait until new KV can go to Redis again; what is stored before that never does."""

    def placed():
        text = fresh_text()
        cache.generate_and_manage(text, greedy, COLD)
        return held(cache, text) == ["remote"]

    wait_until(placed)


def test_generations_go_on_while_redis_is_down_and_a_new_one_is_used(
    cache, managed_stack, server, greedy, fresh_text
):
    cold, hot = fresh_text(), fresh_text()
    first = cache.generate_and_manage(cold, greedy, COLD)
    kept = cache.generate_and_manage(hot, greedy, HOT)
    wait_for(cache, cold, ["remote"])
    wait_for(cache, hot, ALL)
    server.kill()
    text = fresh_text()
    answer = cache.generate_and_manage(text, greedy, COLD)
    assert any("no copy in remote" in reason for reason in reasons(cache))
    assert not managed_stack.health()["redis"]["ready"]
    assert serve(cache, cold, greedy) == (first, 0)
    server.start()  # empty: it kept nothing
    assert managed_stack.health()["redis"]["ready"]
    wait_for(cache, hot, ["gpu", "disk"])  # the directory has noticed
    assert serve(cache, hot, greedy)[0] == kept and serve(cache, text, greedy)[0] == answer
    works_again(cache, greedy, fresh_text)


def test_a_restarted_server_still_deletes_what_it_stored_before(
    cache, managed_stack, server, greedy, fresh_text
):
    text = fresh_text()
    cache.generate_and_manage(text, greedy, COLD)
    wait_for(cache, text, ["remote"])
    managed_stack.restart("server")
    wait_for(cache, text, ["remote"])
    before = len(chunk_names(server))
    records = cache.sweep(time.time() + 1e7)
    assert records and not any(record.error for record in records)
    wait_for(cache, text, [])
    assert len(chunk_names(server)) < before
