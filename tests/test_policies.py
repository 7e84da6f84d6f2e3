"""Policies that decide as they go: one contract, one object for replays and live callers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import replay_reference as reference

import kvttl.policies
from caching_heuristics import HeuristicConfig
from kvttl.policies import FAMILIES, OnlinePolicy, check_policy
from kvttl.policies.adaptive import Adaptive
from kvttl.policies.checks import CHECKS
from kvttl.policies.hazard import EDGES_S, WEIGHTS, index_at, index_row, new_hazard, seconds_above
from kvttl.policies.online import MAX_TTL_S
from kvttl.policies.runs import LEVELS, N_KEYS, N_RUNS
from kvttl.policies.state import INDEX_SHADOW, REAL
from kvttl.policies.template import Template
from kvttl.replay.engine import Sweep, replay
from kvttl.traces.builder import TraceBuilder, make_trace
from kvttl.traces.generator import agent_loops

LOOPS = agent_loops(400, seed=3)


def discovered():
    """Every class of `kvttl.policies` that is a policy, by name."""
    found = {}
    for module in pkgutil.iter_modules(kvttl.policies.__path__, "kvttl.policies."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and issubclass(value, OnlinePolicy):
                found[name] = value
    return found


def test_all_policies_are_known():
    names = {"OnlinePolicy", "Adaptive", "Formula", "Recency", "Fixed", "Template"}
    assert set(discovered()) == names
    assert set(FAMILIES.values()) == {
        discovered()[name] for name in names - {"OnlinePolicy", "Template"}
    }


@pytest.mark.parametrize("name", sorted(discovered()))
def test_every_policy_keeps_the_contract(name):
    assert check_policy(discovered()[name](capacity=200, chunk_tokens=64)) == list(CHECKS)


# --- what the contract finds ---------------------------------------------------------------


class _Unequal(OnlinePolicy):
    """Two copies differ: it draws without a seed."""

    def ask(self, keys, now_s, prices=None):
        return super().ask(keys, now_s)._replace(ttl_s=np.full(len(keys), np.random.rand()))


class _Rising(OnlinePolicy):
    def ask(self, keys, now_s, prices=None):
        return super().ask(keys, now_s)._replace(ttl_s=np.arange(float(len(keys))))


class _Endless(OnlinePolicy):
    def ask(self, keys, now_s, prices=None):
        return super().ask(keys, now_s)._replace(ttl_s=np.full(len(keys), np.inf))


class _Orphans(OnlinePolicy):
    """Lets a prompt's start go first."""

    def begin(self, keys, now_s, prompt_tokens=None, hints=None):
        self.seen = dict.fromkeys([*getattr(self, "seen", {}), *np.asarray(keys).tolist()])
        return super().begin(keys, now_s, prompt_tokens, hints)

    def make_room(self, chunks, now_s):
        gone = list(self.seen)[:chunks]
        self.seen = dict.fromkeys(list(self.seen)[chunks:])
        return np.array(gone)


class _Epoch(OnlinePolicy):
    def ask(self, keys, now_s, prices=None):
        return super().ask(keys, now_s)._replace(ttl_s=np.full(len(keys), now_s % 97.0))


class _Overwritten(OnlinePolicy):
    """What it answered changes with what comes later: all answers are one array."""

    def ask(self, keys, now_s, prices=None):
        self.answers = getattr(self, "answers", np.zeros(10_000))
        self.answers[:] = now_s
        return super().ask(keys, now_s)._replace(ttl_s=self.answers[: len(keys)])


class _Measuring(OnlinePolicy):
    """What a chunk is worth depends on how many are asked for at once."""

    def ask(self, keys, now_s, prices=None):
        return super().ask(keys, now_s)._replace(value=np.full(len(keys), 1.0 / len(keys)))


class _Curious(OnlinePolicy):
    """What it answers depends on how often it was asked."""

    asked = 0

    def ask(self, keys, now_s, prices=None):
        self.asked += 1
        return super().ask(keys, now_s)._replace(value=np.full(len(keys), float(self.asked)))


