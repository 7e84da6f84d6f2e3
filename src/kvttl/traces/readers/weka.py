"""WEKA's agentic sessions, one a file or one a line, overlaid as a fleet's load."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvttl.traces.builder import DenseIds, Details, TraceBuilder
from kvttl.traces.opening import head, session_lines, text_lines, whole
from kvttl.traces.readers.base import OF_SESSIONS, Format
from kvttl.traces.source import (
    SUBAGENT_TIMES,
    Source,
    bar,
    block_keys,
    in_time,
    label,
    number,
    parsed,
)
from kvttl.traces.source import tokens as whole_tokens
from kvttl.traces.trace import FINISH_CODES

SCOPES = ("local", "global")


def _read(files: Sequence[Path], source: Source) -> TraceBuilder:
    """Read sessions, overlaid, sub-agents inside their session.

    Ids are local to a session and a model, or, where ``hash_id_scope`` is
    "global", to a model. The tail of a prompt has no id. Sub-agents' ``t`` are
    from their session's start (AgentX) or from their marker (kv-cache-tester):
    one convention holds for all sessions, and is found from them.
    """
    rng = np.random.default_rng(source.seed)
    counts = {file: _sessions_in(file) for file in files}
    units = [(file, row) for file in files for row in range(counts[file])]
    chosen = list(range(len(units)))
    if len(units) > 1:
        chosen = [int(i) for i in rng.permutation(len(units))][: source.max_sessions]
    starts_s = np.cumsum(rng.exponential(3600.0 / source.sessions_per_hour, len(chosen)))
    turns = {units[unit]: turn for turn, unit in enumerate(chosen)}
    sessions = _Sessions(source)
    with bar(source, len(turns), "reading", " sessions") as shown:
        for file in dict.fromkeys(file for file, _ in turns):
            for row, place, content in _contents(file, counts[file], source):
                if (turn := turns.get((file, row))) is not None:
                    with source.place(place):
                        sessions.add(parsed(content), turn, float(starts_s[turn]))
                    shown.update()
    return sessions.finish(counts if len(turns) < len(units) else {})


def _sessions_in(file):
    """Return how many sessions a file holds: its lines, if the first is a whole one."""
    try:
        lines, complete = head(file)
        if not lines or (len(lines) > 1 and not lines[0].rstrip().endswith(b"}")):
            return 1  # over many lines, or none at all
        if complete:
            return len(lines)
        quiet = Source(skip_bad=True)  # what it counts is long, not bad
        return sum(1 for _ in text_lines(file, quiet, limit=1 << 20)) + quiet.skipped
    except (ValueError, OSError):
        return 1  # which is an error when it is read


def _contents(file, count, source) -> Iterator[tuple[int, str, bytes | bytearray]]:
    """Yield (row, place, content) of the sessions of a file."""
    if count == 1:
        content, place = None, f"{file}, line 1"
        with source.place(place):
            content = whole(file)
        if content is not None:
            yield 0, place, content
        return
    for row, (line, content) in enumerate(session_lines(file, source)):
        yield row, f"{file}, line {line}", content


@dataclass
class _Sessions:
    """What was read of the sessions so far, by both conventions of sub-agents' times."""

    source: Source
    raw: DenseIds = field(default_factory=DenseIds)  # 64-bit ids, to have room for the scope
    relative_s: array = field(default_factory=lambda: array("d"))
    found: set[str] = field(default_factory=set)  # conventions that a sub-agent shows

    def __post_init__(self):
        size = self.source.block_tokens or 64
        self.builder = TraceBuilder(size, shown=lambda key: self.raw.key(key & 0xFFFFFFFF))

    def add(self, content, session, start_s):
        if not isinstance(content.get("requests"), list):
            raise ValueError("a session must be a JSON object with a list of requests")
        size = self.source.block_size(content, None)
        per_second = self.source.per_second(content, "s")
        scope = content.get("hash_id_scope", "local")
        if scope not in SCOPES:
            raise ValueError(f"hash_id_scope must be one of {', '.join(SCOPES)}, got {scope!r:.60}")
        owner = session if scope == "local" else None
        found = set()
        requests = list(_flat(content["requests"], start_s, start_s, per_second, found))
        self.builder.block_tokens = size
        for place, (absolute_s, relative_s, request) in enumerate(requests, start=1):
            with self.source.place(f"request {place}"):
                self._add_request(request, owner, session, absolute_s, size)
                self.relative_s.append(relative_s)
        self.found |= found

    def _add_request(self, request, owner, session, at_s, size):
        keys = block_keys(request, "hash_ids")
        prompt = self.source.prompt(request, "in", keys, size, covered=True)
        output = whole_tokens(request, "out", 0)
        scope = self.source.number((owner, request.get("model")))
        keys = self.raw.ids(keys).astype(np.int64) | (scope << 32)
        took_s, thought_s = (_hint_s(request.get(name)) for name in ("api_time", "think_time"))
        ended = FINISH_CODES.get(str(request.get("stop")), 0)
        came = request.get("input_types")
        kind = 2 if came == ["tool_result"] else 1 if came else 0
        said = {"model": label(request, "model"), "request_type": label(request, "type")}
        details = Details(kind, think_s=thought_s, **said)
        took_s = 0.0 if np.isnan(took_s) else took_s
        self.builder.add(keys, at_s, prompt, output, session, took_s, ended, details)

    def finish(self, counts):
        """Return the builder, its times by the convention that holds, if need be in all files."""
        told = self.source.subagent_times
        for file in counts if self.found == {"unclear"} and not told else ():
            quiet = Source(skip_bad=True)
            for _, place, content in _contents(file, counts[file], quiet):
                with quiet.place(place):
                    list(_flat(parsed(content)["requests"], 0.0, 0.0, 1, self.found))
        shown = self.found - {"unclear"}
        if not told and (len(shown) > 1 or self.found == {"unclear"}):
            problem = "disagree" if shown else "may be from the session's start or from the marker"
            ask = f"say which: --subagent-times, SUBAGENT_TIMES= {' or '.join(SUBAGENT_TIMES)}"
            raise ValueError(f"the times (t) of sub-agents {problem}; {ask}")
        if "relative" in (told, *(() if told else shown)):
            self.builder.set_arrivals(self.relative_s)
        return self.builder


