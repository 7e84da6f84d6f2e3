"""The server module over kills, failures and unknown LMCaches; and with a policy that learns."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import redis
import torch
from inside_server import CHUNK_BYTES, Client, inside_server, prompt
from lmcache.v1.distributed.api import ObjectKey
from waiting import wait_until

from caching_heuristics import TIERS
from kvttl.background import JobQueue, Repeater
from kvttl.decisions.log import DecisionRecord
from kvttl.lmcache.tiers import ChunkKey
from kvttl.manager.claims import ClaimLedger
from kvttl.server import journal as journals
from kvttl.server.compat import LATE_WRITES, POLICIES, REQUESTS, missing, warning_of
from kvttl.server.controller import PutDown
from kvttl.server.journal import JournalFolder
from kvttl.server.places import PINNED, Model, Places

MODEL = Model("a/model", 1)
LAYOUT = SimpleNamespace(shapes=[torch.Size((2, 1, 32, 16))], dtypes=[torch.float32])


def places_of(known=True):
    """Places of a server to which an engine has come, or none yet."""
    layouts = {0: LAYOUT} if known else None
    registry = SimpleNamespace(find_group_layout_descs=lambda _name, _size: layouts)
    manager = SimpleNamespace(is_multi_l1=True)
    return Places(SimpleNamespace(layout_desc_registry=registry, storage_manager=manager))


def key(number):
    return f"{number:064x}"


class Life:
    """A ledger, places and their journal, from one start to its kill."""

    def __init__(self, folder, known=True):
        self.places, self.ledger = places_of(known), ClaimLedger()
        self.folder = JournalFolder(folder, self.places)
        self.journal = self.folder.of(MODEL)
        self.journal.restore(self.ledger)
        self.file = self.journal.folder / "claims.jsonl"

    def is_in(self, keys, tier, gone=False):
        chunks = self.places.of_keys(MODEL, keys)
        (self.places.went if gone else self.places.came)(chunks, tier)

    def kill(self):
        self.folder._lock.close()  # as the kernel does

    def cold(self):
        return {c.key: c.bits & ~1 for c in self.places.chunks(MODEL) if c.bits & ~1}

    def wanted(self, keys, now_s):
        return self.ledger.wanted(keys, now_s)


def test_a_claim_that_took_anothers_place_has_its_whole_beginning(tmp_path):
    """Renewed, outgrown and dropped between two looks of the journal."""
    life, path = Life(tmp_path), [key(1), key(2), key(3)]
    life.ledger.changed = {}
    owners = "a" * 16, "b" * 16
    life.ledger.claim(owners[0], path[:2], "gpu", 1000.0, 600.0)
    rows = life.ledger.rows(2)
    life.ledger.claim(owners[0], path[:2], "gpu", 1001.0, 600.0)
    life.ledger.claim(owners[1], path, "gpu", 1002.0, 600.0)
    with life.ledger._lock:
        life.ledger._drop(life.ledger._claims[owners[0], path[1]])
    rows += life.ledger.rows(2)
    restored = ClaimLedger()
    for row in rows:
        restored.restore(row)
    assert restored.wanted(path, 1003.0) == life.ledger.wanted(path, 1003.0) == ["gpu"] * 3


def space_of(world_size=1):
    places = places_of()
    return places, places.space(MODEL.name, world_size, "")


def stored(places, space, *numbers):
    places.stored(space, 0, [bytes.fromhex(key(number)) for number in numbers])
    return places.of_keys(space.model, map(key, numbers))


def test_room_is_counted_for_all_ranks():
    places, space = space_of(world_size=4)
    stored(places, space, *range(16))
    assert len(places.first_to_go(3 * space.all_bytes)) == 3


def test_a_longer_pin_counts_by_the_clock_of_who_decides():
    places, space = space_of()
    (chunk,) = stored(places, space, 1)
    places.clock = lambda: 5.0
    places.valued([chunk], [(PINNED, 15.0)])
    places.valued([chunk], [(1, 0.5)])
    assert chunk.ends_s == (PINNED, 15.0)
    places.valued([chunk], [(PINNED, 605.0)])
    assert chunk.ends_s == (PINNED, 605.0)
    places.clock = lambda: 606.0
    places.valued([chunk], [(1, 0.5)])
    assert chunk.ends_s == (1, 0.5)


def test_what_is_stored_again_before_its_delete_is_heard_of_stays():
    places, space = space_of()
    (chunk,) = stored(places, space, 1)
    deleted_s = time.time()
    stored(places, space, 1)
    places.went([chunk], "gpu", deleted_s)
    assert chunk.bits == 1 and places.first_to_go(1) == [chunk]


def test_what_came_late_does_not_stand_before_what_is_old():
    places, space = space_of()
    late, old = stored(places, space, 1, 2)
    late.since_s, before_s = time.time() + 60.0, time.time() + 1.0
    assert places.first_to_go(2 * space.all_bytes, before_s) == [old]
    assert places.first_to_go(space.all_bytes) == [late]


def test_what_pressure_put_down_comes_back_well_below_low_and_fills_up_to_it():
    places, space = space_of()
    chunks = stored(places, space, *range(100))
    for number, chunk in enumerate(chunks):
        places.decided([chunk], 1000.0 + number)
    places.came(chunks, "disk")
    places.went(chunks, "gpu")
    used = [0.0]
    down = PutDown(lambda: (used[0] * 100 * space.all_bytes, 100 * space.all_bytes), places)
    down.note(chunks[:90])

    def back(share):
        used[0] = share
        return [chunks.index(chunk) for chunk in down.take(high=0.8, low=0.6)]

    assert back(0.9) == back(0.6) == back(0.46) == []
    assert back(0.445) == list(range(89, 74, -1))  # of 0.45 = 0.6 * 0.6 / 0.8 a bit less
    assert back(0.585) == [74] and back(0.595) == back(0.5) == []
    places.coming[""] += 10 * space.all_bytes  # a store that is under way
    assert back(0.4) == []
    places.coming.clear()
    places.came(chunks[70:74], "gpu")
    places.went(chunks[69:70], "disk")
    assert back(0.4)[0] == 68 and len(down) == 90 - 16 - 5 - 20


def lived(folder, seed, steps=120):
    """A life in which prompts that share their beginnings are claimed, end and are moved."""
    rng, life, now_s = random.Random(seed), Life(folder), 1000.0
    paths = [[key(1), key(2), *(key(100 * n + i) for i in range(5))] for n in range(1, 9)]
    for _ in range(steps):
        now_s += rng.random()
        path = rng.choice(paths)
        keys = path[rng.choice([0, 0, 0, 4]) : rng.randint(5, 7)]  # adopted ones begin within
        owner, tier = f"{rng.randint(1, 9):x}", rng.choice(TIERS)
        life.ledger.claim(owner, keys, tier, now_s, rng.choice([0.5, 3.0, 100.0]))
        life.is_in(keys, rng.choice(["disk", "remote"]), gone=rng.random() < 0.4)
        if rng.random() < 0.3:
            life.ledger.sweep(now_s)
        if rng.random() < 0.2:
            life.journal.flush()
        if rng.random() < 0.05:
            life.journal._write_whole()
    life.ledger.sweep(now_s)  # a step that nobody has taken yet is looked for below gpu
    life.journal.flush()
    return life, now_s, sorted({each for path in paths for each in path})


@pytest.mark.parametrize("seed", range(5))
def test_claims_and_places_are_the_same_after_a_kill(tmp_path, seed):
    life, now_s, keys = lived(tmp_path, seed)
    life.kill()
    again = Life(tmp_path, known=False)  # before any engine has come
    assert again.journal.damaged == 0 and again.cold() == life.cold() and len(life.ledger) > 3
    assert len(again.ledger) == len(life.ledger)
    for later_s in (0.0, 1.0, 50.0, 1e3):
        assert again.wanted(keys, now_s + later_s) == life.wanted(keys, now_s + later_s)
    steps = [
        sorted((s.owner, s.chunks) for s in x.ledger.sweep(now_s + 1e6)) for x in (life, again)
    ]
    assert steps[0] == steps[1] and not len(again.ledger)


def test_a_torn_line_is_ignored_and_a_damaged_one_counted(tmp_path):
    life, now_s, keys = lived(tmp_path, 7)
    life.kill()
    whole = life.file.read_bytes()
    for cut in range(len(whole) - 300, len(whole), 17):
        life.file.write_bytes(whole[:cut])
        torn = Life(tmp_path)
        assert torn.journal.damaged == 0 and abs(len(torn.ledger) - len(life.ledger)) <= 3
        torn.kill()
    rng = random.Random(8)
    for _ in range(20):
        at = rng.randrange(len(whole))
        life.file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        damaged = Life(tmp_path, known=True)
        assert damaged.journal.damaged >= 1  # and what builds on that alone
        assert damaged.folder.status()["damaged_lines"] == damaged.journal.damaged
        damaged.ledger.sweep(now_s + 1e6)
        assert not len(damaged.ledger) and set(damaged.wanted(keys, now_s)) == {None}
        damaged.kill()


def test_the_file_is_in_proportion_to_what_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "_SPARE_BYTES", 10_000)
    life = Life(tmp_path)
    keys, largest = [key(number) for number in range(50)], 0
    for turn in range(2_000):
        life.ledger.claim(f"{turn % 5:x}", keys[: 10 + turn % 5], "gpu", turn, 50.0)
        life.is_in(keys[:10], "disk", gone=turn % 2)
        life.journal.flush()
        largest = max(largest, life.file.stat().st_size)
    assert 10_000 < largest < 20_000
    life.ledger.sweep(1e6)
    life.journal._write_whole()
    assert life.file.stat().st_size < 100
    life.kill()


def test_what_could_not_be_written_is_written_later(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "_RETRY_S", 0.0)
    life, record = Life(tmp_path / "journal"), DecisionRecord(0.0, "a")
    life.ledger.claim("a", [key(1)], "disk", 0.0, 1e9)
    life.journal.append(record)
    shutil.rmtree(tmp_path / "journal")
    (tmp_path / "journal").write_text("in the way")
    life.ledger.claim("b", [key(2)], "disk", 0.0, 1e9)
    with pytest.raises(OSError, match="the journal cannot be written"):
        life.journal.append(record)
    assert life.folder.status()["errors"] == [life.journal.error]
    (tmp_path / "journal").unlink()
    life.journal.append(record)
    life.kill()
    assert len(Life(tmp_path / "journal").ledger) == 2


def test_what_a_tier_has_lost_while_the_server_was_down_is_not_believed_to_be_there(tmp_path):
    life, keys = Life(tmp_path), [key(1), key(2), key(3)]
    life.is_in(keys, "remote")
    life.is_in(keys[:1], "disk")
    life.journal.flush()
    life.kill()
    life = Life(tmp_path)
    there = ChunkKey(MODEL.name, ObjectKey.ComputeKVRank(1, 0, 1, 0), 0, keys[2], "")

    def contents():
        life.is_in([key(4)], "remote")  # stored while it is listed
        return [there]

    life.places.look_through("remote", contents)
    assert life.cold() == {keys[0]: 2, keys[2]: 4, key(4): 4}
    life.kill()


def test_two_servers_do_not_share_a_journal(tmp_path):
    life = Life(tmp_path)
    with pytest.raises(BlockingIOError):
        JournalFolder(tmp_path, life.places)
    assert journals.open_journals(str(tmp_path), None, life.places) is None
    assert journals.open_journals("", None, life.places) is None  # no disk tier
    assert journals.open_journals("off", str(tmp_path), life.places) is None
    life.kill()


# ---- threads that hang ------------------------------------------------------------------------


def test_a_repeated_task_goes_on_when_it_hangs_or_would_end_its_thread():
    calls, let_go = [], threading.Event()

    def task():
        calls.append(threading.current_thread())
        if len(calls) == 2:
            raise SystemExit
        if len(calls) == 4:
            let_go.wait()

    repeater = Repeater(task, 0.01)
    repeater.start()
    wait_until(lambda: len(calls) == 4)
    assert len(set(calls)) == 1 and repeater.restarts == 0
    wait_until(lambda: repeater.busy_s > 0.2)
    repeater.revive(stuck_s=60.0)
    assert repeater.restarts == 0
    repeater.revive(stuck_s=0.1)
    wait_until(lambda: len(calls) > 8)
    let_go.set()
    wait_until(lambda: not calls[0].is_alive())  # the old thread ends, the new one goes on
    assert repeater.restarts == 1 and len(set(calls)) == 2
    repeater.close()


def test_decisions_go_on_where_workers_hang():
    let_go, done = threading.Event(), []
    queue = JobQueue(lambda job: job == "hangs" and let_go.wait() or done.append(job), print, 100)
    for job in ("hangs", 1, 2):
        queue.put(job)
    wait_until(lambda: queue.busy_s > 0.2)
    queue.revive(stuck_s=60.0)
    assert done == [] and queue.restarts == 0
    queue.revive(stuck_s=0.1)
    wait_until(lambda: done == [1, 2])
    queue.revive(stuck_s=0.1)
    assert queue.restarts == 1
    let_go.set()
    assert queue.close(60.0) and done == [1, 2]


# ---- an LMCache that has changed ---------------------------------------------------------------


def storage_manager(**without):
    """What `missing` looks for, less what a test takes away."""
    listener = SimpleNamespace(on_l1_keys_write_finished=print)
    controller = SimpleNamespace(_listener=listener, _policy=None)
    parts = {"_store_controllers": {0: controller}, "_prefetch_controller": controller}
    for path in without.get("names", ()):
        owner, _, name = path.rpartition(".")
        delattr(controller if owner else listener, name) if owner != "sm" else parts.pop(name)
    return SimpleNamespace(**parts)


@pytest.mark.parametrize(
    "name, features",
    [
        ("sm._store_controllers", {LATE_WRITES, POLICIES}),
        ("sm._prefetch_controller", {POLICIES}),
        ("controller._policy", {POLICIES}),
        ("controller._listener", {LATE_WRITES}),
        ("on_l1_keys_write_finished", {LATE_WRITES}),
    ],
)
def test_each_private_name_switches_off_what_needs_it(name, features):
    assert set(missing(storage_manager(), [])) == {REQUESTS}  # no module has handlers
    absent = missing(storage_manager(names=[name]), [])
    assert set(absent) == features | {REQUESTS}
    assert all(feature in warning_of(absent) for feature in features)


def test_an_unknown_version_is_warned_of(monkeypatch):
    assert warning_of({}) == ""
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "9.9")
    text = "LMCache 9.9 is unknown to this kit, written for 0.5.6; switched off: nothing"
    assert warning_of({}) == text


# ---- real servers -------------------------------------------------------------------------------


def on_disk(folder):
    """Hashes of the chunks in a server's folder."""
    return {file.name.split("@")[3].partition(".")[0] for file in (folder / "disk").glob("*.data")}


