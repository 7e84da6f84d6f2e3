"""What a policy that learns knew while it ran: hazards, prices, and the life of one chunk."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from kvttl.policies.adaptive import Adaptive
from kvttl.policies.hazard import EDGES_S
from kvttl.policies.state import REAL
from kvttl.replay.baselines import next_accesses
from kvttl.replay.engine import in_order_of_time
from kvttl.replay.policies import capacities
from kvttl.traces.trace import FINISH, REASONS, Trace

CLASSES = (*FINISH[1:], "first turn", FINISH[0])  # of uses; a session's first is "first turn"
LEAST_USES = 5  # of an age: with fewer nothing is said of how often chunks came back at it


class Watched(NamedTuple):
    """What a policy knew of each request when its generation ended, and what came of it.

    ``ends``: a row an end; its request, seconds, price, index_in_force, ttl_s of the prompt's last
    chunk. ``life``: of one chunk, a row each time that something happened; seconds since its
    first use, index, price, ttl_s, resident, hit (1.0 a use that hit, 0.0 that missed, else NaN).
    """

    trace: Trace
    hit_blocks: np.ndarray  # (requests,)
    codes: np.ndarray  # (requests, SIGNALS): of each prompt's last chunk
    hazards: np.ndarray  # (requests, BINS): expected of it then, a second
    ends: pd.DataFrame
    life: pd.DataFrame


def watch(trace: Trace, capacity, session: int | None = None, **settings) -> Watched:
    """Tell `Adaptive` of a trace as a live caller does, and write down what it says.

    Parameters
    ----------
    trace : Trace
        Each generation's end is told when it is over.
    capacity : int or float
        As of `kvttl.replay.engine.replay`.
    session : int, optional
        Of whose first prompt the last chunk is followed. Default: the longest of those with at
        most 40 requests that begin after a quarter of the time and end before its last fifth.
    **settings
        Of `Adaptive`.

    Examples
    --------
    >>> from kvttl.traces.generator import agent_loops
    >>> seen = watch(agent_loops(100), capacity=0.1)
    >>> len(seen.ends), seen.hazards.shape
    (100, (100, 22))
    """
    flat, (room, *_) = trace.without_tails(renumber=False), capacities(capacity, trace)
    policy = Adaptive(room, trace.block_tokens, **settings)
    followed = _Followed(trace, _long_session(trace) if session is None else session)
    hits, codes, ends = np.zeros(trace.requests, np.int64), {}, []
    for request, is_end, now_s, is_over in _events(trace):
        keys = flat.request(request).astype(np.int64)
        if is_end:
            told = REASONS[trace.finish[request]], int(trace.output_tokens[request])
            policy.end(request, now_s, *told)
            code = policy.signals(keys)
            codes[request] = code, policy.hazards([code])[0]
            ttl_s = policy.ask_index(keys, now_s).ttl_s[-1:].sum()  # 0 of no chunk
            ends.append((request, now_s, policy.prices()[0], policy.index_in_force, ttl_s))
        else:
            policy.begin(keys, now_s, int(trace.prompt_tokens[request]))
            hits[request] = policy.hits[REAL]
            followed.use(request, keys, hits[request])
        too_many = int(policy.held_at(now_s)[0][REAL]) - room if is_over else 0
        followed.see(policy, now_s, policy.make_room(too_many, now_s) if is_over else ())
    told = [np.array(part) for part in zip(*(codes[request] for request in range(len(hits))))]
    ends = pd.DataFrame(ends, columns=["request", "seconds", "price", "index_in_force", "ttl_s"])
    return Watched(trace, hits, *told, ends, followed.life())


class _Followed:
    """The last chunk of a session's first prompt."""

    def __init__(self, trace, session):
        self.own, self.rows, self.depth = trace.sessions == session, [], None

    def use(self, request, keys, hit_blocks):
        if self.own[request] and len(keys) > (self.depth or 0):
            self.depth = len(keys) - 1 if self.depth is None else self.depth
            self.prompt, self.resident, self.hit = keys, True, float(hit_blocks > self.depth)

    def see(self, policy, now_s, gone):
        if self.depth is not None:
            self.resident = self.resident and self.prompt[self.depth] not in gone
            said, price = policy.ask_index(self.prompt, now_s), policy.prices()[0]
            said = said.value[self.depth], price, said.ttl_s[self.depth]
            self.rows.append((now_s, *said, self.resident, self.hit))
            self.hit = np.nan

    def life(self):
        """Return all rows until it is gone for good."""
        columns = ["seconds", "index", "price", "ttl_s", "resident", "hit"]
        life = pd.DataFrame(self.rows, columns=columns)
        life["seconds"] -= life["seconds"].min()
        return life.iloc[: int(np.flatnonzero(life["resident"]).max(initial=-1)) + 2]


