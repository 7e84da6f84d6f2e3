"""LMCache's ``lookup_hashes_*.jsonl`` (``lmcache server --lookup-hash-log-dir``)."""

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format, hash_text
from kvttl.traces.source import hash_keys, label, records


def _read(files, source):
    """Hashes are of complete chunks and chained; equal ones of two models differ here."""
    builder = TraceBuilder(256, shown=hash_text)
    for place, record in records(files, source):
        with source.place(place):
            size = source.block_size(record, None, ("chunk_size",))
            keys = hash_keys(record, "chunk_hashes", source.number(record["model_name"]))
            prompt = source.prompt(record, "seq_len", keys, size)
            details = Details(model=label(record, "model_name"))
            builder.add(keys, source.seconds(record, "timestamp"), prompt, details=details)
            builder.block_tokens = size
    return builder


LOOKUPS = Format(
    _read, lambda record: "chunk_hashes" in record, "chunk_hashes", "lookup_hashes_*.jsonl"
)