class _Forgetful(OnlinePolicy):
    def load(self, state):
        """Loads nothing."""


class _Nervous(OnlinePolicy):
    def decide(self, path, known, now_s, hints):
        float(hints.get("perplexity", 1.0))


class _Sundial(OnlinePolicy):
    last_s = 0.0

    def begin(self, keys, now_s, prompt_tokens=None, hints=None):
        if not now_s >= self.last_s:
            raise ValueError("time went back")
        self.last_s = now_s
        return super().begin(keys, now_s, prompt_tokens, hints)


class _Hoarder(OnlinePolicy):
    kept = ()

    def begin(self, keys, now_s, prompt_tokens=None, hints=None):
        self.kept = *self.kept, np.array(keys)
        return super().begin(keys, now_s, prompt_tokens, hints)

    def state(self):
        return super().state() | {"kept": np.concatenate(self.kept)}


class _Keeper(OnlinePolicy):
    def make_room(self, chunks, now_s):
        return np.empty(0, np.int64)


class _Timid(OnlinePolicy):
    def make_room(self, chunks, now_s):
        return super().make_room(min(chunks, 10_000), now_s)


BROKEN = [
    ("answers", _Rising),
    ("answers", _Endless),
    ("deterministic", _Unequal),
    ("no_clock_of_its_own", _Epoch),
    ("blind_to_the_future", _Overwritten),
    ("scalar_equals_array", _Measuring),
    ("asking_changes_nothing", _Curious),
    ("prefix_closed", _Orphans),
    ("saved_and_loaded", _Forgetful),
    ("bad_hints", _Nervous),
    ("clock_jumps", _Sundial),
    ("one_hit_chunks", _Hoarder),
    ("separate_chunks", _Keeper),
    ("prompt_above_capacity", _Timid),
]


def test_every_check_has_a_policy_that_it_refuses():
    assert {check for check, _ in BROKEN} == set(CHECKS)


@pytest.mark.parametrize(("check", "broken"), BROKEN)
def test_the_contract_names_what_is_broken(check, broken):
    with pytest.raises(AssertionError, match=f"^{check}: "):
        check_policy(broken(capacity=200, chunk_tokens=64), skip=set(CHECKS) - {check})


@pytest.mark.parametrize("given", [-1, 2.5, "9", True, (), (1, 2, 3, 4), (1, -1)])
def test_a_capacity_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="capacity must be chunks >= 0"):
        Adaptive(capacity=given)


# --- equal to what is known -----------------------------------------------------------------


SAME = [("recency", FAMILIES["recency"]), ("heuristic", "formula"), ("ttl", "fixed")]
FIGURES = ("hit_blocks", "hit_tokens", "block_seconds", "moved_tokens")


@pytest.mark.parametrize("capacity", [0, 7, 0.05, 0.3, None])
@pytest.mark.parametrize(("planned", "online"), SAME)
def test_a_policy_that_decides_as_it_goes_equals_the_plan(planned, online, capacity):
    config = HeuristicConfig(base_ttl=120.0, min_ttl=10.0)
    plan, live = (replay(LOOPS, policy, capacity, config) for policy in (planned, online))
    assert (plan.hit_blocks == live.hit_blocks).all()
    assert (plan.hit_tokens == live.hit_tokens).all()
    if capacity is None or online is FAMILIES["recency"]:
        assert np.allclose(plan.block_seconds, live.block_seconds)
        assert (plan.moved_tokens == live.moved_tokens).all()


def test_three_tiers_of_recency_equal_the_plan():
    plan, live = (replay(LOOPS, p, (0.05, 0.1, 0.3)) for p in ("recency", FAMILIES["recency"]))
    for name in FIGURES:
        assert np.allclose(getattr(plan, name), getattr(live, name)), name


@pytest.mark.parametrize("family", ["recency", "adaptive"])
def test_what_a_live_caller_gets_is_what_the_replay_says(family):
    capacity = 150
    trace = LOOPS.without_tails()
    live = reference.live_hits(trace, FAMILIES[family](capacity, trace.block_tokens), capacity)
    assert replay(trace, FAMILIES[family], capacity).hit_blocks[:, 0].tolist() == live


