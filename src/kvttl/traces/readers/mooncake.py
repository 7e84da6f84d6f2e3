"""Mooncake: ``timestamp`` (ms), ``input_length``, ``output_length``, chained ``hash_ids``."""

from kvttl.traces.builder import TraceBuilder
from kvttl.traces.readers.base import Format
from kvttl.traces.source import block_keys, records
from kvttl.traces.source import tokens as whole_tokens


def declares(record: dict) -> bool:
    """Return whether a first line is no request: it declares what holds for all lines."""
    return not record.keys() & {"hash_ids", "input_length", "timestamp"}


def _read(files, source):
    """``block_size`` (else 512) and ``time_unit`` count, in each line or in a first line."""
    builder = TraceBuilder(512)
    for place, record in records(files, source):
        with source.place(place):
            size = source.block_size(record, 512)
            if not len(builder) and declares(record):
                source.per_second(record, "ms")
                continue
            if len(files) > 1 and record.get("hash_id_scope", "global") != "global":
                raise ValueError("hash_id_scope must be global in a folder; read one file alone")
            keys = block_keys(record, "hash_ids")
            prompt = source.prompt(record, "input_length", keys, size, covered=True)
            arrival_s = source.seconds(record, "timestamp", "ms")
            builder.add(keys, arrival_s, prompt, whole_tokens(record, "output_length", 0))
            builder.block_tokens = size
    return builder


MOONCAKE = Format(_read, lambda record: "hash_ids" in record, "hash_ids")