def _events(trace):
    """Yield (request, whether it is its end, seconds, whether its own end does not come next)."""
    times_s = np.column_stack([trace.arrival_s, trace.arrival_s + trace.generation_s]).ravel()
    events = in_order_of_time(times_s)
    next_is_end = np.append(events[1:] == events[:-1] + 1, False) & (events % 2 == 0)
    yield from zip((events // 2).tolist(), events % 2, times_s[events].tolist(), ~next_is_end)


def _long_session(trace):
    spans = pd.Series(trace.arrival_s).groupby(trace.sessions).agg(["min", "max", "size"])
    inside = (spans["min"] > 0.25 * trace.span_s) & (spans["max"] < 0.8 * trace.span_s)
    inside &= spans["size"] <= 40
    return (spans[inside] if inside.any() else spans)["size"].idxmax()


def classes(trace: Trace) -> np.ndarray:
    """Return each request's class of use, (requests,): of `CLASSES`."""
    names = np.array(FINISH, object)[trace.finish]
    names[np.unique(trace.sessions, return_index=True)[1]] = "first turn"
    return names


def hazard_table(seen: Watched, since_s: float = 0.0, draws: int = 200, seed: int = 0):
    """Compare what was expected of each class of uses with what came.

    An example is a prompt's last chunk: its seconds from the generation's end to its next use,
    or to the end of the trace.

    Parameters
    ----------
    since_s : float
        Requests before this second do not count: until then little was learned.
    draws, seed : int
        Of the 95 % interval: a bootstrap over sessions.

    Returns
    -------
    pandas.DataFrame
        A row a class and age that has `LEAST_USES`: class, examples (of the class), from_s,
        uses (that came at this age), expected, counted, low, high (uses a second).
    """
    rng, names, tables = np.random.default_rng(seed), classes(seen.trace), []
    came, waited_s = _outcomes(seen.trace)
    parts = came, waited_s, waited_s * seen.hazards
    counts = (seen.trace.blocks > 0) & (seen.trace.arrival_s >= since_s)
    for name in CLASSES:
        some = counts & (names == name)
        sessions = seen.trace.sessions[some]
        sums = [pd.DataFrame(part[some]).groupby(sessions).sum().to_numpy() for part in parts]
        if not len(sessions):
            continue
        drawn = rng.multinomial(len(sums[0]), np.full(len(sums[0]), 1 / len(sums[0])), draws)
        rates = (drawn @ sums[0]) / np.maximum(drawn @ sums[1], 1e-9)  # (draws, BINS)
        uses, waited, expected = (part.sum(0) for part in sums)
        table = pd.DataFrame({"class": name, "examples": some.sum(), "from_s": EDGES_S})
        table["uses"] = uses.astype(int)
        table[["expected", "counted"]] = np.array([expected, uses]).T / waited.clip(1e-9)[:, None]
        table[["low", "high"]] = np.percentile(rates, [2.5, 97.5], axis=0).T
        tables.append(table[uses >= LEAST_USES])
    return pd.concat(tables, ignore_index=True)


def _outcomes(trace):
    """Return whether each request's last chunk came back at each age, and seconds of waiting."""
    flat = trace.without_tails(renumber=False)
    last = np.maximum(flat.offsets[1:] - 1, 0)
    after = next_accesses(flat.block_ids)[last]
    again = np.searchsorted(flat.offsets, after, side="right") - 1
    until_s = np.where(after < 0, trace.arrival_s.max(), trace.arrival_s[again])
    wait_s = (until_s - trace.arrival_s - trace.generation_s).clip(0.0)[:, None]
    ends_s = np.append(EDGES_S[1:], np.inf)
    came = (after >= 0)[:, None] & (wait_s >= EDGES_S) & (wait_s < ends_s)
    return came.astype(float), np.clip(wait_s - EDGES_S, 0.0, ends_s - EDGES_S)
