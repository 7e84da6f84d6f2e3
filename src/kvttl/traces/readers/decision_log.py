"""This kit's decision log, rotated or not: its generations, by their ``chunk_keys``."""

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.readers.base import Format, hash_text
from kvttl.traces.source import ASK_SIZE, ORDER, Source, hash_keys, label, number, records
from kvttl.traces.source import tokens as whole_tokens
from kvttl.traces.trace import FINISH_CODES


def _read(files, source):
    """Where a log says how generations ended, they arrived ``generate_s`` before ``time_s``.

    Of requests that have named no session it is guessed.
    """
    size = source.block_tokens or _chunk_tokens(files)
    builder = TraceBuilder(size, shown=hash_text)
    for place, record in records(files, source):
        with source.place(place):
            if record.get("kind", "generation") != "generation":
                continue
            if not record.get("chunk_keys") and record.get("chunks"):
                raise ValueError("chunk_keys is missing: an older log cannot be replayed")
            scope = source.number(record.get("cache_salt") or "")  # a tenant's KV is its own
            keys = hash_keys(record, "chunk_keys", scope) if record.get("chunk_keys") else ()
            prompt = source.prompt(record, "prompt_tokens", keys, size)
            end_s, reason = source.seconds(record, "time_s"), record.get("finish_reason")
            known = reason and source.time_unit != ORDER
            took_s = number(record, "generate_s", 0, 0.0) if known else 0.0
            session, ended = record.get("session"), FINISH_CODES.get(reason, 0)
            session = source.number((scope, session)) if session else -1
            told = whole_tokens(record, "output_tokens", 0), session, took_s, ended
            details = Details(tenant=label(record, "cache_salt"))
            builder.add(keys, end_s - took_s, prompt, *told, details)
    return builder


def _chunk_tokens(files):
    """Return the chunk size that fits all usable records: chunks = prompt_tokens // size."""
    low, high = 1, 2**31
    quiet = Source(skip_bad=True)
    for place, record in records(files, quiet):
        with quiet.place(place):
            keys = record.get("chunk_keys") or []
            count = quiet.prompt(record, "prompt_tokens", keys, 1)
            if keys:
                low = max(low, count // (len(keys) + 1) + 1)
                high = min(high, count // len(keys))
    if high == 2**31:
        return 256  # LMCache's default; no record has a chunk
    power = 1 << (max(high, 1).bit_length() - 1)  # the largest power of two <= high
    if low <= power <= high or low == high:
        return power if low <= power else high
    none = "no one chunk size fits all records"
    found = none if low > high else f"{low} to {high} tokens as chunk sizes fit"
    raise ValueError(f"{files[0]}, line 1: {found}; give block_tokens{ASK_SIZE}")


DECISIONS = Format(_read, lambda record: "prompt_digest" in record, "prompt_digest")
