"""GitHub Copilot coding agents 2026: a session a line, its turns' calls and batches of tools.

It has no block ids. A call keeps the first ``cached`` tokens of the call before it in its
session to the same model and the rest is new: no policy can hit what the provider's cache had
lost, nor what two sessions share.
"""

import math

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format, MintedIds, ids_of, tools_told
from kvttl.traces.source import label, lasted_s, records, text
from kvttl.traces.source import tokens as whole_tokens

_INITIATORS = {"user": 1, "agent": 2}  # -> into TURN_KINDS


def _read(files, source):
    """A session with a bad call is bad; 64 tokens a block, unless told otherwise."""
    size = source.block_tokens or 64
    builder, minted = TraceBuilder(size), MintedIds()
    for place, record in records(files, source):
        with source.place(place):
            last = {}
            for model, (kept, *told) in list(_calls(record, source)):
                arrival_s, prompt, output, *more = told
                last[model] = minted.prompt(last.get(model, ()), kept // size, prompt // size)
                session = source.number(text(record, "session_id"))
                builder.add(ids_of(last[model]), arrival_s, prompt, output, session, *more)
    return builder


def _calls(record, source):
    """Yield (model, (tokens kept, arrival, prompt, output, seconds, finish, details))."""
    over_s = math.nan
    for turn in record["turns"]:
        batches = turn.get("tool_batches") or []
        for call in turn["llm_calls"]:
            arrival_s, took_s = source.seconds(call, "timestamp"), lasted_s(call, "duration_ms")
            took_s = 0.0 if math.isnan(took_s) else took_s
            kind = _INITIATORS.get(call.get("initiator_type"), 0)
            thought_s = max(arrival_s - over_s, 0.0) if kind == 1 else math.nan  # NaN stays
            over_s, name = arrival_s + took_s, call.get("message_id")
            tools = _tools([b for b in batches if b.get("request_id") == name], source)
            details = Details(kind, think_s=thought_s, model=label(call, "model"), **tools)
            more = took_s, 2 if details.tool == -1 else 1, details
            kept, prompt, output = _tokens(call["tokens"])
            yield details.model, (kept, arrival_s, prompt, output, *more)


def _tokens(counts):
    names = "cached", "prompt", "completion"
    kept, prompt, output = (whole_tokens(counts, name) for name in names)
    if kept > prompt:
        raise ValueError(f"cached must be at most the prompt's {prompt} tokens, got {kept}")
    return kept, prompt, output


def _tools(batches, source):
    calls = [call for batch in batches for call in batch.get("function_calls") or []]
    lasting = [batch for batch in batches if batch.get("duration_ms") is not None]
    starts_s = [source.seconds(batch, "timestamp") for batch in lasting]
    ends_s = [at + lasted_s(batch, "duration_ms") for at, batch in zip(starts_s, lasting)]
    return tools_told([label(call, "name") for call in calls], starts_s, ends_s)


COPILOT = Format(_read, lambda record: {"session_id", "turns"} <= record.keys(), "llm_calls")
