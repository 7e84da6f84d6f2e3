"""Decisions and sweeps at the same time: nobody waits, nothing is lost, the hotter wish wins.

A call of the controller that blocks until it is told to go on stands for LMCache being
slow just there; everything else is real.
"""

from __future__ import annotations

import random
import threading
import time
from contextlib import contextmanager

import pytest
from local_managers import (
    CHUNK,
    COLD,
    CONFIG,
    HOT,
    HOT_TTL_S,
    LADDER_S,
    WARM,
    assert_all_claimed_and_none_too_hot,
    assert_nothing_is_immortal,
    hottest,
    local_controller,
    local_manager,
)

from kvttl.lmcache.client import LMCacheUnavailable

PROMPT = "0123456789abcdef"  # two chunks
LIMIT_S = 20


@pytest.fixture
def cache():
    with local_manager() as manager:
        yield manager


class Blocked:
    """Makes the next call of a controller's method wait, before or after it has acted."""

    def __init__(self, controller, name, acts_first):
        self._method, self._acts_first = getattr(controller, name), acts_first
        self.inside, self.go = threading.Event(), threading.Event()
        self._controller, self._name = controller, name
        setattr(controller, name, self)

    def __call__(self, *args, **options):
        setattr(self._controller, self._name, self._method)  # only this one call
        done = self._method(*args, **options) if self._acts_first else None
        self.inside.set()
        assert self.go.wait(LIMIT_S)
        return done if self._acts_first else self._method(*args, **options)


@contextmanager
def meanwhile(cache, work, method, acts_first=False):
    """Run `work` on a thread up to a call of a controller's method; then it may go on."""
    blocked = Blocked(cache.controller, method, acts_first)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert blocked.inside.wait(LIMIT_S)
        yield thread
        assert thread.is_alive()  # nobody has waited for it
    finally:
        blocked.go.set()
        thread.join(LIMIT_S)
    assert not thread.is_alive()


def settle(cache):
    """Let what could not be done at once be done, without any TTL ending."""
    for _ in range(4):
        cache.clock.now_s += 2.0
        cache.sweep()
    assert cache._decider.settler.unsettled == 0


# ---- nobody waits ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["move", "layout_of"])
def test_a_generation_does_not_wait_for_a_sweep(cache, method):
    for number in range(3):
        cache.generate_and_manage(f"{number}{PROMPT}", None, HOT)
    cache.clock.now_s += HOT_TTL_S
    with meanwhile(cache, cache.sweep, method):
        assert cache.generate_and_manage(PROMPT, None, WARM) == PROMPT.upper()
        assert cache.records[-1].error == "" and hottest(cache, PROMPT) == ["disk"] * 2
    assert {tier for n in range(3) for tier in hottest(cache, f"{n}{PROMPT}")} == {"disk"}


def test_a_sweep_does_not_wait_for_a_generation(cache):
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S

    def generate():
        cache.generate_and_manage("another " + PROMPT, None, WARM)

    with meanwhile(cache, generate, "move"):
        (record,) = cache.sweep()
        assert record.kind == "expiry" and hottest(cache, PROMPT) == ["disk"] * 2


@pytest.mark.parametrize("background", [False, True])
def test_decisions_look_up_at_the_same_time(background):
    """One at a time, at 43 ms each, would be 23 a second, whatever the number of callers."""
    controller, meet = local_controller(), threading.Barrier(3)
    layout = controller.layout

    def together(tokens):
        meet.wait(LIMIT_S)  # passes only if three are in here at once
        return layout(tokens)

    controller.layout = together
    cache = local_manager(controller, background=background, workers=3)
    prompts = [f"{number}{PROMPT}" for number in range(3)]

    def generate(prompt):
        cache.generate_and_manage(prompt, None, WARM)

    threads = [threading.Thread(target=generate, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert cache.flush(LIMIT_S)
    controller.layout = layout
    assert [record.error for record in cache.records] == [""] * 3
    assert {tier for prompt in prompts for tier in hottest(cache, prompt)} == {"disk"}
    cache.close()


# ---- the hotter wish wins -----------------------------------------------------------------


@pytest.mark.parametrize("acts_first", [False, True])
def test_a_wish_made_while_a_sweep_moves_down_ends_up_hot(cache, acts_first):
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    with meanwhile(cache, cache.sweep, "move", acts_first):
        cache.generate_and_manage(PROMPT, None, HOT)
        assert cache.records[-1].moves == ()  # it does not move what another one moves
    assert hottest(cache, PROMPT) == ["disk", "disk"]
    settle(cache)
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]
    assert_nothing_is_immortal(cache)


@pytest.mark.parametrize("cached", [True, False])
def test_a_wish_whose_look_up_is_old_ends_up_hot(cache, cached):
    """The sweep begins and ends between the decision's look-up and its claim."""
    if not cached:  # the engine has computed all of it anew
        cache.controller.load = lambda tokens: []
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S

    def generate():
        cache.generate_and_manage(PROMPT, None, HOT)

    with meanwhile(cache, generate, "layout", acts_first=True):
        cache.sweep()
        assert hottest(cache, PROMPT) == ["disk", "disk"]
    settle(cache)
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]