def _hint_s(value):
    """Return a hint's seconds: what is no time is unknown."""
    return value if type(value) in (int, float) and 0 <= value < 1e9 else np.nan


def _flat(requests, absolute_s, relative_s, per_second, found):
    """Yield (seconds by either convention, request), sub-agents' requests in their places.

    `absolute_s` is where the session's clock starts, `relative_s` where this sub-agent's does.
    """
    for request in requests:
        if not isinstance(request, dict):
            raise ValueError(f"a request must be a JSON object, got {request!r:.40}")
        at_s = in_time("t", number(request, "t") / per_second)
        if "requests" in request:
            nested = request["requests"]
            if shown := _convention(at_s, nested, request.get("duration_ms"), per_second):
                found.add(shown)
            yield from _flat(nested, absolute_s, relative_s + at_s, per_second, found)
        else:
            yield absolute_s + at_s, relative_s + at_s, request


def _convention(marker_s, nested, duration_ms, per_second):
    """Return what a sub-agent's times show: a convention, "unclear", or None: both are one.

    None begins before its marker. Counted from the marker, the first request is at 0 (in all
    published sessions), and none is later than the sub-agent took.
    """
    if not isinstance(nested, list) or not all(isinstance(request, dict) for request in nested):
        raise ValueError(f"requests must be a list of JSON objects, got {nested!r:.40}")
    times_s = [number(request, "t") / per_second for request in nested]
    if not times_s or not marker_s:
        return None
    if min(times_s) < marker_s:
        return "relative"
    close = min(times_s) - marker_s <= min(1.0, marker_s / 10)
    took_s = duration_ms / 1000 if isinstance(duration_ms, (int, float)) else np.inf
    fits = max(times_s) > took_s + 1.0 >= max(times_s) - marker_s
    return "absolute" if close or fits else "unclear"


WEKA = Format(_read, lambda record: "requests" in record, "requests", "*.json", OF_SESSIONS)
