"""kvcache-simulator's: ``block_size``, ``hash_ids``, ``input_length``, replayed as they stand."""

from kvttl.traces.builder import TraceBuilder
from kvttl.traces.readers.base import Format
from kvttl.traces.source import ORDER, block_keys, records
from kvttl.traces.source import tokens as whole_tokens

_FIELDS = {"block_size", "hash_ids", "input_length"}


def _read(files, source):
    """A ``timestamp`` would count for nothing, as it does there: lines are in order."""
    builder, source.time_unit = TraceBuilder(1, chained=False), ORDER
    for place, record in records(files, source):
        with source.place(place):
            size = source.block_size(record, None, ("block_size",))
            keys = block_keys(record, "hash_ids", chained=False)
            weights = record.get("block_tokens") or [size] * len(keys)
            if len(weights) != len(keys) or set(weights[:-1]) - {size}:
                raise ValueError(f"block_tokens must be {size} for all blocks but the last")
            prompt = source.prompt(record, "input_length", keys, size, covered=True)
            output = whole_tokens(record, "output_length", 0)
            builder.add(keys, source.seconds(record, ""), prompt, output)
            builder.block_tokens = size
    return builder


def _can_read(record):
    return record.keys() - {"output_length", "block_tokens"} == _FIELDS


KVCACHE_SIMULATOR = Format(_read, _can_read, "block_size")