def test_a_prompt_of_many_branches_is_cut_where_they_part():
    policy = OnlinePolicy(chunk_tokens=16)
    prompts = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [9], [1, 2, 3, 4, 7, 8]]
    for second, prompt in enumerate(prompts):
        policy.begin(prompt, float(second))
    runs = policy.runs.run[: policy.runs.size[N_RUNS]]
    found = {
        tuple(policy.runs.keys[r["start"] : r["start"] + r["length"]].tolist()): int(r["count"])
        for r in runs
    }
    assert found == {(1, 2): 4, (3,): 3, (4,): 2, (5,): 1, (6,): 1, (9,): 1, (7, 8): 1}
    assert policy.hits[REAL] == 4


def test_an_index_is_the_best_ratio_over_all_times_to_stop():
    rng = np.random.default_rng(1)
    for _ in range(20):
        weight, row = rng.normal(0, 1.5, WEIGHTS), np.empty(len(EDGES_S), np.float32)
        codes = rng.integers(0, 3, 10).astype(np.uint8)
        index_row(weight, codes, row)
        assert np.allclose(row, naive_row(weight, codes), rtol=1e-5)


def naive_row(weight, codes):
    from kvttl.policies.hazard import GROUP, TERMS, places

    at = np.empty(TERMS, np.int64)
    places(codes, at)
    odds = np.array([weight[j] + sum(weight[at + GROUP[j]]) for j in range(len(EDGES_S))])
    widths_s = np.append(np.diff(EDGES_S), 2000.0)
    hazard = np.maximum(np.log1p(np.exp(odds)) / widths_s, 1e-9)
    hazard[-1] = hazard[-2] / 2
    best = []
    for start in range(len(EDGES_S)):
        left, hits, held, ratios = 1.0, 0.0, 0.0, []
        for j in range(start, len(EDGES_S)):
            after = left * np.exp(-hazard[j] * widths_s[j])
            hits, held, left = hits + left - after, held + (left - after) / hazard[j], after
            ratios.append(hits / held)
        best.append(max(ratios))
    return best


def test_the_time_until_a_price_is_where_the_index_meets_it():
    rng = np.random.default_rng(2)
    for _ in range(50):
        row = rng.uniform(0.001, 1.0, len(EDGES_S)).astype(np.float32)
        age_s, price = float(rng.uniform(0, 5000)), float(rng.uniform(0.001, 1.0))
        left_s = seconds_above(row, age_s, price)
        ages_s = age_s + np.linspace(0, 1, 200) * left_s * 0.999
        if left_s == 0:
            assert index_at(row, age_s) <= price
        else:
            assert min(index_at(row, age) for age in ages_s) >= price * (1 - 1e-4)
            assert index_at(row, age_s + left_s) == pytest.approx(price, rel=1e-3)


def test_at_the_start_the_order_is_that_of_recency():
    hazard, row = new_hazard(), np.empty(len(EDGES_S), np.float32)
    for mean in hazard.mean:
        index_row(mean, np.zeros(10, np.uint8), row)
        assert (np.diff(row) < 0).all()


# --- what it learns -------------------------------------------------------------------------


def tools_and_ends(requests=1500, seed=5):
    """Requests after which a tool call comes back within 5 s, or nobody ever does."""
    rng, builder = np.random.default_rng(seed), TraceBuilder(64)
    now_s, key = 0.0, 0
    pending = []  # (second, prompt)
    for _ in range(requests):
        now_s += float(rng.exponential(0.4))
        pending.sort(key=lambda entry: entry[0])
        if pending and pending[0][0] <= now_s:
            prompt = pending.pop(0)[1]
        else:
            prompt = []
        prompt = [*prompt, *range(key, key + 6)]
        key += 6
        called = rng.random() < 0.5
        builder.add(prompt, now_s, 64 * len(prompt), 40, -1, 0.2, 1 if called else 2)
        if called:
            pending.append((now_s + 2.0 + float(rng.exponential(3.0)), prompt))
    return builder.finish("tools and ends")


