"""Qwen-Bailian: seconds, 16-token blocks whose ids are *not* chained, chats as sessions."""

import math

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format
from kvttl.traces.source import block_keys, label, number, records
from kvttl.traces.source import tokens as whole_tokens


def _read(files, source):
    builder = TraceBuilder(16, chained=False)
    chats: dict[int, int] = {}  # chat -> session: its first chat's number
    for place, record in records(files, source):
        with source.place(place):
            size = source.block_size(record, 16)
            keys = block_keys(record, "hash_ids", chained=False)
            prompt = source.prompt(record, "input_length", keys, size, covered=True)
            arrival_s = source.seconds(record, "timestamp")
            output = whole_tokens(record, "output_length", 0)
            parent = number(record, "parent_chat_id", -math.inf, -1)
            session = chats.get(parent, source.number(record["chat_id"]))
            details = Details(request_type=label(record, "type"))
            builder.add(keys, arrival_s, prompt, output, session, details=details)
            builder.block_tokens, chats[record["chat_id"]] = size, session
    return builder


QWEN = Format(_read, lambda record: "chat_id" in record, "chat_id")
