"""ClaimLedger against a naive model, under threads, in little memory, with nothing left behind."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import sys
import threading
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caching_heuristics import TIERS, HeuristicConfig
from kvttl.manager.claims import ClaimLedger, Step

LADDER = {"gpu": 1.0, "disk": 2.0, "remote": 4.0}


# ---- the naive model -------------------------------------------------------------


class NaiveLedger:
    """The same promises, kept by looking at every claim every time."""

    def __init__(self, ladder):
        self.ladder = ladder
        self.claims = {}  # (owner, last chunk) -> (chunks, tier, deadline_s, ttl_s, access_s)
        self.waiting = []  # ((when found, deadline_s), Step), in the order of their keys
        self.found = 0

    def claim(self, owner, chunks, tier, now_s, ttl_s):
        self.advance(now_s)
        if chunks:
            key = (f"{int(owner, 16):016x}", chunks[-1])
            if key not in self.claims or self.claims[key][-1] <= now_s:
                self.claims[key] = (tuple(chunks), tier, now_s + ttl_s, ttl_s, now_s)

    def wanted(self, chunks, now_s):
        self.advance(now_s)
        return [self.hottest(chunk) for chunk in chunks]

    def hottest(self, chunk):
        tiers = {tier for chunks, tier, *_ in self.claims.values() if chunk in chunks}
        return next((tier for tier in TIERS if tier in tiers), None)

    def sweep(self, now_s, limit, answer):
        """Check an answer: the earliest steps, those that ended together in any order."""
        self.advance(now_s)
        size = len(self.waiting)
        assert len(answer) == (size if limit is None else min(limit, size))
        for step in answer:
            self.waiting.remove((self.waiting[0][0], step))

    def advance(self, now_s):
        self.found += 1
        due = [key for key, claim in self.claims.items() if claim[2] <= now_s]
        for key in sorted(due, key=lambda key: self.claims[key][2]):
            deadline_s = self.claims[key][2]
            self.waiting.append(((self.found, deadline_s), self.step(key, now_s)))

    def step(self, key, now_s):
        chunks, before, deadline_s, ttl_s, access_s = self.claims.pop(key)
        for tier in TIERS[TIERS.index(before) + 1 :]:
            deadline_s += ttl_s * self.ladder[tier]
            if deadline_s > now_s:
                self.claims[key] = (chunks, tier, deadline_s, ttl_s, access_s)
                return Step(key[0], chunks, before, tier, ttl_s * self.ladder[tier])
        return Step(key[0], chunks, before, None, None)

    def live(self):
        """Return chunk -> how many claims want it in each tier."""
        count = Counter((c, tier) for chunks, tier, *_ in self.claims.values() for c in chunks)
        return {chunk: [count[chunk, tier] for tier in TIERS] for chunk, _ in count}


def take(ledger, naive, now_s, action, *arguments):
    """One step on both; their answers have to be equal."""
    if action == "claim":
        owner, chunks, tier, ttl_s, late_s = arguments
        ledger.claim(owner, chunks, tier, max(0, now_s - late_s), ttl_s)
        naive.claim(owner, chunks, tier, max(0, now_s - late_s), ttl_s)
    elif action == "wanted":
        assert ledger.wanted(*arguments, now_s) == naive.wanted(*arguments, now_s)
    else:
        naive.sweep(now_s, *arguments, ledger.sweep(now_s, *arguments))


# ---- what is inside --------------------------------------------------------------


def assert_same(ledger, naive):
    """The ledger holds what the model holds, and nothing more."""
    assert {key: chunk.live for key, chunk in ledger._chunks.items()} == naive.live()
    claims = {}
    for key, claim in ledger._claims.items():
        chunks = tuple(chunk.key for chunk in ledger._path(claim))
        times_s = (claim.deadline_s, claim.ttl_s, claim.access_s)
        claims[key] = (chunks, TIERS[claim.tier], *times_s)
    assert claims == naive.claims and len(ledger) == len(claims)
    first_s = min((claim[2] for claim in claims.values()), default=math.inf)
    assert ledger.next_due_s == (-math.inf if naive.waiting else first_s)
    assert len(ledger._steps) == len(naive.waiting)


def assert_empty(ledger):
    assert len(ledger) == 0 and ledger._chunks == {} and ledger.next_due_s == math.inf


# ---- any sequence equals the naive model -----------------------------------------


def digest(name):
    return hashlib.sha256(repr(name).encode()).hexdigest()


SPELLINGS = {
    "digest": digest,
    "path": repr,
    "64 characters": lambda node: repr(node).ljust(64),
    "capitals": lambda node: digest(node).upper() if sum(node) % 2 else digest(node),
    "spaces": lambda node: digest(node)[:62] + "  ",  # bytes.fromhex would take it
    "mixed": lambda node: digest(node) if sum(node) % 2 else repr(node),
}
NODES = [n for depth in range(1, 5) for n in itertools.product(range(2), repeat=depth)]


def chain(node, start):
    """Return the keys' nodes from `start` to a node: prefixes, like the real keys."""
    return [node[: end + 1] for end in range(min(start, len(node) - 1), len(node))]