@pytest.fixture(scope="module")
def tools():
    return tools_and_ends()


@pytest.mark.parametrize("ends", ["told", "due"])
def test_the_learned_order_beats_recency_where_there_is_something_to_learn(tools, ends):
    half_s = tools.span_s / 2
    capacity = 120
    figures = [replay(tools, name, capacity).since(half_s) for name in ("recency", "optimal")]
    low, high = (figure["token_hit_ratio"] for figure in figures)
    learned = replay(tools, "adaptive", capacity, ends=ends).since(half_s)["token_hit_ratio"]
    assert low + 0.3 * (high - low) < learned < high


class _Asked(Adaptive):
    """Replayed event by event, since it decides; and as Adaptive does."""

    def decide(self, path, known, now_s, hints):
        """Decides nothing."""


@pytest.mark.parametrize("ends", ["told", "due"])
def test_a_replay_event_by_event_hits_about_what_the_compiled_one_does(tools, ends):
    """About: compiled, the clock stands still between arrivals, so steps come a little later."""
    asked, compiled = (replay(tools, p, 120, ends=ends) for p in (_Asked, Adaptive))
    assert abs(asked.token_hit_ratio - compiled.token_hit_ratio) < 0.01


def test_on_a_trace_of_minutes_it_loses_little():
    for capacity in (0.05, 0.1, 0.3):
        ratios = [replay(LOOPS, name, capacity).token_hit_ratio for name in ("recency", "adaptive")]
        assert ratios[1] > ratios[0] - 0.005


def test_while_a_generation_runs_its_chunks_are_worth_what_such_uses_were(tools):
    policy = Adaptive(capacity=120, chunk_tokens=64)
    now_s = told(policy, tools) + 1.0
    keys = np.arange(10**6, 10**6 + 6)
    number = policy.begin(keys, now_s)
    running = policy.ask(keys, now_s + 0.2)
    policy.end(number, now_s + 0.2, "tool_calls", 40)
    called = policy.ask(keys, now_s + 0.2)
    assert 0 < running.value[0] < called.value[0]  # half of them come back


def test_what_an_end_told_late_is_learned_in_order_of_time():
    policy = Adaptive(capacity=100, chunk_tokens=64)
    for number, end_s in enumerate((50.0, 10.0, 30.0)):
        policy.end(policy.begin([number], float(number)), end_s, "stop", 9)
    ends = policy.runs.log["since_s"][:3, 0]
    assert (np.diff(ends) >= 0).all()


def test_lmcaches_way_of_making_room_costs_hits(tools):
    at_once, sweeps = (replay(tools, "adaptive", 200, sweep=sweep) for sweep in (None, Sweep()))
    assert 0 < sweeps.token_hit_ratio < at_once.token_hit_ratio


def told(policy, trace):
    for request in range(trace.requests):
        now_s = float(trace.arrival_s[request])
        number = policy.begin(trace.request(request), now_s)
        reason = ("", "tool_calls", "stop")[trace.finish[request]]
        policy.end(number, now_s + 0.1, reason, int(trace.output_tokens[request]))
        policy.sweep(now_s + 0.1)
    return now_s


def test_a_pending_tool_call_is_worth_more_than_a_finished_turn(tools):
    policy = Adaptive(capacity=120, chunk_tokens=64)
    now_s = told(policy, tools) + 1.0
    answers = []
    for first, reason in ((10**6, "tool_calls"), (2 * 10**6, "stop")):
        keys = np.arange(first, first + 6)
        policy.end(policy.begin(keys, now_s), now_s + 0.1, reason, 40)
        answers.append(policy.ask(keys, now_s + 0.2))
    called, ended = answers
    assert policy.index_in_force
    assert called.value[0] > 3 * ended.value[0]
    assert 1.0 < called.ttl_s[0] < 120.0 and called.admit.all() and (called.tier == 0).all()
    assert ended.ttl_s[0] < called.ttl_s[0]


