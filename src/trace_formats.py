"""The formats of traces, one reader each: a file or folder to a `TraceBuilder`.

A bad line raises a ValueError that names file, line and reason, or is skipped
and counted; see `trace_readers.read_trace`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trace_builder import TraceBuilder

SESSIONS_PER_HOUR = 30.0  # of agentic sessions that are overlaid, unless told otherwise
_LOWEST_KEY = -(2**63)


@dataclass
class Source:
    """What a reader needs while it reads: its options, and what it has skipped."""

    skip_bad: bool = False
    progress: bool = False
    seed: int = 0
    sessions_per_hour: float = SESSIONS_PER_HOUR
    max_sessions: int | None = None
    block_tokens: int | None = None
    skipped: int = 0
    names: dict[Any, int] = field(default_factory=dict)  # sessions and models -> number

    def number(self, name: Any) -> int:
        return self.names.setdefault(name, len(self.names))

    @contextmanager
    def place(self, path: Path, line: int):
        """Turn an error inside into one that names file and line, or count it."""
        try:
            yield
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
            if not self.skip_bad:
                raise ValueError(f"{path}, line {line}: {_reason(error)}") from error
            self.skipped += 1


@contextmanager
def open_text(path: str | Path) -> Iterator[io.TextIOBase]:
    """Open a text file, gzipped or not (by its first bytes, whatever its name)."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if zipped else raw as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8")


def _lines(path, source):
    """Yield (line number, record) of a JSON-lines file; bad JSON is a bad line."""
    with open_text(path) as file, progress(source, os.path.getsize(path), path.name) as bar:
        for number, line in enumerate(_decoded(file, path), start=1):
            bar(len(line))
            if line.strip():
                record = None
                with source.place(path, number):
                    record = _record(line)
                if record is not None:
                    yield number, record


def _record(line):
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {line.strip()[:40]!r}")
    return record


def _decoded(file, path):
    """Yield lines; what is not text, or a gzip file cut short, is an error with its line."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline()
        except (EOFError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not line:
            return
        yield line


@contextmanager
def progress(source, total, name, unit="B"):
    """Give a function that counts bytes or files, or does nothing; shown after a second only."""
    if not source.progress:
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit=unit, unit_scale=True, delay=1) as bar:
        yield bar.update


def _reason(error):
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _number(record, name, lowest=0.0, default=None):
    """Return a finite number >= `lowest` of a record."""
    value = record[name] if default is None else record.get(name, default)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not lowest <= value < math.inf:
        allowed = "finite" if lowest == -math.inf else f">= {lowest:g} and finite"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return value


def _tokens(record, name, default=None):
    value = _number(record, name, 0, default)
    if value != int(value) or value >= 2**31:
        raise ValueError(f"{name} must be a whole number of tokens < 2147483648, got {value!r}")
    return int(value)


def _keys(record, name):
    """Return the list of integer block ids of a record as int64."""
    values = record[name]
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of integers, got {values!r:.60}")
    if not values:
        return np.empty(0, np.int64)
    keys = np.array(values)
    if keys.dtype.kind not in "iu" or keys.ndim != 1:
        raise ValueError(f"{name} must be a list of integers, got {values!r:.60}")
    return keys.astype(np.int64)  # ids beyond int64 wrap: they are names, not numbers


def _hash_key(value):
    """Return a 64-bit key of a hash: hexadecimal text, other text, or an integer."""
    if isinstance(value, str):
        if value.startswith("0x"):
            value = int(value, 16)
        else:
            digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
            value = int.from_bytes(digest, "little")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a chunk hash must be text or an integer, got {value!r}")
    return (value + 2**63) % 2**64 + _LOWEST_KEY


def _hash_keys(record, name, scope=0):
    """Return the 64-bit keys of a record's hashes, kept apart by `scope` (0, 1, ...)."""
    values = record[name]
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of hashes, got {values!r:.60}")
    keys = np.array([_hash_key(value) for value in values], np.int64)
    return keys ^ np.int64((scope * 0x9E3779B97F4A7C15 + 2**63) % 2**64 + _LOWEST_KEY)


