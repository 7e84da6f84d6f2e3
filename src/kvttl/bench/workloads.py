"""Prompts for `make bench`: traces scaled to a small model's context, with text of its own.

A trace knows which prompts share how long a prefix, not their text. Here each
session gets text of one kind, and a prompt that shares a prefix in the trace
shares the same share of its tokens: perplexity, hits and TTFT are then real.
"""

import os
import random
from collections import deque
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby, islice

import numpy as np

from kvttl import user_path
from kvttl.session.demo_model import load_tokenizer, prompt_perplexity
from kvttl.session.texts import CODE_PROMPT, TEMPLATE_LINE, random_characters, shuffled_prose
from kvttl.traces.builder import TraceBuilder, make_trace
from kvttl.traces.generator import agent_loops
from kvttl.traces.reading import read_trace
from kvttl.traces.trace import Trace

CHUNK_TOKENS = 32  # as in config.yaml
LONGEST_PROMPT = 1_900  # tokens; the engine takes 2,048 with its answer
AT_ONCE = 4  # clients of the workload "pressure"
_SCORED_TOKENS = 512  # of a prompt, for its perplexity
_TAIL = 24  # tokens that a prompt has at most beyond its last chunk: no answer completes it
_KINDS = ("code", "prose", "template", "noise")
_KIND_SHARES = (0.5, 0.25, 0.2, 0.05)


@dataclass(frozen=True)
class BenchRequest:
    """One request: seconds since the start, session, kind of text, prompt token ids."""

    arrival_s: float
    session: int
    kind: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, and where they come from.

    Parameters
    ----------
    name : str
        One of `WORKLOADS`.
    source : str
        What was scaled or generated.
    requests : tuple of BenchRequest
        The requests.
    token_scale : tuple of float
        Smallest and largest factor that prompt lengths were multiplied by.
    """

    name: str
    source: str
    requests: tuple[BenchRequest, ...]
    token_scale: tuple[float, float] = (1.0, 1.0)

    @property
    def turns(self) -> list[list[int]]:
        """Return the requests that are served at once: one, under pressure those of one time."""
        numbers = range(len(self.requests))
        if self.name != "pressure":
            return [[number] for number in numbers]
        return [[*some] for _, some in groupby(numbers, lambda n: self.requests[n].arrival_s)]

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Token ids of every request."""
        return [request.tokens for request in self.requests]

    @cached_property
    def trace(self) -> Trace:
        """The requests as a `Trace` of complete chunks, for the replay engines."""
        builder = TraceBuilder(CHUNK_TOKENS, chained=False)
        for request in self.requests:
            tokens, size = request.tokens, CHUNK_TOKENS
            starts = range(0, len(tokens) - size + 1, size)
            keys = [hash(tokens[at : at + size]) for at in starts]  # equal in every process
            builder.add(keys, request.arrival_s, len(tokens), session=request.session)
        return builder.finish(self.name)

    @property
    def working_set_tokens(self) -> int:
        """Tokens of all distinct chunks: what an unlimited cache would hold."""
        return self.trace.unique_blocks * CHUNK_TOKENS


def make_workload(name: str, seed: int, requests: int, model: str) -> Workload:
    """Return a seeded workload.

    Parameters
    ----------
    name : str
        ``"agentic"``: sessions of the trace folder ``weka-agentic`` in
        ``KV_TRACE_DIR``, or generated agent loops without one. ``"chat"``: short
        generated conversations under a few system prompts. ``"control"``: no
        prompt shares anything with another. ``"mix"``: tenants of these three kinds,
        five, three and two tenths of the requests. ``"pressure"``: ``"agentic"`` by
        several clients at once.
    seed : int
        Equal seeds give equal workloads.
    requests : int
        Requests, >= 1.
    model : str
        Folder of the model whose tokenizer makes the text.

    Examples
    --------
    >>> from kvttl.session.demo_model import model_path
    >>> control = make_workload("control", 0, 3, model_path())
    >>> len(control.requests), control.trace.unique_blocks == control.trace.accesses
    (3, True)
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload must be one of {', '.join(WORKLOADS)}, got {name!r}")
    if requests < 1:
        raise ValueError(f"requests must be >= 1, got {requests}")
    made = [(*WORKLOADS[kind](seed, count), kind) for kind, count in _parts(name, requests)]
    parts = [_with_text(trace, f"{kind} {seed}", model, cut) for trace, _, cut, kind in made]
    low, high = zip(*(scale for _, scale in parts))
    # A session's number is one tenant's: the others count on.
    served = [
        replace(each, session=each.session * len(parts) + tenant)
        for tenant, (some, _) in enumerate(parts)
        for each in some
    ]
    served.sort(key=lambda request: request.arrival_s)
    served = _at_once(served) if name == "pressure" else served
    source = "; ".join(source for _, source, _, _ in made)
    return Workload(name, source, tuple(served), (min(low), max(high)))


def _at_once(requests):
    """Return requests of several clients at once: each has a session, then the next one."""
    sessions: dict[int, deque[BenchRequest]] = {}
    for request in requests:
        sessions.setdefault(request.session, deque()).append(request)
    waiting, clients, now_s = deque(sessions.values()), [], 0.0
    made: list[BenchRequest] = []
    while waiting or clients:
        free = min(AT_ONCE - len(clients), len(waiting))
        clients += [waiting.popleft() for _ in range(free)]
        turn = [client.popleft() for client in clients]
        now_s = max(now_s + 1.0, *(request.arrival_s for request in turn))
        made += [replace(request, arrival_s=now_s) for request in turn]
        clients = [client for client in clients if client]
    return made


def _parts(name, requests):
    """Return the tenants of a workload: of what kind, and with how many requests."""
    if name != "mix":
        return [(name, requests)]
    shares = {"chat": round(0.3 * requests), "control": round(0.2 * requests)}
    counts = {"agentic": requests - sum(shares.values()), **shares}
    return [(kind, count) for kind, count in counts.items() if count]


@lru_cache(maxsize=1_000)
def perplexity_of(tokens: tuple[int, ...]) -> float:
    """Return the demo model's perplexity of a prompt's beginning: the benchmark's knows nothing."""
    return prompt_perplexity(list(tokens), max_tokens=_SCORED_TOKENS)


