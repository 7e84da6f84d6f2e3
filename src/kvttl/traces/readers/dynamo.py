"""Dynamo's request traces: ``request_end`` with the hashes of its prompt, and ``tool_end``."""

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format, hash_text, tools_told
from kvttl.traces.source import hash_keys, label, lasted_s, records
from kvttl.traces.source import tokens as whole_tokens
from kvttl.traces.trace import FINISH_CODES

_TOOLS = ("tool_end", "tool_error")


def _read(files, source):
    """Hashes are chained, and of one model's blocks; a trajectory is a session."""
    builder, calls = TraceBuilder(64, shown=hash_text), {}
    for place, line in records(files, source):
        with source.place(place):
            event = line.get("event", line)
            who = event.get("agent_context") or {}
            named = who.get("trajectory_id") or who.get("session_id")
            session = source.number(f"{named}" if named else object())
            if event["event_type"] == "request_end":
                _add(builder, source, event, session)
                calls[session] = len(builder) - 1, []
            elif event["event_type"] in _TOOLS and session in calls:
                request, tools = calls[session]
                tools.append(event["tool"])
                marks = ("started_at_unix_ms", "ended_at_unix_ms")
                spans = ([lasted_s(tool, mark) for tool in tools] for mark in marks)
                names = [label(tool, "tool_class") for tool in tools]
                builder.tell(request, **tools_told(names, *spans))
    return builder


def _add(builder, source, event, session):
    request = event["request"]
    if "replay" not in request:
        raise ValueError("replay is missing: the trace was made without replay hashes")
    told, model = request["replay"], label(request, "model")
    size = source.block_size(told, None, ("trace_block_size",))
    keys = hash_keys(told, "input_sequence_hashes", source.number(model))
    prompt = source.prompt(told, "input_length", keys, size, covered=True)
    end_s = lasted_s(event, "event_time_unix_ms")
    received = request.get("request_received_ms")  # 0 where it was not measured
    arrival_s = lasted_s(request, "request_received_ms") if received else end_s
    if not arrival_s <= end_s:
        raise ValueError(f"request_received_ms must be before event_time_unix_ms, got {arrival_s}")
    ended = request.get("finish_reason_metadata") or {}
    names = [label(call, "name") for call in ended.get("tool_calls") or []]
    details = Details(model=model, **tools_told(names))
    output, finish = whole_tokens(request, "output_tokens", 0), ended.get("finish_reason")
    more = session, end_s - arrival_s, FINISH_CODES.get(finish, 0), details
    builder.add(keys, arrival_s, prompt, output, *more)
    builder.block_tokens = size


def _can_read(record):
    event = record.get("event", record)
    return isinstance(event, dict) and {"event_type", "event_time_unix_ms"} <= event.keys()


DYNAMO = Format(_read, _can_read, "event_time_unix_ms")