def test_a_wish_made_before_a_sweep_begins_to_move_keeps_its_chunks(cache):
    """The sweep has looked, and looks at the claims again before it moves."""
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    with meanwhile(cache, cache.sweep, "layout_of", acts_first=True):
        cache.generate_and_manage(PROMPT, None, HOT)
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]
    assert cache.records[-1].kind == "expiry" and cache.records[-1].moves == ()


def test_a_sweep_looks_at_the_claims_again_before_each_of_its_moves(cache, monkeypatch):
    monkeypatch.setattr("kvttl.manager.settling._BATCH_CHUNKS", 2)
    cache.generate_and_manage("first " + PROMPT[6:], None, HOT)
    cache.clock.now_s += 1.0
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    with meanwhile(cache, cache.sweep, "move"):  # of the first one
        cache.generate_and_manage(PROMPT, None, HOT)
    assert hottest(cache, "first " + PROMPT[6:]) == ["disk", "disk"]
    assert hottest(cache, PROMPT) == ["gpu", "gpu"] and cache._decider.settler.unsettled == 0


def test_a_hot_wish_during_another_decisions_move_ends_up_hot(cache):
    """Two prompts with the same beginning: one goes to remote, the other one is hot."""
    cold, hot = PROMPT + "c" * CHUNK, PROMPT + "h" * CHUNK

    def generate():
        cache.generate_and_manage(cold, None, COLD)

    with meanwhile(cache, generate, "move"):
        cache.generate_and_manage(hot, None, HOT)
    settle(cache)
    assert hottest(cache, hot) == ["gpu"] * 3
    assert hottest(cache, cold) == ["gpu", "gpu", "remote"]
    assert_nothing_is_immortal(cache)


def test_a_colder_wish_during_a_sweeps_move_ends_up_colder(cache):
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    with meanwhile(cache, cache.sweep, "move"):
        cache.generate_and_manage(PROMPT, None, COLD)
    settle(cache)
    assert hottest(cache, PROMPT) == ["remote", "remote"]


def test_a_promotion_that_is_in_the_way_too_is_tried_again(cache):
    """A sweep finds that a third one moves the chunk: the wish stays on the list."""
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    with meanwhile(cache, cache.sweep, "move"):
        cache.generate_and_manage(PROMPT, None, HOT)
        cache.clock.now_s += 2.0
        assert cache.sweep() == [] and cache._decider.settler.unsettled == 1
    settle(cache)
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]


def test_an_old_look_does_not_hide_a_new_hot_copy(cache):
    """Else the copy in gpu would be taken for a load's buffer, and never be moved down."""
    warm, hot = PROMPT + "w" * CHUNK, PROMPT + "h" * CHUNK
    cache.generate_and_manage(warm, None, WARM)
    assert hottest(cache, warm) == ["disk"] * 3

    def generate():
        cache.generate_and_manage(warm, None, WARM)

    with meanwhile(cache, generate, "layout", acts_first=True):  # on disk, it says
        cache.generate_and_manage(hot, None, HOT)
        assert hottest(cache, hot) == ["gpu"] * 3
    settle(cache)
    assert hottest(cache, hot) == ["gpu"] * 3
    cache.clock.now_s += HOT_TTL_S
    cache.sweep()
    assert "gpu" not in hottest(cache, hot)
    assert_nothing_is_immortal(cache)


def test_a_hot_wish_outlives_a_sweep_whose_move_breaks_off(cache):
    """The sweep puts its claim back on the list: it must not put it over the newer wish."""
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    move = cache.controller.move

    def moved_and_gone(*args, **options):
        move(*args, **options)
        raise LMCacheUnavailable("LMCache is away")

    cache.controller.move = moved_and_gone
    with meanwhile(cache, cache.sweep, "move"):
        cache.generate_and_manage(PROMPT, None, HOT)
    cache.controller.move = move
    assert hottest(cache, PROMPT) == ["disk", "disk"]
    settle(cache)
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]


def test_a_late_claim_that_meets_a_move_ends_up_hot(cache):
    """Two prompts with the same beginning; LMCache was away when the hot one was generated."""
    cold, hot = PROMPT + "c" * CHUNK, PROMPT + "h" * CHUNK
    layout = cache.controller.layout

    def away(tokens):
        raise LMCacheUnavailable("LMCache is away")

    cache.controller.layout = away
    cache.generate_and_manage(hot, None, HOT)
    cache.controller.layout = layout

    def generate():
        cache.generate_and_manage(cold, None, COLD)

    with meanwhile(cache, generate, "move"):
        cache.sweep()
    settle(cache)
    assert hottest(cache, hot) == ["gpu"] * 3
    assert hottest(cache, cold) == ["gpu", "gpu", "remote"]