def mostly(common, *others):
    """Draw from the first strategy five times as often as from each other one."""
    return st.sampled_from([common] * 5 + [*others]).flatmap(lambda chosen: chosen)


# Mostly whole prompts; single inner chunks are what a restart adopts.
chunk_lists = st.builds(chain, st.sampled_from(NODES), st.sampled_from([0, 0, 0, 9, 1]))
chunk_lists = mostly(chunk_lists, st.just([]))
owners = st.sampled_from(["a", "0b", "B", "f" * 16])  # two of them are one
ttls_s = st.one_of(st.integers(0, 9), st.floats(0, 9))
late_s = mostly(st.just(0), st.integers(0, 9))  # the access was so long ago
claims = st.tuples(st.just("claim"), owners, chunk_lists, st.sampled_from(TIERS), ttls_s, late_s)
others = [
    st.tuples(st.just("wanted"), chunk_lists),
    st.tuples(st.just("sweep"), st.sampled_from([None, None, 0, 1, 2])),
]
actions = mostly(claims, *others)
jumps_s = st.one_of(st.integers(0, 3), st.floats(0, 40))  # 40: several rungs at once
passed_s = mostly(st.just(0), jumps_s)  # mostly none, so that claims add up
factors = st.one_of(st.sampled_from([0, 0.5, 1, 2]), st.floats(0, 5))
ladders = st.fixed_dictionaries({tier: factors for tier in TIERS})


def spelled(action, spelling):
    """Return a step with keys in place of nodes."""
    spell = SPELLINGS[spelling]
    return [[spell(node) for node in a] if isinstance(a, list) else a for a in action]


@settings(max_examples=300)
@given(
    ladders, st.sampled_from(sorted(SPELLINGS)), st.lists(st.tuples(passed_s, actions), min_size=20)
)
def test_any_sequence_equals_the_naive_model(ladder, spelling, sequence):
    ledger, naive, now_s = ClaimLedger(ladder), NaiveLedger(ladder), 0
    everything = [SPELLINGS[spelling](node) for node in NODES]
    for later_s, action in sequence:
        now_s += later_s
        take(ledger, naive, now_s, *spelled(action, spelling))
        assert_same(ledger, naive)
        take(ledger, naive, now_s, "wanted", everything)
        assert_same(ledger, naive)
    take(ledger, naive, now_s + 1e6, "sweep", None)
    assert_empty(ledger)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_long_trace_equals_the_naive_model(seed):
    rng = random.Random(seed)
    ladder = {tier: rng.uniform(0.2, 2) for tier in TIERS}
    ledger, naive, now_s = ClaimLedger(ladder), NaiveLedger(ladder), 0.0
    for number in range(4_000):
        now_s += rng.expovariate(20)
        node = tuple(rng.randrange(6) for _ in range(rng.randint(1, 6)))
        chunks = [digest(n) for n in chain(node, rng.choice([0, 0, 0, 9]))]
        owner = f"{rng.randrange(500):x}"
        if number % 20:
            late_s = rng.choice([0, 0, 0, rng.uniform(0, 30)])
            wish = (chunks, rng.choice(TIERS), rng.uniform(0, 90), late_s)
            take(ledger, naive, now_s, "claim", owner, *wish)
        else:
            take(ledger, naive, now_s, "wanted", chunks)
            take(ledger, naive, now_s, "sweep", rng.choice([None, 3]))
        if number % 500 == 0:
            assert_same(ledger, naive)
    assert len(ledger) > 1_000
    take(ledger, naive, now_s + 1e6, "sweep", None)
    assert_empty(ledger)


