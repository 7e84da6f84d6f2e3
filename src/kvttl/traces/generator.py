"""Seeded traces of agent loops: shared system prompts, turns that extend a prompt, pauses."""

import math

import numpy as np

from kvttl.traces.builder import TraceBuilder
from kvttl.traces.trace import Trace

SAMPLE = {"requests": 600, "seed": 7, "block_tokens": 512, "system_blocks": 12, "turn_blocks": 2.0}


def agent_loops(
    requests: int,
    seed: int = 0,
    *,
    block_tokens: int = 64,
    agents: int = 6,
    system_blocks: int = 24,
    turn_blocks: float = 4.0,
    turns: float = 12.0,
    pause_s: float = 10.0,
    sessions_per_hour: float = 120.0,
    tool_share: float | None = None,
) -> Trace:
    """Generate sessions in which an agent's prompt grows turn by turn.

    Parameters
    ----------
    requests : int
        Requests in all, >= 1.
    seed : int
        Equal seeds give equal traces.
    block_tokens : int
        Tokens in a block.
    agents, system_blocks : int
        Kinds of agents; each kind's sessions share a system prompt of so many blocks.
    turn_blocks, turns : float
        Mean blocks that a turn adds (geometric) and mean turns of a session.
    pause_s : float
        Median seconds between a session's requests (log-normal, sigma 1.5: the
        published agentic sessions have median 10 s and 90 % under 168 s).
    sessions_per_hour : float
        Rate of new sessions (exponential gaps).
    tool_share : float, optional
        Share of requests that end with a tool call pending, a session's last one aside; after
        the others a person takes twelve times as long. Default: nobody says.

    Examples
    --------
    >>> trace = agent_loops(100, seed=1)
    >>> trace.requests, trace.unique_blocks < trace.accesses
    (100, True)
    """
    _check_all(locals())
    rng = np.random.default_rng(seed)
    builder = TraceBuilder(block_tokens)
    start_s, session, next_key = 0.0, 0, agents * system_blocks
    while len(builder) < requests:
        start_s += float(rng.exponential(3600.0 / sessions_per_hour))
        wanted = min(int(rng.geometric(1 / turns)), requests - len(builder))
        first = int(rng.integers(agents)) * system_blocks
        added = rng.geometric(1 / turn_blocks, wanted)  # blocks, shape (turns,)
        own = np.arange(next_key, next_key + added.sum())
        prompt = np.concatenate([np.arange(first, first + system_blocks), own])
        next_key += len(own)
        finish, slower = _ends(rng, wanted, tool_share)
        at_s = start_s + np.cumsum(slower * rng.lognormal(math.log(pause_s), 1.5, wanted))
        for time_s, blocks, end in zip(at_s, system_blocks + np.cumsum(added), finish.tolist()):
            _add_turn(builder, rng, prompt[:blocks], float(time_s), session, end)
        session += 1
    return builder.finish(f"agent_loops({requests}, seed={seed})")


def _ends(rng, requests, tool_share):
    """Return how a session's requests end, and by how much longer the pause before each is."""
    if tool_share is None:
        return np.zeros(requests, int), 1.0
    if not 0 <= tool_share <= 1:
        raise ValueError(f"tool_share must be None or 0..1, got {tool_share!r}")
    finish = np.where(rng.random(requests) < tool_share, 1, 2)  # of `FINISH`
    finish[-1] = 2
    return finish, np.append(1.0, np.where(finish[:-1] == 1, 1.0, 12.0))


def _add_turn(builder, rng, keys, time_s, session, finish):
    size = builder.block_tokens
    missing = int(rng.integers(0, size)) if rng.random() < 0.5 else 0
    tokens = len(keys) * size + missing  # half of the prompts have a tail without an id
    output_tokens = int(rng.integers(1, 4 * size))
    builder.add(keys, time_s, tokens, output_tokens, session, finish=finish)


def _check_all(given):
    for name in ("requests", "block_tokens", "agents", "system_blocks", "turn_blocks", "turns"):
        _check(name, given[name], 1)
    for name in ("pause_s", "sessions_per_hour"):
        _check(name, given[name], math.nextafter(0.0, 1.0))


def _check(name, value, lowest):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not lowest <= value < math.inf:
        raise ValueError(f"{name} must be >= {lowest:g} and finite, got {value!r}")