def _agentic(seed, requests):
    """Return sessions of real agents where a trace is there, with their real think times."""
    folder = user_path(os.environ.get("KV_TRACE_DIR") or ".") / "weka-agentic"
    if not folder.is_dir():
        shape = {"system_blocks": 80, "turn_blocks": 5.0, "turns": 6.0}
        trace = agent_loops(requests, seed, block_tokens=64, **shape)
        return trace, f"generated agent loops, seed {seed}", True
    count = -(-requests // _TURNS)
    options = {"sessions_per_hour": _SESSIONS_PER_HOUR, "max_sessions": 2 * count}
    trace = read_trace(folder, "weka", seed=seed, **options)
    return _first_turns(trace, count, requests), "WEKA agentic coding sessions", True


_TURNS = 4  # requests taken of each session
_SESSIONS_PER_HOUR = 90.0


def _first_turns(trace, sessions, requests):
    """Return the first requests of the first sessions that have enough of them."""
    order = [np.flatnonzero(trace.sessions == s)[:_TURNS] for s in np.unique(trace.sessions)]
    long = sorted((rows for rows in order if len(rows) == _TURNS), key=lambda rows: rows[0])
    rows = np.sort(np.concatenate(long[:sessions]))[:requests]
    blocks, size = [trace.request(row) for row in rows], trace.block_tokens
    columns = trace.arrival_s[rows], trace.prompt_tokens[rows], size, trace.sessions[rows]
    return make_trace(blocks, *columns)


def _chat(seed, requests):
    shape = {"agents": 4, "system_blocks": 8, "turn_blocks": 24.0, "turns": 2.2}
    pace = {"pause_s": 40.0, "sessions_per_hour": _SESSIONS_PER_HOUR}
    trace = agent_loops(requests, seed, block_tokens=CHUNK_TOKENS, **shape, **pace)
    return trace, f"generated conversations, seed {seed}", False


def _control(seed, requests):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 58, requests)
    starts = np.cumsum(sizes) - sizes
    blocks = [range(start, start + size) for start, size in zip(starts, sizes)]
    arrival_s = np.cumsum(rng.exponential(30.0, requests))
    trace = make_trace(blocks, arrival_s, block_tokens=CHUNK_TOKENS, sessions=range(requests))
    return trace, f"generated, no prompt twice, seed {seed}", False


WORKLOADS = {"agentic": _agentic, "chat": _chat, "control": _control}
WORKLOADS |= {"pressure": _agentic, "mix": None}


# ---- text ------------------------------------------------------------------------


def _with_text(trace, seed, model, scaled):
    """Return the requests of a trace with tokens, and the lowest and highest scale."""
    rng = random.Random(seed)
    kinds = {s: rng.choices(_KINDS, _KIND_SHARES)[0] for s in np.unique(trace.sessions).tolist()}
    scales = {s: _scale(trace, s) if scaled else 1.0 for s in kinds}
    streams = {s: _stream(model, kind, rng.getrandbits(32)) for s, kind in kinds.items()}
    owner: dict[int, int] = {}  # block -> the last request that has it
    made: list[BenchRequest] = []
    for row in range(trace.requests):
        session, blocks = int(trace.sessions[row]), trace.request(row).tolist()
        length = _length(int(trace.prompt_tokens[row]) * scales[session])
        known = next((n for n, block in enumerate(blocks) if block not in owner), len(blocks))
        shared = ()
        if known:
            prefix = int(known * trace.block_tokens * scales[session])
            shared = made[owner[blocks[known - 1]]].tokens[: min(prefix, length)]
        tokens = (*shared, *islice(streams[session], length - len(shared)))
        owner.update(dict.fromkeys(blocks, row))
        made.append(BenchRequest(float(trace.arrival_s[row]), session, kinds[session], tokens))
    return tuple(made), (min(scales.values()), max(scales.values()))


def _scale(trace, session):
    longest = int(trace.prompt_tokens[trace.sessions == session].max())
    return min(1.0, LONGEST_PROMPT / longest)


def _length(tokens):
    """Return whole tokens within the context, not so many that an answer completes a chunk."""
    tokens = int(min(max(tokens, CHUNK_TOKENS), LONGEST_PROMPT))
    tokens -= max(0, tokens % CHUNK_TOKENS - _TAIL)
    return tokens + (tokens % CHUNK_TOKENS == 0)  # an engine computes the last token itself


def _stream(model, kind, seed):
    """Yield endless tokens of one kind of text; seeded, so that no two sessions share any."""
    encode, rng = load_tokenizer(model).encode, random.Random(seed)
    text = f"# session {rng.getrandbits(32):x}\n"
    while True:
        yield from encode(text, add_special_tokens=False)
        text = _TEXTS[kind](rng)


_TEXTS = {
    "code": lambda rng: CODE_PROMPT.replace("Limiter", f"Worker{rng.randrange(1000)}"),
    "prose": shuffled_prose,
    "template": lambda rng: f"Report {rng.randrange(1000)}. {TEMPLATE_LINE}" * 4,
    "noise": lambda rng: random_characters(400, rng.getrandbits(32)),
}