# ---- renewal and the ladder ------------------------------------------------------


def test_a_renewal_replaces_and_extends():
    ledger = ClaimLedger(LADDER)
    ledger.claim("A", ["x", "y"], "gpu", 0, 10)
    ledger.claim("A", ["x", "y"], "remote", 5, 50)
    assert len(ledger) == 1 and ledger.next_due_s <= 55
    assert ledger.wanted(["x", "y"], 54) == ["remote", "remote"] and ledger.sweep(54) == []
    ledger.claim("0a", ["x", "y"], "gpu", 54, 10)  # the same digest
    assert ledger.wanted(["x", "y"], 63) == ["gpu", "gpu"] and ledger.sweep(63) == []
    assert ledger.sweep(64) == [Step("0" * 15 + "a", ("x", "y"), "gpu", "disk", 20.0)]


def test_a_renewal_after_the_ladder_began_goes_back_up():
    ledger = ClaimLedger(LADDER)
    ledger.claim("a", ["x"], "gpu", 0, 10)
    assert [step.tier for step in ledger.sweep(10)] == ["disk"]
    ledger.claim("a", ["x"], "gpu", 11, 10)
    assert ledger.wanted(["x"], 20) == ["gpu"] and ledger.sweep(20) == [] and len(ledger) == 1


def test_a_wish_of_an_earlier_access_never_replaces_one_of_a_later():
    ledger = ClaimLedger(LADDER)
    ledger.claim("a", ["x"], "remote", 10, 50)
    ledger.claim("a", ["x"], "gpu", 9, 1000)  # was shed, or is from a log
    assert ledger.wanted(["x"], 10) == ["remote"] and ledger.next_due_s == 60
    ledger.claim("b", ["x"], "disk", 9, 1000)  # another prompt's is its own
    assert ledger.wanted(["x"], 10) == ["disk"]
    ledger.claim("a", ["x"], "gpu", 10, 1000)
    assert ledger.wanted(["x"], 10) == ["gpu"]


def test_a_wish_of_an_earlier_access_stays_out_after_the_ladder_began():
    ledger = ClaimLedger(LADDER)
    ledger.claim("a", ["x"], "gpu", 10, 10)
    assert [step.tier for step in ledger.sweep(20)] == ["disk"]
    ledger.claim("a", ["x"], "gpu", 9, 1000)
    assert ledger.wanted(["x"], 20) == ["disk"]


@pytest.mark.parametrize("ladder", [LADDER, HeuristicConfig().ladder, dict(LADDER, disk=0.37)])
def test_each_rung_lasts_its_factor_times_the_ttl(ladder):
    ledger, ttl_s, end_s = ClaimLedger(ladder), 123.4, 1_000.0
    ledger.claim("a", ["x"], "gpu", end_s, ttl_s)
    end_s += ttl_s  # the first one is the decision itself: no factor
    for tier, lower in itertools.pairwise([*TIERS, None]):
        assert ledger.next_due_s == end_s
        assert ledger.sweep(math.nextafter(end_s, 0)) == []
        lasts_s = ttl_s * ladder[lower] if lower else None
        assert ledger.sweep(end_s) == [Step("0" * 15 + "a", ("x",), tier, lower, lasts_s)]
        end_s += lasts_s or 0
    assert_empty(ledger)


