"""What every policy has to pass, in the spirit of scikit-learn's `check_estimator`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from caching_heuristics import TIERS
from kvttl.policies.online import MAX_TTL_S, CachePolicy

_REASONS = (None, "tool_calls", "stop", "length")


class _Step(NamedTuple):
    keys: np.ndarray
    now_s: float
    took_s: float
    reason: str | None
    output_tokens: int


def check_policy(policy: CachePolicy, skip: tuple[str, ...] = ()) -> list[str]:
    """Hold a fresh policy to the contract; returns the names of the checks that it passed.

    Each check runs on a copy of its own. Seeded: two calls do the same.

    Parameters
    ----------
    policy : CachePolicy
        That has been told nothing yet, with a capacity of 50 to 5,000 chunks.
    skip : tuple of str
        Checks to leave out, by name; of `CHECKS`.

    Raises
    ------
    AssertionError
        Names the check, and what was not as it has to be.

    Examples
    --------
    >>> from kvttl.policies.template import Template
    >>> check_policy(Template(capacity=200))[:2]
    ['answers', 'deterministic']
    """
    passed = []
    for name, check in CHECKS.items():
        if name in skip:
            continue
        try:
            check(copy.deepcopy(policy))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{name}: it raised {error!r}") from error
        passed.append(name)
    return passed


def _sessions(steps: int, seed: int = 0) -> list[_Step]:
    """Return requests of some sessions that share a system prompt and grow turn by turn."""
    rng = np.random.default_rng(seed)
    prompts = [list(range(1, 5)) for _ in range(12)]
    now_s, unused, out = 0.0, 1000, []
    for _ in range(steps):
        now_s += float(rng.exponential(3.0))
        prompt = prompts[int(rng.integers(len(prompts)))]
        if rng.random() < 0.1:
            del prompt[4:]
        new = int(rng.integers(1, 5))
        prompt += range(unused, unused + new)
        unused += new
        told = float(rng.exponential(2.0)), _REASONS[int(rng.integers(4))], int(rng.integers(500))
        out.append(_Step(np.array(prompt, np.int64), now_s, *told))
    return out


def _tell(policy, steps, shift_s=0.0, room=200, also_at_s=()):
    """Tell a policy of requests, make room after each, and return what it answered."""
    held, answers = set(), []
    for step in steps:
        now_s = step.now_s + shift_s
        number = policy.begin(step.keys, now_s)
        policy.end(number, now_s + step.took_s, step.reason, step.output_tokens)
        answers.append(_checked(policy.ask(step.keys, now_s + step.took_s), len(step.keys)))
        for later_s in also_at_s:
            policy.ask(step.keys, now_s + later_s)
        held |= set(step.keys.tolist())
        if len(held) > room:
            held -= _room(policy, len(held) - room, now_s)
    return answers


def _room(policy, chunks, now_s):
    gone = np.asarray(policy.make_room(chunks, now_s)).tolist()
    assert len(set(gone)) == len(gone), "make_room must name no chunk twice"
    assert len(gone) <= chunks, f"make_room must choose {chunks} chunks at most, got {len(gone)}"
    return set(gone)


def _checked(answer, chunks):
    for name, values in answer._asdict().items():
        assert np.shape(values) == (chunks,), f"{name} must have shape ({chunks},)"
    ttl_s = answer.ttl_s
    fine = np.all((ttl_s >= 0) & (ttl_s <= MAX_TTL_S))
    assert fine, f"ttl_s must be 0..{MAX_TTL_S:g}, got {ttl_s}"
    assert not np.isnan(answer.value).any(), "value must not be NaN"
    assert np.isin(answer.tier, range(len(TIERS))).all(), f"tier must be indices into {TIERS}"
    known = answer.value > -np.inf
    ttl_s, tier = answer.ttl_s[known], np.diff(answer.tier[known])
    assert np.all(np.diff(answer.value[known]) <= 0), "value must not rise along a prompt"
    assert np.all(tier >= 0), "tier must not get hotter along a prompt"
    falling = np.all(np.diff(ttl_s)[tier == 0] <= 0)
    assert falling, "ttl_s must not rise along a prompt within a tier"
    return answer


def _same(a, b, what):
    for x, y in zip(a, b):
        for name in x._fields:
            equal = np.array_equal(getattr(x, name), getattr(y, name))
            assert equal, f"{name} differs {what}: {getattr(x, name)} and {getattr(y, name)}"


def _answers(policy):
    _tell(policy, _sessions(200))


def _deterministic(policy):
    again = copy.deepcopy(policy)
    _same(_tell(policy, _sessions(200)), _tell(again, _sessions(200)), "in two equal runs")


def _no_clock_of_its_own(policy):
    again = copy.deepcopy(policy)
    shifted = _tell(again, _sessions(200), shift_s=1.7e9)
    for x, y in zip(_tell(policy, _sessions(200)), shifted):
        assert np.allclose(x.ttl_s, y.ttl_s, rtol=1e-3, atol=1e-2), "ttl_s depends on the epoch"


def _blind_to_the_future(policy):
    other = copy.deepcopy(policy)
    past, after = _sessions(150), _sessions(150, seed=1)
    later = [step._replace(now_s=step.now_s + past[-1].now_s) for step in after]
    told = _tell(policy, past + later)[: len(past)]
    _same(told, _tell(other, past), "if other requests follow")


def _scalar_equals_array(policy):
    steps = _sessions(150)
    _tell(policy, steps)
    keys, now_s = steps[-1].keys, steps[-1].now_s + 30
    whole = policy.ask(keys, now_s)
    parts = [policy.ask(keys[: at + 1], now_s) for at in range(len(keys))]
    for name in ("value", "ttl_s"):
        last = np.array([getattr(part, name)[-1] for part in parts])
        best = np.maximum.accumulate(last[::-1])[::-1]  # no less than those after it
        equal = np.allclose(best, getattr(whole, name))
        assert equal, f"{name} of a prompt is not that of its chunks asked one by one"
    _same([whole], [policy.ask(keys, now_s)], "if asked twice")


def _asking_changes_nothing(policy):
    other, steps = copy.deepcopy(policy), _sessions(150)
    asked = _tell(other, steps, also_at_s=(0.0, 40.0, 1e6, math.nan))
    _same(_tell(policy, steps), asked, "if asked more often")


def _prefix_closed(policy):
    held, room = {}, 60
    for step in _sessions(300):
        policy.end(policy.begin(step.keys, step.now_s), step.now_s)
        before = [0, *step.keys.tolist()]
        held |= dict(zip(before[1:], before))
        if len(held) > room:
            for key in _room(policy, len(held) - room, step.now_s):
                assert key in held, f"make_room names {key}, which is not held"
                del held[key]
            orphans = [key for key, parent in held.items() if parent and parent not in held]
            assert not orphans, f"chunks without those before them are left: {orphans[:5]}"


def _saved_and_loaded(policy):
    fresh, steps = copy.deepcopy(policy), _sessions(300)
    _tell(policy, steps[:200])
    fresh.load(policy.state())
    _same(_tell(policy, steps[200:]), _tell(fresh, steps[200:]), "after save and load")


def _bad_hints(policy):
    for at, value in enumerate((math.nan, math.inf, -1.0, None, "hot", [1], 10**400)):
        hints = {"perplexity": value, "time_variance": value, "access_count": value, "x": value}
        number = policy.begin([1, 2, 3], float(at), hints=hints)
        policy.end(number, at + 0.5, "no such reason", 0)
        _checked(policy.ask([1, 2, 3], float(at)), 3)


def _clock_jumps(policy):
    jumps = (0.0, 3e9, -3e9, -600.0, 7200.0, math.nan, 1e15, 0.0)
    for at, jump in enumerate(jumps):
        _tell(policy, _sessions(20, seed=at), shift_s=jump)


def _one_hit_chunks(policy):
    sizes, step = [], 20_000
    for first in range(0, 1_000_000, step):
        keys = np.arange(first + 1, first + step + 1)
        policy.end(policy.begin(keys, first / 1000), first / 1000)
        policy.make_room(step, first / 1000)
        sizes.append(_bytes(policy.state()))
    assert sizes[-1] < 64 * 1_000_000, f"a million chunks used once take {sizes[-1]:,} bytes"
    grown = sizes[-1] - sizes[len(sizes) // 2]
    assert grown < 500_000, f"half a million more chunks used once take {grown:,} bytes more"
    _tell(policy, _sessions(20), shift_s=1000.0)


def _separate_chunks(policy):
    for key in range(1, 5_001):
        policy.end(policy.begin([key], key / 100), key / 100)
        if key > 100:
            gone = policy.make_room(1, key / 100)
            assert len(gone) == 1, "make_room must find a chunk where there are a hundred"
    assert _bytes(policy.state()) < 2**24, "5,000 chunks used once take more than 16 MiB"


def _bytes(state: dict[str, Any]) -> int:
    return sum(np.asarray(value).nbytes for value in state.values())


def _prompt_above_capacity(policy):
    for turn in range(3):
        keys = np.arange(1, 20_001) + turn * 15_000
        policy.end(policy.begin(keys, float(turn)), turn + 0.5)
        _checked(policy.ask(keys, float(turn)), len(keys))
        assert len(policy.make_room(15_000, turn + 0.5)) == 15_000, "make_room finds too few"


CHECKS: dict[str, Callable[[Any], None]] = {
    "answers": _answers,
    "deterministic": _deterministic,
    "no_clock_of_its_own": _no_clock_of_its_own,
    "blind_to_the_future": _blind_to_the_future,
    "scalar_equals_array": _scalar_equals_array,
    "asking_changes_nothing": _asking_changes_nothing,
    "prefix_closed": _prefix_closed,
    "saved_and_loaded": _saved_and_loaded,
    "bad_hints": _bad_hints,
    "clock_jumps": _clock_jumps,
    "one_hit_chunks": _one_hit_chunks,
    "separate_chunks": _separate_chunks,
    "prompt_above_capacity": _prompt_above_capacity,
}
