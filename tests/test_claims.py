"""ClaimLedger against a naive model, under threads, and with nothing left behind."""

from __future__ import annotations

import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caching_heuristics import TIERS
from ttl_expiry import Claim, ClaimLedger

CHUNKS = ["system", "a", "b", "c", "d"]
chunk_lists = st.lists(st.sampled_from(CHUNKS), max_size=6)  # empty and repeated ones too
owners = st.sampled_from("ABCD")
steps = st.lists(
    st.tuples(
        st.integers(0, 3),  # seconds that pass before the step
        st.one_of(
            st.tuples(
                st.just("claim"), owners, chunk_lists, st.sampled_from(TIERS), st.integers(0, 6)
            ),
            st.tuples(st.just("release"), owners),
            st.tuples(st.just("wanted"), chunk_lists),
            st.tuples(st.just("expire")),
        ),
    ),
    max_size=40,
)


class NaiveLedger:
    """The same promises, kept by looking at every claim every time."""

    def __init__(self):
        self.claims = {}

    def claim(self, owner, chunks, tier, deadline_s):
        self.claims[owner] = (tuple(chunks), tier, deadline_s)

    def release(self, owner):
        return self.claims.pop(owner, None) is not None

    def wanted(self, chunks, now_s):
        return [self.hottest(chunk, now_s) for chunk in chunks]

    def hottest(self, chunk, now_s):
        live = {
            tier
            for chunks, tier, end_s in self.claims.values()
            if chunk in chunks and end_s > now_s
        }
        return next((tier for tier in TIERS if tier in live), None)

    def expire(self, now_s):
        ended = {o: claim for o, claim in self.claims.items() if claim[2] <= now_s}
        self.claims = {o: claim for o, claim in self.claims.items() if o not in ended}
        return ended


def take(ledger, now_s, action, *arguments):
    """One step on a ledger of either kind; returns what it answered, comparably."""
    if action == "claim":
        owner, chunks, tier, lasts_s = arguments
        return ledger.claim(owner, chunks, tier, now_s + lasts_s)
    if action == "release":
        return ledger.release(*arguments)
    if action == "wanted":
        return ledger.wanted(*arguments, now_s)
    ended = ledger.expire(now_s)
    return {
        owner: (c.chunks, c.tier, c.deadline_s) if isinstance(c, Claim) else c
        for owner, c in ended.items()
    }


def assert_tidy(ledger):
    """Each index entry belongs to a claim, and the other way round."""
    expected = {}
    for owner, claim in ledger._claims.items():
        for chunk in claim.chunks:
            expected.setdefault(chunk, set()).add(owner)
    assert ledger._owners == expected


def assert_empty(ledger):
    assert len(ledger) == 0
    assert ledger._claims == {} and ledger._owners == {}


@given(steps)
def test_ledger_equals_the_naive_model(sequence):
    ledger, naive, now_s = ClaimLedger(), NaiveLedger(), 0
    for passed_s, step in sequence:
        now_s += passed_s
        assert take(ledger, now_s, *step) == take(naive, now_s, *step)
        assert ledger.wanted(CHUNKS, now_s) == naive.wanted(CHUNKS, now_s)
        assert len(ledger) == len(naive.claims)
        assert_tidy(ledger)
    ledger.expire(now_s + 7)
    assert_empty(ledger)


def test_a_new_claim_replaces_the_owners_old_one():
    ledger = ClaimLedger()
    ledger.claim("A", ["x", "y"], "gpu", 100)
    ledger.claim("A", ["y", "z"], "remote", 50)
    assert ledger.wanted(["x", "y", "z"], 0) == [None, "remote", "remote"]
    assert ledger.expire(50) == {"A": Claim(("y", "z"), "remote", 50.0)}
    assert_empty(ledger)