def in_redis(port):
    with redis.Redis(port=port) as client:
        return {name.decode().split("@")[3] for name in client.scan_iter("*@*@*@*")}


def kept(client, number, tier):
    """Store a prompt that is wanted for an hour; returns its chunks once that is decided."""
    count = len(client.generations())
    client.serve(prompt(number, 5), tier=tier, ttl=3600.0)
    (record,) = wait_until(lambda: client.generations()[count:])
    assert record.tier_after == {tier: 5}
    return set(record.chunk_keys)


def stores_until_killed(running, seed):
    """Store prompts that are wanted for a second, from three clients, and kill the server amid."""
    stop, served = threading.Event(), itertools.count()

    def work(number):
        rng, client = random.Random(seed + number), Client(running.url, number)
        while not stop.is_set():
            tier = rng.choice(TIERS)
            with contextlib.suppress(Exception):  # the server is gone
                client.serve(prompt(1000 * (seed + number) + next(served), 5), tier=tier, ttl=1.0)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(2, 5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: next(served) > 25)
    running.process.kill()
    running.process.wait()
    stop.set()


def test_kills_amid_stores_lose_nothing_wanted_and_leave_nothing_for_ever(tmp_path, redis_port):
    heuristics = {"base_ttl": 2.0, "min_ttl": 0.1, "disk_ttl_factor": 0.5, "remote_ttl_factor": 0.5}
    config, wanted = {"heuristics": heuristics}, {"disk": set(), "remote": set()}
    for life in range(2):
        with inside_server(tmp_path, config, redis=redis_port) as running:
            client = Client(running.url)
            for number, tier in enumerate(wanted, 10 * life + 1):
                wanted[tier] |= kept(client, number, tier)
            stores_until_killed(running, 10 * life)
    stray = next((tmp_path / "disk").glob("*.data"))
    shutil.copy(stray, str(stray).replace(stray.name.split("@")[3][:8], "0badc0de"))
    other = stray.name.replace("inside-model", "another")
    shutil.copy(stray, tmp_path / "disk" / other)
    assert on_disk(tmp_path) > wanted["disk"] and in_redis(redis_port) >= wanted["remote"]
    with inside_server(tmp_path, config, redis=redis_port) as running:
        wait_until(lambda: on_disk(tmp_path) == wanted["disk"])  # no engine has come yet
        wait_until(lambda: in_redis(redis_port) == wanted["remote"])
        wait_until(lambda: not (tmp_path / "disk" / other).exists())
        client = Client(running.url)
        assert [client.look_up(prompt(number, 5)) for number in (1, 2, 11, 12)] == [5] * 4
        wait_until(lambda: client.status()["claims"]["inside-model"] == 4)  # all others have ended
        status = client.status()
        assert status["failures"] == {} and status["switched_off"] == {}
        assert status["journal"] == {"damaged_lines": 0, "errors": []}
        assert status["chunks"]["disk"] == 10
        client.close()


