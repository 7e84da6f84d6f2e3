"""ServeGen's offline batches: 16-token blocks, the kind of request, no times."""

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format
from kvttl.traces.source import ORDER, block_keys, label, records

_OTHERS = {"timestamp", "session_id", "delay", "wait_for", "chat_id"}


def _read(files, source):
    """Whole jobs that were submitted at once: lines are in the job's order."""
    builder, source.time_unit = TraceBuilder(16, chained=False), ORDER
    for place, record in records(files, source):
        with source.place(place):
            size = source.block_size(record, 16)
            keys = block_keys(record, "hash_ids", chained=False)
            prompt = source.prompt(record, "input_length", keys, size, covered=True)
            details = Details(request_type=label(record, "type"))
            builder.add(keys, source.seconds(record, ""), prompt, details=details)
            builder.block_tokens = size
    return builder


def _can_read(record):
    return {"request_id", "type", "hash_ids"} <= record.keys() and not record.keys() & _OTHERS


SERVEGEN = Format(_read, _can_read, "img_ids")
