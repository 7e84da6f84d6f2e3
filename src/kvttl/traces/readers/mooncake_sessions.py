"""Mooncake's lines in the dialects of AIPerf and Dynamo: sessions, delays, what waits for what.

A line without a time of its own comes ``delay`` (and ``tool_wait_ms``) after the requests that
it waits for, or its session's last one, have ended. No file says when: `Source.output_rate` does.
"""

import math

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format, tools_told
from kvttl.traces.readers.mooncake import declares
from kvttl.traces.source import ORDER, TIME_UNITS, block_keys, label, lasted_s, records
from kvttl.traces.source import tokens as whole_tokens

_FIELDS = {"session_id", "delay", "delay_ms", "wait_for", "tool_wait_ms", "tool_events"}
_STARTS = {"timestamp", "created_time", *(f"timestamp_{unit}" for unit in TIME_UNITS)}
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
            if "delta" in f"{record.get('context_mode')}":
                raise ValueError(
                    f"context_mode must not be of deltas, got {record['context_mode']}"
                )
            keys = block_keys(record, "hash_ids", chained=False)
            record.setdefault("input_length", len(keys) * size)
            prompt = source.prompt(record, "input_length", keys, size, covered=True)
            output = whole_tokens(record, "output_length", 0)
            named = record.get("session_id")
            session = source.number(f"{named}" if named is not None else object())
            arrival_s, details = sessions.arrival(record, session)
            took_s = output / source.output_rate if source.output_rate else 0.0
            ended = 0 if details.tool == -1 else 1
            builder.add(keys, arrival_s, prompt, output, session, took_s, ended, details)
            builder.block_tokens = size
            sessions.over(record, session, arrival_s + took_s, keys)
    if sessions.alike == 0 < sessions.other:
        raise ValueError(f"{files[0]}, line 1: {_DELTAS}")
    return builder


class _Sessions:
    """When requests ended, and whether a session's prompts begin alike."""

    def __init__(self, source):
        self.source, self.ends_s, self.last_s, self.firsts = source, {}, {}, {}
        self.alike = self.other = 0

    def arrival(self, record, session):
        """Return a line's arrival and details."""
        by_order = self.source.time_unit == ORDER
        per_second = 1 if by_order else self.source.per_second(record, "ms")
        delay = "delay_ms" if "delay_ms" in record else "delay"
        delay_s, waited_s = (lasted_s(record, name, per_second) for name in (delay, "tool_wait_ms"))
        events = record.get("tool_events") or []
        marks = ("started_at_unix_ms", "ended_at_unix_ms")
        spans = ([lasted_s(event, mark) for event in events] for mark in marks)
        told = tools_told([label(event, "tool_class") for event in events], *spans)
        kind = 2 if waited_s > 0 else 0
        details = Details(kind, think_s=delay_s, model=label(record, "model"), **told)
        waits = [f"{request}" for request in record.get("wait_for") or []]
        if by_order or not waits and (_STARTS & record.keys() or session not in self.last_s):
            name = "created_time" if "created_time" in record else "timestamp"
            return self.source.seconds(record, name, "ms"), details
        if unknown := [request for request in waits if request not in self.ends_s]:
            raise ValueError(f"wait_for must name request_id of lines above, got {unknown[0]!r}")
        if not self.source.output_rate:
            raise ValueError(f"delays count from the end of requests{_RATE}")
        pause_s = sum(s for s in (delay_s, waited_s) if not math.isnan(s))
        ends_s = [self.ends_s[request] for request in waits] or [self.last_s[session]]
        return max(ends_s) + pause_s, details

    def over(self, record, session, end_s, keys):
        """Note that a request ends, and whether it begins as its session's first did."""
        if len(keys):
            alike = self.firsts.setdefault(session, keys[0]) == keys[0]
            self.alike += alike and session in self.last_s
            self.other += not alike
        self.last_s[session] = self.ends_s[f"{record.get('request_id')}"] = end_s


def _can_read(record):
    return "hash_ids" in record and bool(record.keys() & _FIELDS)


MOONCAKE_SESSIONS = Format(_read, _can_read, "wait_for")
