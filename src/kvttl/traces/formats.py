"""The formats of traces: a reader each, files to a `TraceBuilder`.

A bad line raises a ValueError that names file, line and reason, or is skipped
and counted; see `kvttl.traces.reading.read_trace`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvttl.traces.builder import TraceBuilder
from kvttl.traces.opening import head
from kvttl.traces.source import (
    ASK_SIZE,
    ORDER,
    Source,
    block_keys,
    hash_keys,
    number,
    parsed,
    records,
)
from kvttl.traces.source import tokens as whole_tokens
from kvttl.traces.weka import read_weka


def read_mooncake(files: Sequence[Path], source: Source) -> TraceBuilder:
    """Mooncake: ``timestamp`` (ms), ``input_length``, ``output_length``, chained ``hash_ids``.

    ``block_size`` (else 512) and ``time_unit`` count, in each line or in a first line of their own.
    """
    builder = TraceBuilder(512)
    for place, record in records(files, source):
        with source.place(place):
            size = source.block_size(record, 512)
            if not len(builder) and not record.keys() & {"hash_ids", "input_length", "timestamp"}:
                source.per_second(record, "ms")
                continue  # declarations for all lines
            if len(files) > 1 and record.get("hash_id_scope", "global") != "global":
                raise ValueError("hash_id_scope must be global in a folder; read one file alone")
            keys = block_keys(record, "hash_ids")
            prompt = source.prompt(record, "input_length", keys, size, covered=True)
            arrival_s = source.seconds(record, "timestamp", "ms")
            builder.add(keys, arrival_s, prompt, whole_tokens(record, "output_length", 0))
            builder.block_tokens = size
    return builder


def read_qwen(files: Sequence[Path], source: Source) -> TraceBuilder:
    """Qwen-Bailian: seconds, 16-token blocks whose ids are *not* chained, chats as sessions."""
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
            builder.add(keys, arrival_s, prompt, output, session)
            builder.block_tokens, chats[record["chat_id"]] = size, session
    return builder


def read_lmcache(files: Sequence[Path], source: Source) -> TraceBuilder:
    """LMCache's ``lookup_hashes_*.jsonl`` (``lmcache server --lookup-hash-log-dir``).

    Hashes are of complete chunks and chained; equal ones of two models differ here.
    """
    builder = TraceBuilder(256, shown=_hash_text)
    for place, record in records(files, source):
        with source.place(place):
            size = source.block_size(record, None, ("chunk_size",))
            keys = hash_keys(record, "chunk_hashes", source.number(record["model_name"]))
            prompt = source.prompt(record, "seq_len", keys, size)
            builder.add(keys, source.seconds(record, "timestamp"), prompt)
            builder.block_tokens = size
    return builder


_ENDS = dict.fromkeys(("tool_calls", "tool_use", "function_call"), 1)
_ENDS |= dict.fromkeys(("stop", "end_turn"), 2)  # of `trace.FINISH`


def read_decision_log(files: Sequence[Path], source: Source) -> TraceBuilder:
    """Read this kit's decision log, rotated or not: its generations, by their ``chunk_keys``.

    Where it says how they ended, they arrived ``generate_s`` before ``time_s``. Of requests that
    have named no session it is guessed.
    """
    size = source.block_tokens or _chunk_tokens(files)
    builder = TraceBuilder(size, shown=_hash_text)
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
            session = record.get("session")
            session = source.number((scope, session)) if session else -1
            told = whole_tokens(record, "output_tokens", 0), session, took_s, _ENDS.get(reason, 0)
            builder.add(keys, end_s - took_s, prompt, *told)
    return builder


def _hash_text(key):
    return f"0x...{key % 2**64:016x}"  # of the first model the end of what its log says


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


_OPTIONS = ("skip_bad", "block_tokens", "time_unit")
_OF_SESSIONS = (*_OPTIONS, "seed", "sessions_per_hour", "max_sessions", "subagent_times")


class Format(NamedTuple):
    """How a format is read, found, and which of `read_trace`'s options it depends on."""

    read: Callable[[Sequence[Path], Source], TraceBuilder]
    mark: str  # a key that its records have, and no record of a format above
    files: str = "*.jsonl"  # of a folder, gzipped or not
    options: tuple[str, ...] = _OPTIONS

    def files_of(self, path: Path) -> list[Path]:
        """Return the file, or a folder's files of this format, by name."""
        if not path.is_dir():
            return [path]
        found = in_folder(path, self.files)
        if not found and self.files == "*.jsonl":
            found = in_folder(path, "*.json")
        if self.mark == "requests":  # sessions one a line are no *.json
            found += [file for file in in_folder(path, "*.jsonl") if format_of(file) == "weka"]
        return found


def in_folder(path: Path, pattern: str) -> list[Path]:
    """Return a folder's files, gzipped or not, by name."""
    return sorted([*path.glob(pattern), *path.glob(f"{pattern}.gz")])


def format_of(path: Path) -> str | None:
    """Return the name in `FORMATS` that fits what a file begins with.

    Raises
    ------
    ValueError
        Says what the file is where it is no text.
    """
    lines, _ = head(path)
    for line in lines:
        try:
            keys = parsed(line).keys()
        except (ValueError, RecursionError):
            continue
        if name := next((name for name, format in FORMATS.items() if format.mark in keys), None):
            return name
    text = b"".join(lines)  # a session over many lines, lines that are long or cut
    marks = sorted(FORMATS.items(), key=lambda item: item[0] != "weka")
    marked = (name for name, format in marks if f'"{format.mark}"'.encode() in text)
    return next(marked, None) if text.startswith(b"{") else None


FORMATS = {
    "qwen": Format(read_qwen, "chat_id"),
    "mooncake": Format(read_mooncake, "hash_ids"),
    "lmcache": Format(read_lmcache, "chunk_hashes", "lookup_hashes_*.jsonl"),
    "decisions": Format(read_decision_log, "prompt_digest"),
    "weka": Format(read_weka, "requests", "*.json", _OF_SESSIONS),
}
