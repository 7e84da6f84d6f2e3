"""Policies that decide as they go, in the manager: told, asked, renewed, and never in the way."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from local_managers import (
    CHUNK,
    CONFIG,
    Engine,
    assert_replay_decides_the_same,
    hottest,
    local_controller,
    local_manager,
)

from kvttl.decisions.log import DecisionLog
from kvttl.manager.generation import end_of
from kvttl.manager.policy import POLICY_NAMES
from kvttl.policies import FAMILIES, Answer
from kvttl.policies.adaptive import Adaptive

PROMPT = "what is KV cache good for, in a word?"  # 4 chunks


class Speaking(Engine):
    """Says how each answer ended."""

    reason, tokens = "stop", 40

    def _answer(self, prompt):
        answer = super()._answer(prompt)
        answer.outputs[0].finish_reason = self.reason
        answer.outputs[0].token_ids = list(range(self.tokens))
        return answer


def manager(policy, **options):
    controller = local_controller()
    engine = Speaking(controller)
    return local_manager(controller, llm=engine, policy=policy, **options), engine


class Says:
    """A policy that says the same of all chunks, or what it is told to."""

    def __init__(self, ttl_s=50.0, tier=0):
        self.ttl_s, self.tier, self.told = ttl_s, tier, []

    def begin(self, keys, now_s, prompt_tokens=None, hints=None):
        self.told.append(("begin", keys, now_s, prompt_tokens, dict(hints)))
        return len(self.told)

    def end(self, number, now_s, finish_reason=None, output_tokens=0):
        self.told.append(("end", number, now_s, finish_reason, output_tokens))

    def ask(self, keys, now_s, prices=None):
        self.told.append(("ask", keys, now_s))
        ones = np.ones(len(keys))
        tier = np.full(len(keys), self.tier, np.int8)
        return Answer(ones, ones * self.ttl_s, ones > 0, tier)


def decide(cache, prompt=PROMPT, metadata=None):
    (managed,) = cache.generate([prompt], None, metadata)
    return managed.decision.result(0)


def test_the_names_are_the_families():
    assert set(POLICY_NAMES) == set(FAMILIES)


def test_the_default_is_the_formula_and_its_records_are_as_before():
    record = decide(local_manager())
    assert (record.policy, record.decided, record.policy_error) == ("", (), "")
    assert record.ttl_s == CONFIG.ttl(record.metadata)
    assert record.wanted_tier == CONFIG.tier(record.metadata)


@pytest.mark.parametrize("given", ["adaptve", 3, object()])
def test_what_is_no_policy_is_refused_by_name(given):
    with pytest.raises(ValueError, match="policy must be one of formula, adaptive, recency, fixed"):
        local_manager(policy=given)


def test_a_policy_is_told_what_a_generation_was_and_asked_after_it():
    policy = Says(ttl_s=12.5, tier=1)
    cache, engine = manager(policy)
    engine.reason = "tool_calls"
    record = decide(cache, metadata={"perplexity": 7.0})
    begin, end, ask = policy.told
    assert begin[0] == "begin" and len(begin[1]) == 4 and begin[1].dtype == np.int64
    assert begin[3] == len(PROMPT) and begin[4]["perplexity"] == 7.0
    assert begin[2] <= end[2] == ask[2] == 1000.0
    assert end[3:] == ("tool_calls", 40) and (ask[1] == begin[1]).all()
    assert (record.policy, record.wanted_tier, record.ttl_s) == ("Says", "disk", 12.5)
    assert record.decided == ({"chunks": 4, "tier": "disk", "ttl_s": 12.5, "value": 1.0},)
    assert (record.finish_reason, record.output_tokens) == ("tool_calls", 40)
    assert hottest(cache, PROMPT) == ["disk"] * 4


def test_keys_are_stable_and_tenants_and_models_have_their_own():
    keys = {}
    for model in ("a", "b"):
        for salt in ("", "tenant"):
            for _ in range(2):
                policy = Says()
                cache, _ = manager(policy)
                cache.controller.model = model
                answer = SimpleNamespace(prompt_token_ids=list(PROMPT.encode()))
                cache.manage(PROMPT, answer, cache_salt=salt)
                keys.setdefault((model, salt), set()).add(tuple(policy.told[0][1].tolist()))
    assert all(len(each) == 1 for each in keys.values())
    chunks = [set(next(iter(each))) for each in keys.values()]
    assert len(set.union(*chunks)) == 4 * 4


def test_a_ttl_that_ends_is_asked_about_again_and_renewed_or_comes_down():
    policy = Says(ttl_s=50.0)
    cache, _ = manager(policy)
    decide(cache)
    cache.clock.now_s += 50.0
    assert cache.sweep() == [] and cache.claims.next_due_s == 1100.0  # renewed
    assert hottest(cache, PROMPT) == ["gpu"] * 4
    policy.tier = 2
    cache.clock.now_s += 50.0
    (record,) = cache.sweep()
    assert (record.kind, record.from_tier, record.wanted_tier) == ("expiry", "gpu", "remote")
    assert hottest(cache, PROMPT) == ["remote"] * 4
    policy.ttl_s = 0.0
    cache.clock.now_s += 50.0
    assert [r.wanted_tier for r in cache.sweep()] == [None]
    assert hottest(cache, PROMPT) == [None] * 4 and len(cache.claims) == 0


def test_a_claim_is_renewed_before_its_time_where_the_policy_has_changed_its_mind():
    policy = Says(ttl_s=500.0)
    cache, _ = manager(policy)
    decide(cache)
    policy.tier, policy.ttl_s = 1, 60.0
    cache.clock.now_s += 5.0
    assert [(r.from_tier, r.wanted_tier, r.ttl_s) for r in cache.sweep()] == [("gpu", "disk", 60.0)]
    assert hottest(cache, PROMPT) == ["disk"] * 4 and cache.claims.next_due_s == 1065.0


def test_a_prompts_parts_are_wanted_in_tiers_of_their_own_and_a_shared_part_stays():
    class InParts(Says):
        def ask(self, keys, now_s, prices=None):
            answer = super().ask(keys, now_s)
            answer.tier[:] = np.minimum(np.arange(len(keys)) // 2, 2)
            answer.ttl_s[:] = np.where(answer.tier == 2, 0.0, 90.0 - 10 * answer.tier)
            return answer

    cache, _ = manager(InParts())
    long = PROMPT + " It holds what attention has seen."
    decide(cache, long)
    cache.sweep()
    assert hottest(cache, long) == ["gpu"] * 2 + ["disk"] * 2 + [None] * 4
    other = PROMPT[:16] + "something else altogether"
    decide(cache, other)
    assert hottest(cache, other)[:2] == ["gpu"] * 2
    assert len(cache.claims) <= 5


def test_claims_within_a_longer_prompt_give_way_to_its_own():
    cache, _ = manager("adaptive")
    for turn in range(6):
        decide(cache, PROMPT + " and on" * turn * 4)
        cache.clock.now_s += 1.0
        cache.sweep()
    assert len(cache.claims) == 1


class Broken(Says):
    def __init__(self, method, answer):
        super().__init__()
        self.method, self.answer = method, answer

    def _break(self, method):
        if method == self.method and isinstance(self.answer, BaseException):
            raise self.answer

    def begin(self, *args):
        self._break("begin")
        return super().begin(*args)

    def end(self, *args):
        self._break("end")

    def sweep(self, *args):
        self._break("sweep")

    def prices(self):
        self._break("prices")
        return (0.3, 0.2, 0.1)

    def ask(self, *args):
        self._break("ask")
        answer = super().ask(*args)
        return self.answer(answer) if callable(self.answer) else answer


NONSENSE = [
    lambda a: a._replace(ttl_s=a.ttl_s * np.nan),
    lambda a: a._replace(ttl_s=a.ttl_s * -1),
    lambda a: a._replace(ttl_s=a.ttl_s * np.inf),
    lambda a: a._replace(ttl_s=a.ttl_s[:1]),
    lambda a: a._replace(tier=a.tier + 3),
    lambda a: a._replace(tier=a.tier - 1),
    lambda a: a._replace(tier=np.array([1, 0, 0, 0])),
    lambda a: a._replace(value=a.value * np.nan),
    lambda a: a._replace(ttl_s="long"),
    lambda a: None,
    lambda a: "gpu",
]
FAILURES = [(m, ZeroDivisionError(m)) for m in ("begin", "end", "sweep", "ask", "prices")]
FAILURES += [("ask", answer) for answer in NONSENSE]


@pytest.mark.parametrize(("method", "answer"), FAILURES)
def test_a_policy_that_fails_costs_no_text_and_the_formula_decides(method, answer):
    cache, _ = manager(Broken(method, answer))
    assert cache.generate_and_manage(PROMPT, None) == PROMPT.upper()
    record = cache.records[-1]
    assert record.policy_error.startswith("policy Broken: ") and record.error == ""
    assert (record.policy, record.decided) == ("", ())
    assert record.ttl_s == CONFIG.ttl(record.metadata)
    assert record.wanted_tier == CONFIG.tier(record.metadata)
    assert len(cache.claims) == 1


def test_a_policy_that_fails_at_renewal_leaves_the_ladder_and_the_reason():
    policy = Broken("", None)
    cache, _ = manager(policy)
    decide(cache)
    policy.method, policy.answer = "ask", ZeroDivisionError("later")
    cache.clock.now_s += 50.0
    (record,) = cache.sweep()
    assert (record.from_tier, record.wanted_tier) == ("gpu", "disk")
    assert record.policy_error == "policy Broken: ZeroDivisionError: later"


def test_what_a_policy_has_forgotten_comes_down_the_ladder():
    cache, _ = manager(policy := Says(ttl_s=50.0))
    decide(cache)
    policy.ask = lambda keys, now_s: Answer(
        np.full(len(keys), -np.inf), np.zeros(len(keys)), None, np.full(len(keys), 2)
    )
    cache.clock.now_s += 50.0
    assert [(r.from_tier, r.wanted_tier) for r in cache.sweep()] == [("gpu", "disk")]


def test_times_that_a_policy_is_told_never_go_back():
    cache, _ = manager(policy := Says())
    for now_s in (1000.0, 990.0, 1010.0):
        cache.clock.now_s = now_s
        cache.manage(PROMPT, SimpleNamespace(prompt_token_ids=list(PROMPT.encode())), None, 30.0)
    times = [told[2] for told in policy.told]
    assert times == sorted(times)


def test_a_clock_that_was_wrong_for_a_moment_does_not_stop_a_policys_time():
    cache, _ = manager(policy := Says())
    for now_s in (1000.0, 1e12, 1001.0, 1002.0):
        cache.clock.now_s = now_s
        cache.manage(PROMPT, SimpleNamespace(prompt_token_ids=list(PROMPT.encode())))
    assert [told[2] for told in policy.told if told[0] == "end"] == [1000.0, 1e12, 1001.0, 1002.0]


def test_prices_that_are_none_are_a_failure_of_the_policy():
    cache, _ = manager(policy := Broken("", None))
    policy.prices = lambda: ("dear",)
    assert decide(cache).policy_error.startswith("policy Broken: ValueError")


# --- what it learns -------------------------------------------------------------------------


class Loop:
    """Sessions whose tool calls return within seconds and whose users within minutes."""

    def __init__(self, cache, engine, seed=3):
        self.cache, self.engine = cache, engine
        self.rng, self.due, self.names = np.random.default_rng(seed), [], 0

    def step(self):
        """Serve the next request; returns its record."""
        if len(self.due) < 12:
            self.names += 1
            self.due.append((self.cache.clock.now_s + 2.0, f"{self.names:<16}"))
        self.due.sort()
        at_s, prompt = self.due.pop(0)
        self.cache.clock.now_s = max(self.cache.clock.now_s, at_s)
        called = self.rng.random() < 0.6
        self.engine.reason = "tool_calls" if called else "stop"
        prompt += f"{self.rng.integers(10**15):<16}"
        record = decide(self.cache, prompt)
        think_s = 2 + self.rng.exponential(2.0) if called else 60 + self.rng.exponential(60.0)
        if len(prompt) < 16 * 9:
            self.due.append((self.cache.clock.now_s + think_s, prompt))
        self.cache.sweep()
        return record


def test_a_pending_tool_call_has_a_short_ttl_at_a_high_value_and_a_finished_turn_a_long_one():
    policy = Adaptive((60, 400, 4000), CHUNK)
    cache, engine = manager(policy)
    loop = Loop(cache, engine)
    records = [loop.step() for _ in range(500)][-200:]
    assert policy.index_in_force
    called = [r.decided[-1] for r in records if r.finish_reason == "tool_calls"]
    ended = [r.decided[-1] for r in records if r.finish_reason == "stop"]
    value, ttl_s = (
        [
            np.median([d[name] for d in each if d["tier"] != "remote" or d["ttl_s"]])
            for each in (called, ended)
        ]
        for name in ("value", "ttl_s")
    )
    assert value[0] > 3 * value[1]
    assert 0 < ttl_s[0] < ttl_s[1]


# --- one object, all homes --------------------------------------------------------------------


def test_a_decision_log_gives_the_same_ttls_and_tiers_in_a_replay(tmp_path):
    policy = Adaptive((60, 400, 4000), CHUNK)
    with DecisionLog(tmp_path) as log:
        cache, engine = manager(policy, log=log)
        loop = Loop(cache, engine)
        records = [loop.step() for _ in range(600)]
        cache.close()
    assert {part["tier"] for record in records for part in record.decided} > {"gpu"}
    (tmp_path / "policy-Adaptive.npz").unlink()
    assert_replay_decides_the_same(records, tmp_path, Adaptive((60, 400, 4000), CHUNK))


# --- a restart --------------------------------------------------------------------------------


def test_a_policy_goes_on_after_a_restart_where_it_was(tmp_path):
    with DecisionLog(tmp_path) as log:
        cache, engine = manager("adaptive", log=log)
        loop = Loop(cache, engine)
        for _ in range(30):
            loop.step()
        before = cache._decider.advisor.policy.state()
        cache.close()
        again, _ = manager("adaptive", log=log)
        after = again._decider.advisor.policy.state()
    assert {n: a.tobytes() for n, a in before.items()} == {n: a.tobytes() for n, a in after.items()}


@pytest.mark.parametrize("damage", [b"", b"no archive", "half", "other"])
def test_a_damaged_state_is_a_cold_start_with_a_warning(tmp_path, caplog, damage):
    with DecisionLog(tmp_path) as log:
        cache, _ = manager("adaptive", log=log)
        decide(cache)
        cache.close()
        file = tmp_path / "policy-adaptive.npz"
        if damage == "other":  # as of a version with other fields
            np.savez(file, told_s=0.0, run=np.zeros(3))
        else:
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
        again, _ = manager("adaptive", log=log)
        assert decide(again).policy == "adaptive"
    assert "policy starts cold" in caplog.text


def test_a_full_disk_costs_the_state_and_nothing_else(tmp_path, caplog, monkeypatch):
    def full(*_args, **_options):
        raise OSError("no space left on device")

    with DecisionLog(tmp_path) as log:
        cache, _ = manager("adaptive", log=log)
        decide(cache)
        monkeypatch.setattr(np, "savez", full)
        cache.close()
    assert "was not saved" in caplog.text and not list(tmp_path.glob("*.npz*"))


# --- how generations end ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The sum is 5.", "stop"),
        ("<tool_call>\n{}", "tool_calls"),
        ('I add. {"name": "add", "arguments": {"a": 1}}', "tool_calls"),
        ("<｜tool▁calls▁begin｜>", "tool_calls"),
        ("[TOOL_CALLS] [{", "tool_calls"),
        ("<|python_tag|>brave_search.call", "tool_calls"),
        ("I call a tool: <b>", "stop"),
    ],
)
def test_a_tool_call_is_known_by_its_marks(text, reason):
    said = SimpleNamespace(finish_reason="stop", text=text, token_ids=[1, 2, 3])
    assert end_of(SimpleNamespace(outputs=[said])) == (reason, 3)
    said.finish_reason = "length"
    assert end_of(SimpleNamespace(outputs=[said]))[0] == "length"


@pytest.mark.parametrize("output", [None, "text", SimpleNamespace(outputs=None), ValueError("x")])
def test_what_says_nothing_of_its_end(output):
    assert end_of(output) == (None, 0)
