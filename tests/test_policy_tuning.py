"""`policy_tuning` and `make tune`: the known best, the same answer twice, what is written."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import policy_tuning
from caching_heuristics import HeuristicConfig
from kvttl.replay.costs import TierCosts
from kvttl.replay.engine import replay
from kvttl.settings import load_settings
from kvttl.traces.builder import make_trace
from kvttl.traces.generator import agent_loops
from policy_tuning import MEASURES, Question, measured, tune

LOOPS = agent_loops(200, seed=3)
TIERS = (0.05, 0.2, None)


def comes_back_after(gap_s, requests=400):
    """A trace in which every other prompt comes back after `gap_s`, and the rest never does."""
    ids = [[r // 2 % 10] if r % 2 == 0 else [10 + r] for r in range(requests)]
    return make_trace(ids, arrival_s=np.arange(requests) * gap_s / 20, block_tokens=1000)


# --- the search ---------------------------------------------------------------------------


def test_it_finds_the_known_best_and_no_setting_that_loses_hits():
    """With a TTL under 100 s all hits are lost, with a longer one memory is held for nothing."""
    tuning = tune(comes_back_after(100.0), Question("ttl"), 64)
    assert 100 <= tuning.config.base_ttl <= 110
    start, taken = (tuning.trials.set_index("role").loc[role] for role in ("start", "taken"))
    assert taken["hits"] == start["hits"] > 0 and taken["memory"] < start["memory"]
    assert taken["hits_rest"] == start["hits_rest"] and min(tuning.gains) > 0.4
    assert "100% of the gain in memory survives" in tuning.sentence and "seed 0" in tuning.sentence


@pytest.mark.parametrize("goal", MEASURES)
def test_the_same_seed_gives_the_same_answer_for_every_goal(goal):
    question = Question("heuristic", TIERS, goal, seed=4)
    first, second = (tune(LOOPS, question, 24) for _ in range(2))
    pd.testing.assert_frame_equal(first.trials, second.trials)
    assert first.config == second.config and first.sentence == second.sentence
    assert first.gains[0] >= 0
    other = tune(LOOPS, Question("heuristic", TIERS, goal, seed=5), 24)
    assert not other.trials[goal].equals(first.trials[goal])


def test_what_nothing_beats_is_the_front_and_what_is_taken_keeps_the_limit():
    """The start settings hold more than the limit here: less memory is the gain then."""
    tuning = tune(LOOPS, Question("heuristic", None, "hits", limit=0.2), 40)
    trials = tuning.trials
    (taken,) = trials.index[trials["role"] == "taken"]
    allowed = trials[trials["memory"] <= 0.2]
    assert min(tuning.gains) > 0 and "of the gain in memory survives" in tuning.sentence
    assert trials.loc[taken, "hits"] == allowed["hits"].max() and len(allowed) < len(trials)
    for _, row in trials[trials["role"] == "front"].iterrows():
        better = (trials["hits"] > row["hits"]) & (trials["memory"] <= row["memory"])
        assert not better.any() and row["hits_rest"] > 0


def test_a_limit_that_is_not_kept_on_the_rest_is_said():
    """What comes back after 100 s at first comes back after 400 s later."""
    early, late = np.arange(200) * 5.0, 1000 + np.arange(200) * 20.0
    ids = [[r // 2 % 10] if r % 2 == 0 else [10 + r] for r in range(400)]
    trace = make_trace(ids, arrival_s=np.concatenate([early, late]), block_tokens=1000)
    tuning = tune(trace, Question("ttl", split=0.2), 40)
    assert tuning.config.base_ttl < 400
    assert tuning.sentence.endswith("in memory survives, but hits is outside its limit.")


def test_settings_that_change_nothing_or_are_fixed_stay():
    config = tune(LOOPS, Question("heuristic", None, fixed={"gamma": 0.0}), 24).config
    start = HeuristicConfig()
    idle = "hot_threshold cold_threshold variance_threshold recent_seconds disk_ttl_factor"
    assert all(getattr(config, name) == getattr(start, name) for name in idle.split())
    assert config.gamma == 0.0 and config.base_ttl != start.base_ttl


# --- going on -----------------------------------------------------------------------------


def test_a_search_that_was_interrupted_goes_on_as_if_it_never_was(tmp_path, monkeypatch):
    question, calls, real = Question("heuristic_order", 0.1, "hits"), [], policy_tuning.replay

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 21:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(policy_tuning, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(LOOPS, question, 32, tmp_path)
    monkeypatch.setattr(policy_tuning, "replay", real)
    (journal,) = tmp_path.iterdir()
    resumed = tune(LOOPS, question, 32, tmp_path)
    assert len(resumed.trials) == 32 and resumed.trials["role"].iloc[0] == "start"
    straight = tune(LOOPS, question, 32)
    assert resumed.gains[0] >= 0.9 * straight.gains[0] > 0
    # More trials go on from there; the same or fewer ask nothing new; another question is apart.
    longer = tune(LOOPS, question, 40, tmp_path)
    pd.testing.assert_frame_equal(longer.trials[["hits"]][:32], resumed.trials[["hits"]])
    assert len(tune(LOOPS, question, 8, tmp_path).trials) == 40
    assert list(tmp_path.iterdir()) == [journal]
    for other, trace in (
        (Question("heuristic_order", 0.2, "hits"), LOOPS),
        (question, LOOPS.head(150)),
    ):
        assert len(tune(trace, other, 8, tmp_path).trials) == 8


def test_two_halves_of_a_search_are_the_whole(tmp_path):
    question = Question("heuristic", None)
    tune(LOOPS, question, 16, tmp_path)
    halves, whole = tune(LOOPS, question, 32, tmp_path), tune(LOOPS, question, 32)
    pd.testing.assert_frame_equal(halves.trials, whole.trials)
    assert halves[:2] == whole[:2] and halves.sentence == whole.sentence


@pytest.mark.parametrize("damage", [b"no json\n{}\n", b"{}\n{}\n", b"\xff\xfe\n\n", b"[]\n[]\n"])
def test_a_damaged_journal_is_named(tmp_path, damage):
    tune(LOOPS, Question(), 1, tmp_path)
    (journal,) = tmp_path.iterdir()
    journal.write_bytes(damage)
    with pytest.raises(ValueError, match=f"{journal.name} is no journal of trials"):
        tune(LOOPS, Question(), 8, tmp_path)


# --- the split ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy, capacity", [("heuristic", TIERS), ("heuristic_order", 0.1)])
def test_the_rest_is_what_comes_after_the_first_part(policy, capacity):
    first, costs = 120, TierCosts(price_per_gib_hour=(0.3, 0.2, 0.1))
    blocks = (77, 200, None) if isinstance(capacity, tuple) else 77
    before, whole = (replay(trace, policy, blocks) for trace in (LOOPS.head(first), LOOPS))
    assert (before.hit_tokens == whole.hit_tokens[:first]).all()
    figures = [
        measured(*part) for part in ((before, costs), (whole, costs, before), (whole, costs))
    ]
    weights = {
        name: np.array([first, LOOPS.requests - first]) for name in ("price", "ttft", "bytes")
    }
    span_s = before.trace.span_s
    weights["memory"] = (span_s, LOOPS.span_s - span_s)
    tokens = LOOPS.prompt_tokens
    weights["hits"] = (tokens[:first].sum(), tokens[first:].sum())
    for name, weight in weights.items():
        parts = [part[name] for part in figures[:2]]
        assert np.average(parts, weights=weight) == pytest.approx(figures[2][name])
    since_s = LOOPS.arrival_s[first]
    assert figures[1]["hits"] == pytest.approx(whole.since(since_s)["token_hit_ratio"])


# --- the command --------------------------------------------------------------------------


def run(tmp_path, *arguments):
    return policy_tuning.main(["--cache-dir", "", "--out", str(tmp_path / "out"), *arguments])


def test_make_tune_ends_in_a_picture_a_settings_file_and_a_sentence(tmp_path, monkeypatch, capsys):
    path = tmp_path / "heuristics.yaml"
    monkeypatch.setenv("KV_HEURISTICS_FILE", str(path))
    arguments = ["--policy", "heuristic", "--goal", "price", "--against", "hits", "--limit", "0.9"]
    arguments += ["--capacity", "0.1,0.2,unlimited", "--prices", "1", "9", "0.1", "0.01"]
    assert run(tmp_path, *arguments, "--trials", "24", "--set", "alpha=0.5") == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1].startswith("Tuned on the first 50% of the time, 24 trials, seed 0: price ")
    name = "heuristic_price_hits_seed0"
    assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    trials = pd.read_csv(tmp_path / "out" / f"{name}.csv").set_index("role")
    assert len(trials) == 24 and trials.loc["taken", "price"] < trials.loc["start", "price"]
    saved = load_settings()  # as `make run` reads it
    assert saved.alpha == 0.5 and saved != HeuristicConfig(alpha=0.5)


def test_settings_that_gain_nothing_are_not_written(tmp_path, monkeypatch, capsys):
    path = tmp_path / "heuristics.yaml"
    path.write_text("alpha: 1.0\n")
    monkeypatch.setenv("KV_HEURISTICS_FILE", str(path))
    assert run(tmp_path, "--goal", "hits", "--trials", "8") == 0  # the defaults hit most already
    said = capsys.readouterr().out
    assert (
        f"{path} stays as it was" in said
        and "no gain, so none of the gain in hits survives" in said
    )
    assert path.read_text() == "alpha: 1.0\n"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--policy", "lru"], "unknown POLICY with settings 'lru': known are ttl, heuristic"),
        (["--policy", "heuristic_order"], "CAPACITY must be given for POLICY=heuristic_order"),
        (["--goal", "hit"], "unknown GOAL 'hit': did you mean 'hits'?"),
        (["--against", "speed"], "unknown AGAINST 'speed': known are hits, ttft"),
        (["--goal", "hits", "--against", "hits"], "AGAINST must be another measure than GOAL"),
        (["--goal", "bytes"], "CAPACITY must be gpu,disk,remote for bytes, got None"),
        (["--limit", "-1"], "LIMIT must be >= 0 and finite, got -1.0"),
        (["--limit", "nan"], "LIMIT must be"),
        (["--limit", "2"], "LIMIT must be in reach: hits was 0.9"),
        (["--trials", "0"], "TRIALS must be 1..1e+06, got 0"),
        (["--split", "1.5"], "SPLIT must be 0.01..0.99, got 1.5"),
        (["--split", "1"], "SPLIT must be 0.01..0.99, got 1.0"),
        (["--seed", "-1"], "SEED must be 0..4.29497e+09, got -1"),
        (["--set", "speed=1"], "unknown setting 'speed'"),
        (["--set", "gamma=2"], "gamma must be 0..1, got 2"),
        (["--prices", "-1", "0", "0", "0"], "engine_price_per_hour must be"),
        (["--trace", "absent.jsonl"], "there is no trace"),
    ],
)
def test_make_tune_names_what_is_wrong(tmp_path, capsys, arguments, reason):
    assert run(tmp_path, "--trials", "8", *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and reason in error


def test_a_trace_without_time_cannot_be_split():
    with pytest.raises(ValueError, match="SPLIT must leave time and requests on both sides"):
        tune(make_trace([[0], [0]], arrival_s=[5, 5]), Question())
    with pytest.raises(ValueError, match="SPLIT must leave"):
        tune(make_trace([]), Question())
