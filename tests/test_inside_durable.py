"""The server module over kills, failures and unknown LMCaches; and with a policy that learns."""

from __future__ import annotations

import random
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from waiting import wait_until

from caching_heuristics import TIERS
from kvttl.background import JobQueue, Repeater
from kvttl.decisions.log import DecisionRecord
from kvttl.manager.claims import ClaimLedger
from kvttl.server import journal as journals
from kvttl.server.compat import LATE_WRITES, POLICIES, REQUESTS, missing, warning_of
from kvttl.server.journal import JournalFolder
from kvttl.server.places import Model, Places

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
        assert 1 <= damaged.journal.damaged <= 5  # and what builds on nothing else
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
