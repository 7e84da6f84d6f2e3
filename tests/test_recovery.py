"""After the process dies anywhere: no claim lost, none immortal, every chunk where it belongs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_managers import (
    CHUNK,
    COLD,
    HOT,
    HOT_TTL_S,
    LADDER_S,
    WARM,
    Clock,
    assert_all_claimed_and_none_too_hot,
    assert_nothing_is_immortal,
    hottest,
    local_controller,
    local_manager,
)

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.decisions.log import DecisionLog, DecisionRecord, read_records
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.manager.recovery import recover_claims
from tiered_caching import LocalDiskBackend

ROOT = Path(__file__).parents[1]
SYSTEM = "s" * CHUNK
A, B, C = SYSTEM + "a" * 2 * CHUNK, SYSTEM + "b" * CHUNK, "c" * CHUNK
KEYS = tuple(
    key
    for prompt in (A, B, C)
    for key in local_controller().layout(list(prompt.encode())).keys  # same in every controller
)


# ---- dying at every point --------------------------------------------------------------

# Seconds since the start, then what happens: a generation, or a sweep (None).
STORY = (
    (0, A, HOT),
    (5, B, COLD),  # its own chunk goes to remote, the shared one stays
    (10, C, WARM),
    (20, C, HOT),  # a promotion
    (50, A, WARM),  # goes cooler by decision
    (60, A, HOT),
    (70, B, HOT),
    (130, None, None),
    (140, B, WARM),
    (200, None, None),
    (400, C, COLD),
    (1000, None, None),
    (1500, A, HOT),  # comes back from below
    (9000, None, None),  # everything is dropped
    (9010, B, COLD),
    (9010, A, WARM),
)


class Killed(BaseException):
    """The process is gone: nothing may catch this, nothing runs after it."""


class Doom:
    """Counts the effects that outlive a process, and kills it before one of them."""

    def __init__(self, at: int | None, torn: bool = False) -> None:
        self.count, self.at, self.torn = 0, at, torn

    def tick(self):
        if self.count == self.at:
            raise Killed
        self.count += 1

    def watch(self, controller):
        """Make each write and delete of moves and drops an effect; stores are not ours."""
        for backend in controller.backends.values():
            backend.delete = self._before(backend.delete, lambda key: True)
            backend.set = self._before(backend.set, lambda key: key in controller._known)

    def _before(self, method, counts):
        def call(key, *args):
            if counts(key):
                self.tick()
            return method(key, *args)

        return call


class DoomedLog(DecisionLog):
    """A log whose writer may die before a line or in the middle of it."""

    doom: Doom

    def append(self, record):
        try:
            self.doom.tick()
        except Killed:
            if self.doom.torn and self.path:
                with open(self.path, "ab") as file:
                    file.write(record.to_json().encode()[:50])
            raise
        super().append(record)


def act(cache, prompt, metadata):
    if prompt is None:
        cache.sweep()
    else:
        cache.generate_and_manage(prompt, None, metadata)


def wanted(cache):
    return dict(zip(KEYS, cache.claims.wanted(KEYS, cache.clock())))


def doomed(folder, doom):
    """Return a manager that dies when told to; its controller lives on, as LMCache would."""
    controller = local_controller()
    log = DoomedLog(folder)
    log.doom = doom
    cache = local_manager(controller, Clock(0.0), log=log)
    doom.watch(controller)
    return cache


def uninterrupted(folder):
    """Return what is wanted before and after each step of the story, and the count of effects."""
    doom, states = Doom(at=None), []
    cache = doomed(folder, doom)
    for at_s, prompt, metadata in STORY:
        cache.clock.now_s = at_s
        before = wanted(cache)
        act(cache, prompt, metadata)
        states.append((before, wanted(cache)))
    return states, doom.count


def run_until_killed(cache):
    """Tell the story; returns the number of the step in which the process died."""
    for number, (at_s, prompt, metadata) in enumerate(STORY):
        cache.clock.now_s = at_s
        try:
            act(cache, prompt, metadata)
        except Killed:
            return number
    raise AssertionError("nobody died")


def restarted(dead, folder):
    """Return a second manager over what the first has left behind, recovered."""
    dead.controller.backends = {
        tier: _alive(backend) for tier, backend in dead.controller.backends.items()
    }
    cache = local_manager(dead.controller, dead.clock, log=DecisionLog(folder))
    cache.recover(folder)
    return cache


def agrees(cache, state):
    """Say whether all is wanted as in `state`; what nobody claims there is kept or dropped."""
    held = dict(zip(KEYS, cache.controller.layout_of(KEYS).of(cache.controller.instance_id)))
    return all(
        tier == state[key] or (state[key] is None and tier in held[key][:1])
        for key, tier in wanted(cache).items()
    )


def _alive(backend):
    for name in ("set", "delete"):
        backend.__dict__.pop(name, None)
    return backend


@pytest.mark.parametrize("torn", [False, True])
def test_death_at_every_point(tmp_path, torn):
    """After a restart all is as if the interrupted step had happened, or as if it had not."""
    states, effects = uninterrupted(tmp_path / "none")
    assert effects > 60
    seen = set()
    for at in range(effects):
        folder = tmp_path / str(at)
        dead = doomed(folder, Doom(at, torn))
        number = run_until_killed(dead)
        seen.add(number)
        cache = restarted(dead, folder)
        assert any(agrees(cache, state) for state in states[number]), (at, STORY[number])
        cache.sweep()
        assert_all_claimed_and_none_too_hot(cache)
        act(cache, *STORY[number][1:])
        for at_s, prompt, metadata in STORY[number + 1 :]:
            cache.clock.now_s = at_s
            act(cache, prompt, metadata)
        cache.sweep()
        assert_all_claimed_and_none_too_hot(cache)
        assert_nothing_is_immortal(cache)
    assert seen == set(range(len(STORY)))  # the process has died in every step


def test_death_twice_in_a_row(tmp_path):
    """The second process dies in its first sweep; a third one goes on."""
    dead = doomed(tmp_path, Doom(None))
    for prompt in (A, B, C):
        dead.generate_and_manage(prompt, None, HOT)
    dead.clock.now_s += HOT_TTL_S
    for at in range(12):
        cache = restarted(dead, tmp_path)
        doom = Doom(at)
        doom.watch(cache.controller)
        try:
            cache.sweep()
        except Killed:
            pass
        dead = cache
        dead.clock.now_s += 0.001  # no two processes write in the same instant
    cache = restarted(dead, tmp_path)
    cache.sweep()
    assert_all_claimed_and_none_too_hot(cache)
    assert {tier for prompt in (A, B, C) for tier in hottest(cache, prompt)} == {"disk"}
    assert_nothing_is_immortal(cache)


# ---- what a log may hold ---------------------------------------------------------------


def test_recovery_says_what_it_did(tmp_path):
    first = local_manager(log=DecisionLog(tmp_path))
    first.generate_and_manage(A, None, HOT)
    first.generate_and_manage(C, None, HOT)
    controller = first.controller
    controller.note_generated(list(b"orphaned"))  # by a process that died before it could write
    # It also died between the write-ahead and the move.
    record = DecisionRecord(
        first.clock(),
        first.records[-1].prompt_digest,
        kind="claim",
        ttl_s=88.0,
        wanted_tier="remote",
        chunk_keys=first.records[-1].chunk_keys,
    )
    records = [*read_records(tmp_path, kinds=None), record]
    second = local_manager(controller, first.clock)
    assert second.recover(records) == {"claims": 2, "adopted": 1, "unsettled": 1}
    (settled,) = second.sweep()
    assert (settled.kind, settled.wanted_tier) == ("settled", "remote")
    assert hottest(second, C) == ["remote"] and hottest(second, A) == ["gpu"] * 3
    assert hottest(second, "orphaned") == ["gpu"]
    assert_nothing_is_immortal(second)


def test_recovering_twice_or_late_harms_no_claim(tmp_path):
    """The second look must not take the first one's, or this process's, claims apart."""
    first = local_manager()
    first.generate_and_manage(A, None, HOT)  # no log: all of it is adopted
    second = local_manager(first.controller, first.clock)
    assert second.recover([])["adopted"] == 3
    second.generate_and_manage(A, None, WARM)
    second.generate_and_manage(B, None, COLD)
    claims = len(second.claims)
    assert second.recover([])["adopted"] == 0
    assert len(second.claims) == claims
    assert_nothing_is_immortal(second)


def test_dropped_claims_stay_dropped_and_come_back_with_a_new_generation(tmp_path):
    first = local_manager(log=DecisionLog(tmp_path))
    first.generate_and_manage(A, None, HOT)
    first.clock.now_s += LADDER_S
    first.sweep()
    second = local_manager(first.controller, first.clock, log=DecisionLog(tmp_path))
    assert second.recover(tmp_path)["claims"] == 0
    second.clock.now_s += 1
    second.generate_and_manage(A, None, WARM)
    third = local_manager(first.controller, first.clock)
    assert third.recover(tmp_path) == {"claims": 1, "adopted": 0, "unsettled": 0}
    assert wanted(third) == wanted(second)


def test_a_claim_made_while_the_last_one_was_dropped_is_kept():
    """A sweep between a generation and its decision: in time order the drop comes last."""
    key = "k" * 64
    made = {"ttl_s": 100.0, "wanted_tier": "disk", "chunk_keys": (key,)}
    records = [
        DecisionRecord(0.0, "ab", **made),
        DecisionRecord(999.9, "ab", **made),
        DecisionRecord(1000.0, "ab", kind="expiry", from_tier="remote"),
    ]
    cache = local_manager()
    assert cache.recover(records)["claims"] == 1
    assert cache.claims.wanted([key], 1000.0) == ["disk"]
    assert local_manager().recover([records[0], records[2]])["claims"] == 0


def test_a_renewal_while_lmcache_was_away_counts(tmp_path):
    first = local_manager(log=DecisionLog(tmp_path))
    first.generate_and_manage(A, None, HOT)
    first.clock.now_s += HOT_TTL_S - 1

    def away(tokens):
        raise LMCacheUnavailable("LMCache is away")

    first.controller.layout = away
    first.generate_and_manage(A, None, HOT)
    del first.controller.layout
    second = local_manager(first.controller, first.clock)  # the first dies before its next sweep
    assert second.recover(tmp_path)["claims"] == 1
    second.clock.now_s += HOT_TTL_S - 1
    assert second.sweep() == [] and hottest(second, A) == ["gpu"] * 3
    second.clock.now_s += 1
    assert len(second.sweep()) == 1 and hottest(second, A) == ["disk"] * 3


def test_one_impossible_record_does_not_stop_the_recovery():
    good = DecisionRecord(1000.0, "ab", ttl_s=60.0, wanted_tier="disk", chunk_keys=("k" * 64,))
    for digest, tier in (("not hex", "disk"), ("", "disk"), ("cd", "tape"), ("cd", None)):
        bad = DecisionRecord(1000.0, digest, ttl_s=60.0, wanted_tier=tier, chunk_keys=("j" * 64,))
        cache = local_manager()
        assert cache.recover([bad, good])["claims"] == 1
        assert cache.claims.wanted(["k" * 64, "j" * 64], cache.clock()) == ["disk", None]


def test_claims_are_made_even_if_the_directory_cannot_be_read(tmp_path):
    first = local_manager(log=DecisionLog(tmp_path))
    first.generate_and_manage(A, None, WARM)
    second = local_manager(first.controller, first.clock)

    def away(keys=None):
        raise LMCacheUnavailable("LMCache is away")

    first.controller.layout_of = away
    with pytest.raises(LMCacheUnavailable):
        second.recover(tmp_path)
    assert wanted(second) == wanted(first)


def test_kv_that_no_log_names_is_adopted_where_it_is():
    first = local_manager()
    first.generate_and_manage(B, None, COLD)
    second = local_manager(first.controller, first.clock)
    found = recover_claims(second._decider.settler, [], second.clock(), adopted_ttl_s=50.0)
    assert found == {"claims": 0, "adopted": 2, "unsettled": 0}
    assert hottest(second, B) == ["remote"] * 2
    second.clock.now_s += 50.0  # remote is the last rung
    second.sweep()
    assert hottest(second, B) == [None] * 2 and len(second.claims) == 0


# ---- any sequence ----------------------------------------------------------------------

PROMPTS = [A, B, C, A[: 2 * CHUNK], C + "d" * CHUNK, "short"]
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("generate"),
            st.sampled_from(PROMPTS),
            st.sampled_from([HOT, WARM, COLD, None]),
        ),
        st.tuples(st.just("pass"), st.sampled_from([0.5, 10, 90, 200, 500, 3000])),
        st.tuples(st.just("sweep")),
        st.tuples(st.just("crash")),
        st.tuples(st.just("away"), st.sampled_from(["layout", "layout_of", "move", "discard"])),
        st.tuples(st.just("back")),
    ),
    max_size=25,
)


class World:
    """One LMCache, one log folder, and the managers that come and go."""

    def __init__(self, folder):
        self._folder, self._away = folder, set()
        self.controller, self.clock = local_controller(), Clock()
        self.cache = self._manager()

    def _manager(self):
        return local_manager(self.controller, self.clock, log=DecisionLog(self._folder))

    def take(self, action, *arguments):
        getattr(self, f"do_{action}")(*arguments)

    def do_generate(self, prompt, metadata):
        assert self.cache.generate_and_manage(prompt, None, metadata) == prompt.upper()

    def do_pass(self, seconds):
        self.clock.now_s += seconds

    def do_sweep(self):
        self.cache.sweep()
        if not (self._away or self.cache._decider.settler.unsettled):
            assert_all_claimed_and_none_too_hot(self.cache)

    def do_crash(self):
        self.do_back()  # a restart waits for LMCache
        self.clock.now_s += 0.001
        self.cache = self._manager()
        self.cache.recover(self._folder)
        self.do_sweep()

    def do_away(self, method):
        def away(*_args, **_options):
            raise LMCacheUnavailable("LMCache is away")

        setattr(self.controller, method, away)
        self._away.add(method)

    def do_back(self):
        while self._away:
            delattr(self.controller, self._away.pop())


@settings(max_examples=120)
@given(steps)
def test_any_sequence_keeps_every_chunk_claimed_and_cool_enough(sequence):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "log")
        for step in sequence:
            world.take(*step)
        world.do_back()
        world.clock.now_s += 61  # whatever failed is tried again within a minute
        world.cache.sweep()
        assert world.cache._decider.settler.unsettled == 0
        assert_all_claimed_and_none_too_hot(world.cache)
        assert_nothing_is_immortal(world.cache)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PROMPTS),
            st.sampled_from([HOT, WARM, COLD]),
            st.sampled_from([0.0, 30, 150, 700, 5000]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_a_restart_wants_what_the_first_process_wanted(generations):
    with tempfile.TemporaryDirectory() as folder:
        first = local_manager(log=DecisionLog(folder))
        for prompt, metadata, passed_s in generations:
            first.generate_and_manage(prompt, None, metadata)
            first.clock.now_s += passed_s
            first.sweep()
        keys = first.controller.layout_of().keys
        second = local_manager(first.controller, Clock(first.clock.now_s))
        second.recover(folder)
        for _ in range(8):  # now, and all the way down
            now_s = second.clock.now_s
            assert second.claims.wanted(keys, now_s) == first.claims.wanted(keys, now_s)
            second.clock.now_s += HOT_TTL_S * 4
        assert_nothing_is_immortal(second)


# ---- a real SIGKILL ----------------------------------------------------------------------

CHILD = """
import random, sys
from test_recovery import killed_process
killed_process(sys.argv[1], int(sys.argv[2]))
"""
SHORT = HeuristicConfig(base_ttl=0.1, min_ttl=0.01, alpha=0.0, disk_ttl_factor=1.0)
SPOKEN = [SYSTEM + letter * CHUNK * 2 for letter in "abcdef"]


def disk_controller(folder):
    """Return a controller whose three tiers outlive the process."""
    backends = {tier: LocalDiskBackend(Path(folder) / tier) for tier in TIERS}
    return local_controller(backends=backends)


def killed_process(folder, seed):
    """Generate, move and expire until somebody kills this process."""
    import random

    rng = random.Random(seed)
    log = DecisionLog(Path(folder) / "log")
    options = {"config": SHORT, "clock": time.time, "log": log, "background": seed % 2 == 1}
    with local_manager(disk_controller(folder), sweep_every_s=0.02, **options) as cache:
        while True:
            prompt, metadata = rng.choice(SPOKEN), rng.choice([HOT, WARM, COLD])
            cache.generate_and_manage(prompt, None, metadata)
            cache.flush()


def start_child(folder, seed):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests")))}
    command = [sys.executable, "-c", CHILD, str(folder), str(seed)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE)


def kill_after_lines(child, folder, lines):
    """Kill the child once its log has that many lines; it may be in the middle of anything."""
    deadline_s = time.monotonic() + 60
    while sum(path.read_bytes().count(b"\n") for path in folder.glob("log/*.jsonl")) < lines:
        assert child.poll() is None, child.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline_s, "the child writes no log"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    child.stderr.close()


def test_sigkill_during_moves(tmp_path):
    folders = [tmp_path / str(seed) for seed in range(4)]
    children = [start_child(folder, seed) for seed, folder in enumerate(folders)]
    try:
        for seed, (folder, child) in enumerate(zip(folders, children)):
            kill_after_lines(child, folder, 40 + 7 * seed)
    finally:
        for child in children:
            child.kill()
            child.wait()
    for folder in folders:
        check_what_the_dead_left(folder)


def check_what_the_dead_left(folder):
    records = list(read_records(folder / "log", kinds=None))
    assert {"claim", "generation"} <= {record.kind for record in records}
    controller = disk_controller(folder)
    prompts = [list(prompt.encode()) for prompt in SPOKEN]
    # A LocalLMCacheController lists only what this process has stored; LMCache lists all.
    keys = dict.fromkeys(key for tokens in prompts for key in controller.layout(tokens).keys)
    assert {key for record in records for key in record.chunk_keys} <= set(keys)
    controller._known = keys
    cache = local_manager(controller, Clock(records[-1].time_s), config=SHORT)
    counts = cache.recover(records)
    assert counts["claims"] + counts["adopted"] > 0
    latest = {r.prompt_digest: r for r in records if r.kind in ("claim", "generation")}
    live = [r for r in latest.values() if r.time_s + r.ttl_s > cache.clock()]
    for record in live:  # no claim lost
        for tier in cache.claims.wanted(record.chunk_keys, cache.clock()):
            assert tier is not None and TIERS.index(tier) <= TIERS.index(record.wanted_tier)
    cache.sweep()
    assert_all_claimed_and_none_too_hot(cache)
    for tokens in prompts:  # whole chunks or none: what is left serves
        stored = [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]
        for payload, chunk in zip(controller.load(tokens), stored):
            assert list(memoryview(payload).cast("q")) == chunk
    assert_nothing_is_immortal(cache)
    assert not [file for tier in TIERS for file in (folder / tier).glob("[0-9a-f]" * 64)]