def test_without_pressure_ttls_grow_to_the_longest():
    policy = Adaptive(capacity=None)
    number = policy.begin([1, 2, 3], 0.0)
    policy.end(number, 1.0, "stop", 10)
    assert (policy.ask([1, 2, 3], 2.0).ttl_s == MAX_TTL_S).all()


def test_prices_fall_while_nothing_is_short_of_room(tools):
    policy = Adaptive(capacity=120, chunk_tokens=64)
    now_s = told(policy, tools)
    before = policy.prices()[0]
    for minute in range(1, 11):
        policy.end(policy.begin([1], now_s + 60 * minute), now_s + 60 * minute)
    assert policy.prices()[0] < before / 100


def test_a_higher_price_means_a_colder_tier_and_a_shorter_ttl():
    policy = Adaptive(capacity=(100, 100, 100), chunk_tokens=64)
    policy.now.duel[2] = 1
    policy.end(policy.begin([1, 2], 0.0), 0.0, "tool_calls", 9)
    value = float(policy.ask([1, 2], 1.0).value[0])
    tiers, ttls = [], []
    for share in (0.1, 0.9, 1.1, 2.0):
        answer = policy.ask([1, 2], 1.0, [value * share, value * share / 1.5, value * share / 3])
        tiers.append(int(answer.tier[0]))
        ttls.append(float(answer.ttl_s[0]))
    assert tiers == [0, 0, 1, 2]
    assert ttls[0] > ttls[1] > 0
    assert not policy.ask([1, 2], 1.0, [value * 9] * 3).admit.any()


# --- memory ---------------------------------------------------------------------------------


def test_what_is_forgotten_is_the_oldest_and_what_is_held_is_not():
    policy = OnlinePolicy(capacity=100, chunk_tokens=16, remember=200)
    policy.begin([1, 2, 3], 0.0)
    for turn in range(100):
        keys = np.arange(10) + 100 * (turn + 1)
        policy.end(policy.begin(keys, turn + 1.0), turn + 1.0)
        policy.make_room(int(policy.runs.counter[REAL]) - 100, turn + 1.0)
    assert policy.runs.size[N_KEYS] <= 270
    begun = policy.begin(np.arange(10) + 100 * 100, 200.0)
    assert policy.hits[REAL] == 10 and begun == 101
    policy.begin([1, 2, 3], 201.0)
    assert policy.hits[REAL] == 0


def test_levels_count_what_runs_hold(tools):
    policy = Adaptive(capacity=(60, 60), chunk_tokens=64, remember=300)
    told(policy, tools)
    runs = policy.runs.run[: policy.runs.size[N_RUNS]]
    assert (runs["held"].sum(axis=0) == policy.runs.counter[:LEVELS]).all()
    assert runs["held"][:, REAL].sum() == 60 and runs["held"][:, INDEX_SHADOW].sum() == 60
    assert runs["length"].sum() == policy.runs.size[N_KEYS]


def test_what_a_server_dropped_is_no_hit():
    policy = OnlinePolicy(capacity=100, chunk_tokens=16)
    policy.begin([1, 2, 3, 4], 0.0)
    policy.begin([1, 2, 9], 1.0)
    policy.dropped([1, 2, 3, 4], 3)
    policy.begin([1, 2, 3, 4], 2.0)
    assert policy.hits[REAL] == 3


def test_a_made_trace_has_no_ends():
    trace = make_trace([[0, 1], [0, 1, 2]])
    assert trace.generation_s.tolist() == [0.0, 0.0] and trace.finish.tolist() == [0, 0]


def test_the_template_is_a_policy_of_ones_own():
    assert replay(LOOPS, Template, 0.1).policy == "Template"


@pytest.mark.parametrize("name", ["size", "counter", "weight", "bin_at", "duel", "clock"])
def test_a_state_with_an_array_of_another_length_is_refused(name):
    """Compiled code would read past its end."""
    policy = Adaptive(100, 64)
    policy.end(policy.begin([1, 2], 0.0), 1.0, "stop", 5)
    state = policy.state()
    policy.load(state)
    with pytest.raises(ValueError, match=f"^{name} is not of this version"):
        policy.load(state | {name: state[name][..., :-1]})
