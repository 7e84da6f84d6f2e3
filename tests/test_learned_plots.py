"""What notebook 08 shows of a policy that learns is what it did, and what came."""

from __future__ import annotations

import numpy as np
import pytest

from kvttl.plots.learned import CLASSES, LEAST_USES, classes, hazard_table, watch
from kvttl.plots.learned_plots import plot_settings, saved_work
from kvttl.policies.adaptive import Adaptive
from kvttl.policies.hazard import EDGES_S
from kvttl.replay.engine import replay
from kvttl.traces.builder import TraceBuilder
from kvttl.traces.generator import agent_loops

CAPACITY = 0.05
SHAPE = {"sessions_per_hour": 360.0, "tool_share": 0.8}
LOOPS = agent_loops(2500, seed=8, **SHAPE).head(1200)


@pytest.fixture(scope="module")
def seen():
    return watch(LOOPS, CAPACITY)


def test_what_is_watched_is_what_a_replay_does(seen):
    result = replay(LOOPS, "adaptive", CAPACITY)
    assert seen.hit_blocks.tolist() == result.hit_blocks[:, 0].tolist()
    assert seen.hit_blocks.sum() > replay(LOOPS, "recency", CAPACITY).hit_blocks.sum()
    assert seen.ends["index_in_force"].any() and not seen.ends["index_in_force"].all()


def test_a_chunk_that_is_followed_hits_while_it_is_resident(seen):
    life = seen.life
    before = life["resident"].shift(fill_value=False)
    used = life["hit"].notna()
    assert set(life["hit"][used]) == {0.0, 1.0}
    assert (before[used] == (life["hit"][used] == 1.0)).all()
    assert not life["resident"].iloc[-1]  # its end is shown
    own = seen.trace.sessions == longest(LOOPS)
    assert used.sum() == own.sum()


def longest(trace):
    """The session that is followed, naively."""
    found = {}
    for session in np.unique(trace.sessions).tolist():
        arrivals_s = trace.arrival_s[trace.sessions == session]
        late, early = arrivals_s[0] > 0.25 * trace.span_s, arrivals_s[-1] < 0.8 * trace.span_s
        if late and early and len(arrivals_s) <= 40:
            found[session] = len(arrivals_s)
    return max(found, key=found.get)


def test_uses_are_counted_as_a_naive_count_does(seen):
    table = hazard_table(seen)
    flat, names = LOOPS.without_tails(renumber=False), classes(LOOPS)
    assert table["uses"].min() >= LEAST_USES and set(table["class"]) == set(CLASSES[:3])
    waits_s = []
    for request in np.flatnonzero(names == "tool call pending").tolist():
        last = flat.request(request)[-1]
        later = (r for r in range(request + 1, LOOPS.requests) if last in flat.request(r))
        again = next(later, -1)  # -1: not again, and the trace's end ends the waiting
        waits_s.append((again >= 0, LOOPS.arrival_s[again] - LOOPS.arrival_s[request]))
    for row in table[table["class"] == "tool call pending"].itertuples():
        to_s = min([edge for edge in EDGES_S if edge > row.from_s], default=np.inf)
        uses = sum(came and row.from_s <= wait_s < to_s for came, wait_s in waits_s)
        here_s = sum(min(max(wait_s, row.from_s), to_s) - row.from_s for _, wait_s in waits_s)
        assert (row.uses, row.counted) == (uses, pytest.approx(uses / here_s))
    assert ((table["low"] <= table["counted"]) & (table["counted"] <= table["high"])).all()


def test_it_expects_of_each_class_what_comes(seen):
    table = hazard_table(seen, since_s=LOOPS.span_s / 4).set_index("class")
    pending, ended = (table.loc[name].set_index("from_s") for name in CLASSES[:2])
    more = (pending[["counted", "expected"]] / ended[["counted", "expected"]]).dropna()
    assert len(more) >= 3 and (more["counted"] > 1.5).all() and (more["expected"] > 1.2).all()
    for name in ("tool call pending", "first turn"):
        ratio = (table.loc[name, "expected"] / table.loc[name, "counted"]).median()
        assert 1 / 3 < ratio < 3


def test_a_fresh_policy_expects_what_recency_does():
    policy = Adaptive(100, 64)
    policy.end(policy.begin([1, 2], 0.0), 1.0, "tool_calls", 9)
    (row,) = policy.hazards([policy.signals([1, 2])])
    middle_s = (EDGES_S[:-1] + EDGES_S[1:]) / 2
    assert row[:-1] == pytest.approx(0.3 / (30 + middle_s), rel=0.25)
    assert policy.signals([7]).tolist() == [0] * len(policy.signals([7]))
    assert policy.signals([1, 2]).any()


def test_the_index_is_told_also_while_recency_is_in_force():
    policy = Adaptive(100, 64)
    policy.end(policy.begin([1, 2], 0.0), 1.0)
    before = policy.state()
    by_index, by_recency = policy.ask_index([1, 2], 5.0), policy.ask([1, 2], 5.0)
    assert not policy.index_in_force
    assert 0 < by_index.value[0] < 1 and by_recency.value[0] == 0  # the first request
    assert all(np.array_equal(policy.state()[name], before[name]) for name in ("duel", "price"))
    policy.now.duel[2] = 1
    assert all(map(np.array_equal, policy.ask([1, 2], 5.0), policy.ask_index([1, 2], 5.0)))


def test_settings_are_drawn_with_what_they_hit(seen):
    figure = plot_settings(seen, CAPACITY, half_life_s=300, guard=1.0)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    hits = {label.split(":")[0]: label.split(":")[1] for label in labels}
    # Nothing can lead by all the tokens: with this guard it is recency for ever.
    at = {name: float(text.split("%")[0]) for name, text in hits.items()}
    assert at["adaptive"] == pytest.approx(at["recency"], abs=1.0) and at["optimal"] > at["recency"]


def test_work_that_was_saved_counts_attention():
    builder = TraceBuilder(64)
    for second, blocks in enumerate((1000, 500)):
        builder.add(range(blocks), second, 64 * blocks)
    result = replay(builder.finish(), "recency", 2000)
    half, whole = 32_000, 64_000
    cost = {tokens: tokens + tokens**2 / (2 * 30_500) for tokens in (half, whole)}
    assert saved_work(result) == pytest.approx(cost[half] / (cost[half] + cost[whole]))
    assert result.token_hit_ratio == pytest.approx(1 / 3)