@pytest.mark.parametrize(
    ("now_s", "tier"), [(10, "disk"), (29, "disk"), (30, "remote"), (69, "remote"), (70, None)]
)
def test_a_late_sweep_takes_all_missed_rungs_at_once(now_s, tier):
    ledger = ClaimLedger(LADDER)
    ledger.claim("a", ["x"], "gpu", 0, 10)
    (step,) = ledger.sweep(now_s)
    assert (step.from_tier, step.tier) == ("gpu", tier)
    assert ledger.wanted(["x"], now_s) == [tier] and ledger.sweep(now_s) == []
    assert ledger.next_due_s == {"disk": 30, "remote": 70, None: math.inf}[tier]


def test_the_default_ladder_is_the_default_configuration():
    assert ClaimLedger()._factors == list(HeuristicConfig().ladder.values())


def test_a_claim_leaves_its_tier_at_the_deadline_exactly():
    ledger = ClaimLedger(LADDER)
    ledger.claim("a", ["x"], "remote", 0.1, 0.2)
    deadline_s = 0.1 + 0.2
    assert ledger.wanted(["x"], math.nextafter(deadline_s, 0)) == ["remote"]
    assert ledger.wanted(["x"], deadline_s) == [None]
    assert [step.tier for step in ledger.sweep(0)] == [None]  # found by wanted, handed out once
    assert_empty(ledger)


def test_a_shared_chunk_is_as_hot_as_its_hottest_claim():
    ledger = ClaimLedger(LADDER)
    for owner, tier in (("a", "gpu"), ("b", "disk"), ("c", "remote")):
        ledger.claim(owner, ["shared", owner], tier, 0, 100)
    seen = []
    for owner in "abc":
        seen += ledger.wanted(["shared"], 0)
        ledger.claim(owner, ["shared", owner], "remote", 0, 100)
    assert [*seen, *ledger.wanted(["shared"], 100)] == ["gpu", "disk", "remote", None]
    assert len(ledger.sweep(100)) == 3
    assert_empty(ledger)


def test_a_limited_sweep_hands_out_the_earliest_first():
    ledger = ClaimLedger(LADDER)
    for number in random.Random(0).sample(range(10), 10):
        ledger.claim(f"{number}", [f"chunk {number}"], "remote", 0, number)
    handed = [[int(s.owner, 16) for s in ledger.sweep(9, limit)] for limit in (0, 3, 3, None, 3)]
    assert handed == [[], [0, 1, 2], [3, 4, 5], [6, 7, 8, 9], []]


def test_next_due_s_is_the_first_deadline():
    ledger = ClaimLedger(LADDER)
    assert ledger.next_due_s == math.inf
    ledger.claim("a", ["x"], "remote", 0, 20)
    ledger.claim("b", ["y"], "disk", 0, 10)
    assert ledger.next_due_s == 10
    ledger.wanted(["x"], 10)
    assert ledger.next_due_s == -math.inf  # a step waits for sweep
    assert len(ledger.sweep(10)) == 1 and ledger.next_due_s == 20
    ledger.claim("a", ["x"], "remote", 10, 90)  # renewed: nothing ends at 20 any more
    assert ledger.next_due_s == 50


# ---- adopted chunks, empty claims, bad arguments ---------------------------------