FAILING = """
import functools, pathlib, sys, time
from kvttl.server import guard, module
flag, seen, *_ = map(pathlib.Path, sys.argv[1:])
def may_fail(hook, name):
    @functools.wraps(hook)
    def call(*args, **kwargs):
        now = flag.read_text()
        if now == name:
            raise RuntimeError("asked to fail")
        if now == name + " exits":
            raise SystemExit
        while flag.read_text() == name + " hangs":
            time.sleep(0.05)
        return hook(*args, **kwargs)
    return call
guarded = guard.Guard.__call__
def with_failures(self, hook, name, default=None):
    with seen.open("a") as file:
        file.write(name + chr(10))
    return guarded(self, may_fail(hook, name), name, default)
guard.Guard.__call__ = with_failures
for owner, names in ((module.KvttlModule, ["_manage"]), (module.Places, ["first_to_go", "stored"])):
    for name in names:
        setattr(owner, name, may_fail(getattr(owner, name), name))
from kvttl.server.__main__ import with_policies
from kvttl.server.compat import register
register()
from lmcache.cli.main import main
main(with_policies(sys.argv[sys.argv.index("server"):]))
"""
ONE_HOUR = {"heuristics": {"base_ttl": 3600.0}, "stuck_s": 1.0}
INNER = ["_manage", "first_to_go", "stored"]  # of hooks: what they call
# By a thread, not by a request: it dies, or hangs.
LOOPS = {"pass exits": "", "_manage exits": "", "pass hangs": "pass"}
LOOPS |= {"journal hangs": "journal", "_manage hangs": "decisions"}
ALWAYS = set(
    "beginning, look-up, room for a store, store, end of a session, targets, pass".split(", ")
)