# ---- nothing is lost --------------------------------------------------------------------------


def test_kv_that_is_wanted_again_before_the_drop_begins_is_not_dropped(cache):
    cache.generate_and_manage(PROMPT, None, COLD)
    cache.clock.now_s += CONFIG.ttl(COLD)
    dropped, discard = [], cache.controller.discard
    cache.controller.discard = lambda keys: dropped.extend(keys) or discard(keys)
    with meanwhile(cache, cache.sweep, "layout_of", acts_first=True):
        cache.generate_and_manage(PROMPT, None, COLD)
    assert dropped == [] and hottest(cache, PROMPT) == ["remote", "remote"]
    assert_nothing_is_immortal(cache)


def test_kv_that_is_wanted_during_the_drop_is_stored_anew_by_the_next_generation(cache):
    cache.generate_and_manage(PROMPT, None, COLD)
    cache.clock.now_s += CONFIG.ttl(COLD)
    with meanwhile(cache, cache.sweep, "discard"):
        cache.generate_and_manage(PROMPT, None, HOT)
        assert cache.records[-1].error == ""
    settle(cache)
    assert cache.generate_and_manage(PROMPT, None, HOT) == PROMPT.upper()
    assert hottest(cache, PROMPT) == ["gpu", "gpu"]
    assert_nothing_is_immortal(cache)


def test_a_copy_that_is_in_use_at_its_final_expiry_goes_later(cache):
    cache.generate_and_manage(PROMPT, None, COLD)
    cache.clock.now_s += CONFIG.ttl(COLD)
    discard, cache.controller.discard = cache.controller.discard, len  # of each a copy stays
    (record,) = cache.sweep()
    assert record.error == "" and record.tier_after == {"remote": 2}
    (move,) = record.moves
    assert (move["to"], move["status"]) == ("dropped", "timeout") and "in use" in move["reason"]
    cache.controller.discard = discard
    settle(cache)
    assert hottest(cache, PROMPT) == [None, None]
    assert_nothing_is_immortal(cache)


def test_a_move_that_fails_lets_go_of_its_chunks(cache):
    cache.generate_and_manage(PROMPT, None, HOT)
    cache.clock.now_s += HOT_TTL_S
    move = cache.controller.move

    def broken(*_args, **_options):
        raise ZeroDivisionError("a bug")

    cache.controller.move = broken
    assert cache.sweep()[0].error == "ZeroDivisionError: a bug"
    cache.generate_and_manage("other " + PROMPT, None, COLD)
    cache.controller.move = move
    cache.generate_and_manage(PROMPT, None, COLD)
    assert hottest(cache, PROMPT) == ["remote", "remote"]
    settle(cache)
    assert hottest(cache, "other " + PROMPT) == ["remote", "remote"]


@pytest.mark.parametrize("seed", range(3))
def test_many_threads_and_sweeps_end_where_the_claims_say(seed):
    """Moves that take their time, in every order: at the end all is where it is wanted."""
    controller = local_controller()
    cache = local_manager(controller)
    move, rng, stop = controller.move, random.Random(seed), threading.Event()

    def slow(*args, **options):
        time.sleep(rng.random() * 0.002)
        return move(*args, **options)

    controller.move = slow
    prompts = [PROMPT[: CHUNK * depth] + f"{n}" * CHUNK for depth in (0, 1, 2) for n in range(4)]

    def generate(number):
        mine = random.Random(seed * 100 + number)
        for _ in range(30):
            cache.clock.now_s += 1.0
            cache.generate_and_manage(mine.choice(prompts), None, mine.choice([HOT, WARM, COLD]))

    def sweep():
        while not stop.is_set():
            cache.sweep()
            time.sleep(0.001)

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    threads = [threading.Thread(target=generate, args=(number,)) for number in range(6)]
    for thread in sweepers + threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.generate_and_manage(prompts[0], None, HOT)  # what was hot may all have cooled down
    stop.set()
    for sweeper in sweepers:
        sweeper.join()
    for _ in range(70):  # whatever failed is tried again within a minute
        cache.clock.now_s += 1.0
        cache.sweep()
    assert [record.error for record in cache.records if record.error] == []
    assert cache._decider.settler.unsettled == 0
    assert_all_claimed_and_none_too_hot(cache)
    layout = controller.layout_of()
    wanted = cache.claims.wanted(layout.keys, cache.clock())
    held = layout.of(controller.instance_id)
    hot = {tiers[0] for tiers, tier in zip(held, wanted) if tier == "gpu" and tiers}
    assert hot == {"gpu"}  # some are, and all that are wanted there
    cache.clock.now_s += LADDER_S
    cache.sweep()
    assert len(cache.claims) == 0 and not any(controller.layout_of().of(controller.instance_id))