@pytest.mark.parametrize("adopted", [["c2"], ["c2", "c3"], ["c1"], ["c3"]])
@pytest.mark.parametrize("adopted_first", [True, False])
def test_an_adopted_inner_chunk_leaves_other_claims_whole(adopted, adopted_first):
    ledger, prompt = ClaimLedger(LADDER), ["c1", "c2", "c3"]
    claims = [("a", prompt, "disk"), ("b", adopted, "gpu")]
    for owner, chunks, tier in reversed(claims) if adopted_first else claims:
        ledger.claim(owner, chunks, tier, 0, 10)
    expected = ["gpu" if chunk in adopted else "disk" for chunk in prompt]
    assert ledger.wanted(prompt, 0) == expected
    ledger.claim("b", adopted, "remote", 0, 5)
    assert ledger.wanted(prompt, 0) == ["disk"] * 3
    steps = [(step.chunks, step.tier) for step in ledger.sweep(10)]
    assert steps == [(tuple(adopted), None), (tuple(prompt), "remote")]
    assert ledger.wanted(prompt, 10) == ["remote"] * 3 and len(ledger.sweep(50)) == 1
    assert_empty(ledger)


def test_no_chunks_is_no_claim():
    ledger = ClaimLedger()
    ledger.claim("a", [], "gpu", 0, 10)
    assert ledger.wanted([], 0) == []
    assert_empty(ledger)


@pytest.fixture
def held():
    ledger = ClaimLedger(LADDER)
    ledger.claim("a", ["x"], "disk", 0, 10)
    yield ledger
    assert ledger.wanted(["x", "y"], 9) == ["disk", None]  # nothing has changed
    assert len(ledger.sweep(1e9)) == 1
    assert_empty(ledger)


@pytest.mark.parametrize("tier", ["GPU", "l1", "", None, 0])
def test_an_unknown_tier_is_named_and_changes_nothing(held, tier):
    with pytest.raises(ValueError, match="tier must be one of gpu, disk, remote, got") as error:
        held.claim("a", ["x", "y"], tier, 5, 20)
    assert str(error.value).endswith(repr(tier))


@pytest.mark.parametrize(
    "owner", ["", "g", "0x1f", "1_0", " 1", "1\n", "+1", "-1", "1" * 17, "١", b"0a", None, 7]
)
def test_an_owner_that_is_no_digest_is_named_and_changes_nothing(held, owner):
    with pytest.raises(ValueError, match="owner must be a digest of at most 16 hex") as error:
        held.claim(owner, ["x", "y"], "gpu", 5, 20)
    assert str(error.value).endswith(repr(owner))


@pytest.mark.parametrize(("chunks", "ttl_s"), [(["y", None], 20), (["y"], None)])
def test_a_claim_of_wrong_types_changes_nothing(held, chunks, ttl_s):
    with pytest.raises(TypeError):
        held.claim("a", chunks, "gpu", 5, ttl_s)


# ---- nothing is left behind; threads ---------------------------------------------


def test_only_what_is_claimed_is_kept():
    ledger = ClaimLedger({"gpu": 1, "disk": 0, "remote": 0})
    for number in range(5_000):
        ledger.claim("a", ["shared", f"chunk {number}"], "gpu", number, 7)
        ledger.sweep(number)
    assert len(ledger) == 7 and len(ledger._chunks) == 8
    ledger.sweep(1e9)
    assert_empty(ledger)


def test_deadlines_of_renewed_claims_do_not_pile_up():
    ledger, most = ClaimLedger(), 0
    for number in range(20_000):
        ledger.claim(f"{number % 10}", [f"chunk {number % 10}"], "gpu", number, 1e6)
        most = max(most, len(ledger._deadlines))
    assert most == len(ledger)
    assert len(ledger.sweep(1e12)) == 10


def test_many_prompts_may_end_in_the_same_chunk():
    ledger = ClaimLedger()
    for number in range(20_000):  # different questions, each shorter than a chunk
        ledger.claim(digest(number)[:16], ["system"], "gpu", 0, 10)
    assert len(ledger) == 20_000 and ledger._chunks["system"].live == [20_000, 0, 0]
    assert len(ledger.sweep(1e9)) == 20_000
    assert_empty(ledger)