def is_kept(client, tokens):
    client.serve(tokens)
    return client.serve(tokens) == 5


def unknown_bytes(status):
    return status["gpu_bytes"][0] - CHUNK_BYTES * status["chunks"]["gpu"]


@pytest.mark.parametrize("transport", ["zmq", "grpc"])
def test_whatever_fails_or_hangs_costs_no_request(tmp_path, transport):
    """Each hook that the guard knows, in turn, while more is stored than there is room for."""
    (flag := tmp_path / "fails").write_text("beginning")
    seen, transport = tmp_path / "seen", ("--transport", transport, "--max-workers", "2")
    program = [sys.executable, "-c", FAILING, str(flag), str(seen)]
    with inside_server(tmp_path, ONE_HOUR, program=program, options=transport) as running:
        client, numbers = Client(running.url), itertools.count(1)
        client.serve(prompt(next(numbers), 5))
        hooks = list(dict.fromkeys(seen.read_text().splitlines()))
        names = [*hooks, *INNER, *LOOPS] if "zmq" in transport else ["store", *LOOPS]
        for name in names:
            flag.write_text(name)
            for number in itertools.islice(numbers, 14):
                assert client.serve(prompt(number, 5)) == 0, name
            # Still there is room for more: if not at once, soon.
            wait_until(lambda: is_kept(client, prompt(next(numbers), 5)))
            if thread := LOOPS.get(name):
                wait_until(lambda thread=thread: client.status()["threads"][thread]["restarts"])
        known = unknown_bytes(client.status())
        flag.write_text("store")
        client.serve(prompt(next(numbers), 5), tier="disk")
        wait_until(lambda: unknown_bytes(client.status()) <= known)  # nobody else lets it go
        flag.write_text("")
        client.serve(tokens := prompt(next(numbers), 5), tier="disk")
        wait_until(lambda: client.look_up(tokens) == 5 and client.serve(tokens, tier="disk") == 5)
        status = client.status()
        assert status["failures"].keys() >= (ALWAYS if "zmq" in transport else {"store"})
        client.close()