def test_a_claim_ends_at_its_deadline_exactly():
    ledger = ClaimLedger()
    ledger.claim("A", ["x"], "gpu", 10)
    assert ledger.wanted(["x"], 9.999) == ["gpu"] and ledger.expire(9.999) == {}
    assert ledger.wanted(["x"], 10) == [None] and set(ledger.expire(10)) == {"A"}


def test_an_ended_claim_reveals_the_next_hottest():
    ledger = ClaimLedger()
    for owner, tier, deadline_s in (("A", "gpu", 10), ("B", "disk", 20), ("C", "remote", 30)):
        ledger.claim(owner, ["shared"], tier, deadline_s)
    seen = [ledger.wanted(["shared"], now_s)[0] for now_s in (0, 10, 20, 30)]
    assert seen == ["gpu", "disk", "remote", None]
    ledger.release("A")
    assert ledger.wanted(["shared"], 0) == ["disk"]


def test_a_claim_on_no_chunks_counts_and_ends():
    ledger = ClaimLedger()
    ledger.claim("A", [], "gpu", 5)
    ledger.claim("B", iter(()), "gpu", 5)
    assert len(ledger) == 2 and ledger.wanted([], 0) == []
    assert ledger.release("A") is True
    assert ledger.expire(5) == {"B": Claim((), "gpu", 5.0)}
    assert_empty(ledger)


@pytest.mark.parametrize("tier", ["GPU", "l1", "", None, 0])
def test_an_unknown_tier_is_named_and_changes_nothing(tier):
    ledger = ClaimLedger()
    ledger.claim("A", ["x"], "disk", 10)
    with pytest.raises(ValueError, match="tier must be one of gpu, disk, remote, got") as error:
        ledger.claim("A", ["y"], tier, 20)
    assert str(error.value).endswith(repr(tier))
    assert ledger.wanted(["x", "y"], 0) == ["disk", None]


def test_releasing_a_stranger_is_false():
    ledger = ClaimLedger()
    assert ledger.release("nobody") is False
    ledger.claim("A", ["x"], "gpu", 1)
    assert ledger.release("A") is True and ledger.release("A") is False


def test_nothing_is_left_after_many_claims():
    ledger = ClaimLedger()
    for number in range(5_000):
        ledger.claim(f"owner {number % 7}", [f"chunk {number}", "shared"], "gpu", number)
    assert len(ledger) == 7 and len(ledger._owners) == 8  # only what is claimed now
    for number in range(7):
        assert ledger.release(f"owner {number}")
    assert_empty(ledger)


@pytest.fixture
def restless_threads():
    """Threads take turns every few bytecodes, so that a missing lock shows."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before_s)


def test_sixteen_threads_at_once(restless_threads):
    ledger, threads, errors = ClaimLedger(), 16, []
    start = threading.Barrier(threads)

    def work(name):
        try:
            start.wait()
            for number in range(300):
                mine = f"{name} {number}"
                ledger.claim(name, ["shared", mine], TIERS[number % 3], deadline_s=1e9)
                # Others cannot take away this thread's claim, nor see a half of it.
                assert ledger.wanted([mine], 0) == [TIERS[number % 3]]
                assert ledger.wanted(["shared"], 0)[0] is not None
                assert ledger.expire(0) == {}
                assert ledger.release("common") in (True, False)
                ledger.claim("common", [mine, "shared"], "remote", deadline_s=1e9)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []
    assert len(ledger) == threads + 1
    assert_tidy(ledger)
    assert len(ledger.expire(1e9)) == threads + 1
    assert_empty(ledger)


def test_each_claim_expires_once_however_many_threads_ask(restless_threads):
    ledger, ended = ClaimLedger(), []
    for number in range(2_000):
        ledger.claim(f"owner {number}", ["shared", f"chunk {number}"], "gpu", number)
    start = threading.Barrier(16)

    def work():
        start.wait()
        for now_s in range(0, 2_001, 40):
            ended.extend(ledger.expire(now_s))

    workers = [threading.Thread(target=work) for _ in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(ended) == sorted(f"owner {number}" for number in range(2_000))
    assert_empty(ledger)