def _check_blocks(keys, prompt_tokens, block_tokens):
    """Raise where a prompt cannot have so many blocks."""
    most = -(-prompt_tokens // block_tokens)
    if len(keys) > most:
        raise ValueError(
            f"{len(keys)} blocks of {block_tokens} tokens are more than {prompt_tokens} tokens need"
        )


def read_mooncake(path: Path, source: Source) -> TraceBuilder:
    """Mooncake: ``timestamp`` (ms), ``input_length``, ``output_length``, chained ``hash_ids``."""
    builder = TraceBuilder(source.block_tokens or 512)
    for line, record in _lines(path, source):
        with source.place(path, line):
            keys = _keys(record, "hash_ids")
            prompt = _tokens(record, "input_length")
            _check_blocks(keys, prompt, builder.block_tokens)
            arrival_s = _number(record, "timestamp", -math.inf) / 1000.0
            builder.add(keys, arrival_s, prompt, _tokens(record, "output_length", 0))
    return builder


def read_qwen(path: Path, source: Source) -> TraceBuilder:
    """Qwen-Bailian: seconds, 16-token blocks whose ids are *not* chained, chats as sessions."""
    builder = TraceBuilder(source.block_tokens or 16, chained=False)
    chats: dict[int, int] = {}  # chat -> session: its first chat's number
    for line, record in _lines(path, source):
        with source.place(path, line):
            keys = _keys(record, "hash_ids")
            prompt = _tokens(record, "input_length")
            _check_blocks(keys, prompt, builder.block_tokens)
            arrival_s = _number(record, "timestamp", -math.inf)
            output = _tokens(record, "output_length", 0)
            parent = _number(record, "parent_chat_id", -math.inf, -1)
            session = chats.get(parent, source.number(record["chat_id"]))
            chats[record["chat_id"]] = session
            builder.add(keys, arrival_s, prompt, output, session)
    return builder


def read_lmcache(path: Path, source: Source) -> TraceBuilder:
    """LMCache's ``lookup_hashes_*.jsonl`` (``lmcache server --lookup-hash-log-dir``).

    Hashes are of complete chunks and chained; equal ones of two models differ here.
    """
    files = [path] if path.is_file() else sorted(path.glob("lookup_hashes_*.jsonl*"))
    builder = None
    for file in files:
        for line, record in _lines(file, source):
            with source.place(file, line):
                chunk = _tokens(record, "chunk_size")
                builder = builder or TraceBuilder(source.block_tokens or chunk)
                if chunk != builder.block_tokens:
                    raise ValueError(f"chunk_size must be {builder.block_tokens}, got {chunk}")
                keys = _hash_keys(record, "chunk_hashes", source.number(record["model_name"]))
                prompt = _tokens(record, "seq_len")
                _check_blocks(keys, prompt, chunk)
                builder.add(keys, _number(record, "timestamp", -math.inf), prompt)
    return builder or TraceBuilder(source.block_tokens or 256)


def read_decisions(path: Path, source: Source) -> TraceBuilder:
    """Read this kit's decision log: its generations, by their chained ``chunk_keys``."""
    builder = TraceBuilder(source.block_tokens or _chunk_tokens(path, source))
    for line, record in _lines(path, source):
        with source.place(path, line):
            if record.get("kind", "generation") != "generation":
                continue
            if not record.get("chunk_keys") and record.get("chunks"):
                raise ValueError("chunk_keys is missing: an older log cannot be replayed")
            keys = _hash_keys(record, "chunk_keys") if record.get("chunk_keys") else ()
            prompt = _tokens(record, "prompt_tokens")
            _check_blocks(keys, prompt, builder.block_tokens)
            builder.add(keys, _number(record, "time_s", -math.inf), prompt)
    return builder


def _chunk_tokens(path, source):
    """Return the chunk size that fits all records: chunks = prompt_tokens // size."""
    low, high = 1, 2**31
    quiet = Source(skip_bad=True)
    for _, record in _lines(path, quiet):
        tokens, chunks = record.get("prompt_tokens"), len(record.get("chunk_keys") or ())
        if chunks and isinstance(tokens, int):
            low, high = max(low, tokens // (chunks + 1) + 1), min(high, tokens // chunks)
    if high == 2**31:
        return 256  # LMCache's default; no record has a chunk
    if low > high:
        raise ValueError(f"{path}, line 1: no one chunk size fits all records; give block_tokens")
    power = 1 << (high.bit_length() - 1)  # the largest power of two <= high
    return power if power >= low else high


def read_weka(path: Path, source: Source) -> TraceBuilder:
    """Agentic sessions, a file each; overlaid, sub-agents inside their session.

    Ids are local to a file and a model. The tail of a prompt has no id.
    """
    files = [path] if path.is_file() else _session_files(path)
    rng = np.random.default_rng(source.seed)
    if len(files) > 1:
        files = [files[i] for i in rng.permutation(len(files))][: source.max_sessions]
    starts_s = np.cumsum(rng.exponential(3600.0 / source.sessions_per_hour, len(files)))
    builder = None
    with progress(source, len(files), "reading", " sessions") as bar:
        for session, (file, start_s) in enumerate(zip(files, starts_s)):
            with source.place(file, 1):
                builder = _add_session(file, session, float(start_s), source, builder)
            bar(1)
    return builder or TraceBuilder(source.block_tokens or 64)


def _session_files(folder):
    files = sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")])
    if not files:
        raise ValueError(f"{folder}, line 1: no .json or .json.gz file in this folder")
    return files


def _add_session(file, session, start_s, source, builder):
    with open_text(file) as text:
        content = json.load(text)
    if not isinstance(content, dict) or not isinstance(content.get("requests"), list):
        raise ValueError("a session must be a JSON object with a list of requests")
    size = _tokens(content, "block_size")
    builder = builder or TraceBuilder(source.block_tokens or size)
    if size != builder.block_tokens:
        raise ValueError(f"block_size must be {builder.block_tokens}, got {size}")
    for number, (at_s, request) in enumerate(_flat(content["requests"], start_s), start=1):
        try:
            _add_agent_request(builder, request, at_s, session, source)
        except (ValueError, KeyError, TypeError) as error:
            if not source.skip_bad:
                raise ValueError(f"request {number}: {_reason(error)}") from error
            source.skipped += 1
    return builder


def _flat(requests, start_s):
    """Yield (seconds, request) with sub-agents' requests in place; their clocks start anew."""
    for request in requests:
        at_s = start_s + _number(request, "t")
        if "requests" in request:
            yield from _flat(request["requests"], at_s)
        else:
            yield at_s, request


def _add_agent_request(builder, request, at_s, session, source):
    keys, prompt = _keys(request, "hash_ids"), _tokens(request, "in")
    if len(keys) and not 0 <= keys.min() <= keys.max() < 2**32:
        raise ValueError(f"hash_ids must be 0..4294967295, got {keys.min()}..{keys.max()}")
    _check_blocks(keys, prompt, builder.block_tokens)
    scope = source.number((session, request.get("model")))
    builder.add(keys | (scope << 32), at_s, prompt, _tokens(request, "out", 0), session)


FORMATS: dict[str, Callable[[Path, Source], TraceBuilder]] = {
    "mooncake": read_mooncake,
    "weka": read_weka,
    "qwen": read_qwen,
    "lmcache": read_lmcache,
    "decisions": read_decisions,
}