FIRST_COUNTS = """
import importlib.metadata, sys
from lmcache.v1.multiprocess.transport.zmq_impl.mq import MessageQueueServer as Server
version = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9" if name == "lmcache" else version(name)
for name in ("add_sync_handler", "add_blocking_handler"):
    def add(self, spec, handler, add=getattr(Server, name)):
        if spec.operation not in self.handlers:
            add(self, spec, handler)
    setattr(Server, name, add)
from lmcache.cli.main import main
main(sys.argv[1:])
"""


def test_an_lmcache_whose_first_handler_counts_is_seen_at_the_start(tmp_path):
    program = [sys.executable, "-c", FIRST_COUNTS]
    with inside_server(tmp_path, ONE_HOUR, program=program) as running:
        client = Client(running.url)
        wait_until(lambda: client.status()["switched_off"].keys() == {"requests"})
        assert "LMCache 9.9 is unknown to this kit" in running.log.read_text()
        client.serve(tokens := prompt(1, 5))
        assert client.look_up(tokens) == 5  # LMCache does what it does without us
        client.close()


def test_a_policy_that_learns_decides_and_gpu_follows_its_values(tmp_path):
    config = {
        **ONE_HOUR,
        "policy": "adaptive",
        "workers": 1,
        "save": "demotion",
        "high": 1.0,
        "low": 1.0,
        "sweep_s": 0.5,
    }
    with inside_server(tmp_path, config, l1_chunks=64) as running:
        client = Client(running.url)
        client.serve(prompt(1, 10), ttl=9000.0)  # by the formula's order it would stay longest
        for number in range(2, 5):
            client.serve(prompt(number, 10), finish="stop", output_tokens=7)
        wait_until(
            lambda: len(client.generations()) == 4, limit_s=500.0
        )  # compiled in the background
        for number in range(5, 9):
            client.serve(prompt(number, 10))
        records = wait_until(lambda: len(client.generations()) == 8 and client.generations())
        assert {record.policy for record in records} == {"adaptive"}
        assert {record.policy_error for record in records} == {""}
        assert (records[1].finish_reason, records[1].output_tokens) == ("stop", 7)
        values = [record.decided[0]["value"] for record in records]
        assert values == sorted(values) and records[0].hints["ttl"] == "accepted"
        assert records[0].ttl_s == 9000.0
        assert [client.serve(prompt(number, 10)) for number in (8, 7, 1)] == [10, 10, 0]
        assert client.status()["failures"] == {}
        client.close()
    assert list(tmp_path.glob("disk.kvttl/*/policy-adaptive.npz"))
