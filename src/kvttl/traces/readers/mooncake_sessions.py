"""Mooncake's lines in the dialects of AIPerf and Dynamo: sessions, delays, what waits for what.

A line without a time of its own comes ``delay`` (and ``tool_wait_ms``) after the requests that
it waits for, or its session's last one, have ended. No file says when: `Source.output_rate` does.
"""

import math

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format, tools_told
from kvttl.traces.readers.mooncake import declares
from kvttl.traces.source import ORDER, block_keys, label, lasted_s, records
from kvttl.traces.source import tokens as whole_tokens

_FIELDS = {"session_id", "delay", "delay_ms", "wait_for", "tool_wait_ms", "tool_events"}
_STARTS = ("timestamp", "created_time", "timestamp_ms", "timestamp_us", "timestamp_s")
_RATE = "; say how many tokens of output are made in a second: --output-rate, OUTPUT_RATE="
_DELTAS = "later lines of a session begin with other ids than those before: they may hold only"
_DELTAS += " what is new; whole prompts are wanted"


def _read(files, source):
    """Ids need not be chained; 512 tokens a block and ms, unless a line says otherwise."""
    builder, sessions = TraceBuilder(512, chained=False), _Sessions(source)
    for place, record in records(files, source):
        with source.place(place):
            size = source.block_size(record, 512)
            if not len(builder) and declares(record):
                source.per_second(record, "ms")
                continue
            keys = block_keys(record, "hash_ids", chained=False)
            record.setdefault("input_length", len(keys) * size)
            prompt = source.prompt(record, "input_length", keys, size, covered=True)
            output = whole_tokens(record, "output_length", 0)
            session, arrival_s, details = sessions.place(record)
            took_s = output / source.output_rate if source.output_rate else 0.0
            finish = 0 if details.tool == -1 else 1
            builder.add(keys, arrival_s, prompt, output, session, took_s, finish, details)
            builder.block_tokens = size
            sessions.over(record, session, arrival_s + took_s, keys)
    if sessions.alike == 0 < sessions.other:
        raise ValueError(f"{files[0]}, line 1: {_DELTAS}")
    return builder


class _Sessions:
    """When requests ended, and whether a session's prompts begin alike."""

    def __init__(self, source):
        self.source, self.ends_s, self.last, self.firsts = source, {}, {}, {}
        self.alike = self.other = 0

    def place(self, record):
        """Return a line's session, arrival and details."""
        if "delta" in f"{record.get('context_mode')}":
            raise ValueError(f"context_mode must be of whole prompts, got {record['context_mode']}")
        named = record.get("session_id")
        session = self.source.number(f"{named}" if named is not None else object())
        per_second = self.source.per_second(record, "ms") if self.source.time_unit != ORDER else 1
        delay_s, waited_s = (
            lasted_s(record, name, per_second)
            for name in ("delay_ms" if "delay_ms" in record else "delay", "tool_wait_ms")
        )
        pause_s = sum(s for s in (delay_s, waited_s) if not math.isnan(s))
        events = record.get("tool_events") or []
        marks = ("started_at_unix_ms", "ended_at_unix_ms")
        spans = ([lasted_s(event, mark) for event in events] for mark in marks)
        told = tools_told([label(event, "tool_class") for event in events], *spans)
        kind = 2 if waited_s > 0 else 0
        details = Details(kind, think_s=delay_s, model=label(record, "model"), **told)
        return session, self._arrival_s(record, session, pause_s), details

    def _arrival_s(self, record, session, pause_s):
        name = "created_time" if "created_time" in record else "timestamp"
        waits = record.get("wait_for") or []
        timed = self.source.time_unit == ORDER or any(mark in record for mark in _STARTS)
        if not waits and (timed or session not in self.last):
            return self.source.seconds(record, name, "ms")
        if unknown := [request for request in waits if request not in self.ends_s]:
            raise ValueError(f"wait_for must name request_id of lines above, got {unknown[0]!r}")
        if not self.source.output_rate:
            raise ValueError(f"delays count from the end of requests{_RATE}")
        ends_s = [self.ends_s[request] for request in waits] or [self.last[session]]
        return max(ends_s) + pause_s

    def over(self, record, session, end_s, keys):
        """Note that a request ends, and its first id."""
        if (first := self.firsts.get(session)) is not None and len(keys):
            self.alike, self.other = (
                self.alike + (keys[0] == first),
                self.other + (keys[0] != first),
            )
        if len(keys):
            self.firsts[session] = keys[0]
        self.last[session] = end_s
        if record.get("request_id") is not None:
            self.ends_s[record["request_id"]] = end_s


def _can_read(record):
    return "hash_ids" in record and bool(record.keys() & _FIELDS)


MOONCAKE_SESSIONS = Format(_read, _can_read, "wait_for")