@pytest.fixture
def restless_threads():
    """Run a function in 16 threads that take turns every few bytecodes."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield run_in_threads
    sys.setswitchinterval(before_s)


def run_in_threads(work, threads=16):
    errors, start = [], threading.Barrier(threads)

    def guarded(number):
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=guarded, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []


def test_sixteen_threads_at_once(restless_threads):
    ledger = ClaimLedger()

    def work(thread):
        owner = f"{thread:x}"
        for number in range(200):
            mine, tier = ["shared", f"{thread} {number % 5}"], TIERS[number % 3]
            ledger.claim(owner, mine, tier, 0, 1e6)
            # Others cannot take away this thread's claim, nor see a half of it.
            hottest, own = ledger.wanted(mine, 0)
            assert own == tier and TIERS.index(hottest) <= TIERS.index(tier)
            assert ledger.sweep(0) == []
            ledger.claim("ff", ["shared", "common"], "remote", 0, 1e6)

    restless_threads(work)
    assert len(ledger) == 16 * 5 + 1
    assert len(ledger.sweep(1e9)) == 16 * 5 + 1
    assert_empty(ledger)


def test_each_claim_steps_once_however_many_threads_ask(restless_threads):
    ledger, steps = ClaimLedger(LADDER), []
    for number in range(1_000):
        ledger.claim(f"{number:x}", ["shared", f"chunk {number}"], "gpu", 0, 1 + number)

    def work(thread):
        for now_s in range(0, 8_000, 40):
            ledger.wanted([f"chunk {now_s}"], now_s)
            steps.extend(ledger.sweep(now_s, 1 + thread))
        steps.extend(ledger.sweep(8_000))

    restless_threads(work)
    taken = {}
    for step in steps:
        tiers = taken.setdefault(int(step.owner, 16), {})
        assert tiers.setdefault(step.from_tier, step.tier) is step.tier
    assert sorted(taken) == list(range(1_000))
    assert sum(map(len, taken.values())) == len(steps)  # none was handed out twice
    for tiers in taken.values():  # from one rung to the next, down to the end
        tier = "gpu"
        while tier is not None:
            tier = tiers.pop(tier)
        assert tiers == {}
    assert_empty(ledger)


# ---- 100,000 claims --------------------------------------------------------------

PREFIX = [digest(number) for number in range(11)]


def claim_many(ledger, numbers, now_s=0):
    """Claims with a chunk of their own after a shared prefix; owners spread like digests."""
    for number in numbers:
        owner = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"
        chunks = [*PREFIX, f"{number:064x}"]
        ledger.claim(owner, chunks, TIERS[number % 3], now_s, 1e6 + number)
        yield number + 1


def test_a_claim_takes_at_most_1_kb():
    """Also just after a table has grown, and when all have been renewed."""
    worst = {}  # claims -> bytes each
    tracemalloc.start()
    try:
        before_bytes = tracemalloc.get_traced_memory()[0]
        ledger = ClaimLedger()
        for claims in claim_many(ledger, range(100_000)):
            each = (tracemalloc.get_traced_memory()[0] - before_bytes) / claims
            if claims >= 40_000 and each > max(worst.values(), default=0):
                worst[claims] = each
        assert max(claim_many(ledger, range(100_000), now_s=1.5)) == len(ledger)
        worst["renewed"] = (tracemalloc.get_traced_memory()[0] - before_bytes) / len(ledger)
    finally:
        tracemalloc.stop()
    print({claims: round(each, 1) for claims, each in worst.items()})
    assert max(worst.values()) <= 1000


@pytest.mark.parametrize("ttl_s", [float("nan"), float("inf"), -1.0])
def test_a_time_that_never_comes_is_refused(ttl_s):
    ledger = ClaimLedger()
    with pytest.raises(ValueError, match="now_s . ttl_s must be >= 0 and finite"):
        ledger.claim("0a", ["x"], "gpu", 0.0, ttl_s)
    assert len(ledger) == 0 and ledger.wanted(["x"], 0.0) == [None]
