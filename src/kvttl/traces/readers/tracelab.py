"""TraceLab: a round a line, with what the provider's cache held of it, its tools and events.

It has no block ids. A round keeps the first ``prefix_tokens`` of the round before it in its
session and the rest is new: no policy can hit what the provider's cache had lost, nor what
two sessions share.
"""

import math

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format, MintedIds, ids_of, tools_told
from kvttl.traces.source import label, records, text
from kvttl.traces.source import tokens as whole_tokens

_INPUTS = {"user_message": 1, "tool_result": 2}  # -> into TURN_KINDS
_STREAM = ("project", "session_file", "session_id")  # which alone is not unique
_COUNTS = ("input_tokens_total", "prefix_tokens", "newly_append_tokens")


def _read(files, source):
    """Rounds of a session stand in its order; 64 tokens a block, unless told otherwise."""
    size = source.block_tokens or 64
    builder, minted, last = TraceBuilder(size), MintedIds(), {}
    for place, record in records(files, source):
        with source.place(place):
            text(record, "session_id")
            session = source.number(tuple(f"{record.get(name)}" for name in _STREAM))
            index, end_s, runs = last.get(session, (0, math.nan, []))
            total, kept = _prompt(record, index)
            arrival_s, over_s, details = _round(record, source, end_s)
            runs = minted.prompt(runs, kept // size, total // size)
            output = whole_tokens(record, "output_tokens", 0)
            told = output, session, over_s - arrival_s, 2 if details.tool == -1 else 1, details
            builder.add(ids_of(runs), arrival_s, total, *told)
            last[session] = record["round_index"], over_s, runs
    return builder


def _prompt(record, index):
    total, kept, new = (whole_tokens(record, name) for name in _COUNTS)
    if total != kept + new:
        wanted = "input_tokens_total must be prefix_tokens + newly_append_tokens"
        raise ValueError(f"{wanted}, got {total} and {kept} + {new}")
    if whole_tokens(record, "round_index") < index:
        raise ValueError(f"round_index must not fall, got {record['round_index']} after {index}")
    return total, kept


def _round(record, source, before_s):
    """Return when a round was sent (its last input), when its last event was, and `Details`."""
    events = [(e["event_type"], source.seconds(e, "timestamp")) for e in record["timing_events"]]
    if not events:
        raise ValueError("timing_events must hold an event, got none")
    times_s = [at_s for _, at_s in events]
    arrival_s = max((at_s for name, at_s in events if name in _INPUTS), default=min(times_s))
    kind = _INPUTS.get(record.get("first_input_event_type"), 0)
    thought_s = max(arrival_s - before_s, 0.0) if kind == 1 else math.nan  # NaN stays
    tools = record.get("tools") or []
    spans = [t for t in tools if t.get("emitted_at") and t.get("result_at")]
    ways = ([source.seconds(t, name) for t in spans] for name in ("emitted_at", "result_at"))
    told = tools_told([label(tool, "tool_name") for tool in tools], *ways)
    said = {"model": label(record, "model"), "tenant": label(record, "user")}
    return arrival_s, max(times_s), Details(kind, think_s=thought_s, **told, **said)


TRACELAB = Format(_read, lambda record: "newly_append_tokens" in record, "newly_append_tokens")
