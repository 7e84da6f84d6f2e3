"""The formats of traces, one reader each: files to a `TraceBuilder`.

A bad line raises a ValueError that names file, line and reason, or is skipped
and counted; see `kvttl.traces.reading.read_trace`.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from kvttl.traces.builder import TraceBuilder

SESSIONS_PER_HOUR = 30.0  # of agentic sessions that are overlaid, unless told otherwise
LINE_LIMIT = 64 << 20  # bytes
SESSION_LIMIT = 1 << 30  # bytes of a session's file, decompressed
_LOWEST_KEY = -(2**63)
_DAMAGE = (EOFError, OSError, zlib.error)  # of a file that cannot be read to its end
_BAD = (ValueError, TypeError, KeyError, OverflowError, AttributeError, RecursionError, *_DAMAGE)


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
    def place(self, where: str):
        """Turn an error inside into one that says where it was, or count it."""
        try:
            yield
        except _BAD as error:
            if not self.skip_bad:
                missing = isinstance(error, KeyError)
                reason = f"{error.args[0]!r} is missing" if missing else error
                raise ValueError(f"{where}: {reason}") from error
            self.skipped += 1


@contextmanager
def open_bytes(path: str | Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file, gzipped or not (by its first bytes, whatever its name).

    Gives its content and the file itself, whose ``tell`` says how much of it was read.
    """
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if zipped else raw as stream:
            yield stream, raw


def _lines(files, source):
    """Yield (file and line, record) of JSON-lines files; bad JSON is a bad line."""
    for path in files:
        with _bar(source, os.path.getsize(path), path.name) as bar:
            for number, line in text_lines(path, source, bar):
                with source.place(place := f"{path}, line {number}"):
                    yield place, _record(line)


def text_lines(path: Path, source: Source, bar=lambda size: None) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of a file, without blank lines; `bar` gets the bytes read.

    A line that is too long is a bad line. What is damaged is an error, also
    where bad lines are skipped: nothing after it can be read.
    """
    with open_bytes(path) as (file, raw):
        seen = 0
        for number in itertools.count(1):
            line = _line(file, LINE_LIMIT + 1, path, number)
            if not line:
                return
            bar(raw.tell() - seen)
            seen = raw.tell()
            if len(line) > LINE_LIMIT and not line.endswith(b"\n"):
                with source.place(f"{path}, line {number}"):
                    raise ValueError(f"line longer than {LINE_LIMIT >> 20} MiB")
                while line and not line.endswith(b"\n"):
                    line = _line(file, LINE_LIMIT, path, number)
            elif line.strip():
                yield number, line


def _line(file, limit, path, number):
    try:
        return file.readline(limit)
    except _DAMAGE as error:
        raise ValueError(f"{path}, line {number}: damaged: {error}") from error


def _record(line):
    record = json.loads(text := line.decode())
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {text.strip()[:40]!r}")
    return record


@contextmanager
def _bar(source, total, name, unit="B"):
    """Give a function that counts bytes or files, or does nothing; shown after a second only."""
    if not source.progress:
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit=unit, unit_scale=True, delay=1) as bar:
        yield bar.update


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


def _keys(record, name, chained=True):
    """Return the list of integer block ids of a record as int64; chained ones differ."""
    values = record[name]
    if not isinstance(values, list) or set(map(type, values)) - {int}:  # true is not 1
        raise ValueError(f"{name} must be a list of integers, got {values!r:.60}")
    keys = np.array(values) if values else np.empty(0, np.int64)
    if keys.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a list of 64-bit integers, got {values!r:.60}")
    if chained and len(set(values)) < len(values):
        twice = Counter(values).most_common(1)[0][0]
        raise ValueError(f"{name} must not name a block twice in one request, got {twice} again")
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


def _hash_text(key):
    return f"0x...{key % 2**64:016x}"  # of the first model the end of what its log says


def _prompt(record, name, keys, block_tokens):
    """Return the tokens of a prompt; raise where it cannot have so many blocks."""
    tokens = _tokens(record, name)
    if len(keys) > -(-tokens // block_tokens):
        blocks = f"{len(keys)} blocks of {block_tokens} tokens"
        raise ValueError(f"{blocks} are more than {tokens} tokens need")
    return tokens


def read_mooncake(files: Sequence[Path], source: Source) -> TraceBuilder:
    """Mooncake: ``timestamp`` (ms), ``input_length``, ``output_length``, chained ``hash_ids``."""
    builder = TraceBuilder(source.block_tokens or 512)
    for place, record in _lines(files, source):
        with source.place(place):
            keys = _keys(record, "hash_ids")
            prompt = _prompt(record, "input_length", keys, builder.block_tokens)
            arrival_s = _number(record, "timestamp", -math.inf) / 1000.0
            builder.add(keys, arrival_s, prompt, _tokens(record, "output_length", 0))
    return builder


def read_qwen(files: Sequence[Path], source: Source) -> TraceBuilder:
    """Qwen-Bailian: seconds, 16-token blocks whose ids are *not* chained, chats as sessions."""
    builder = TraceBuilder(source.block_tokens or 16, chained=False)
    chats: dict[int, int] = {}  # chat -> session: its first chat's number
    for place, record in _lines(files, source):
        with source.place(place):
            keys = _keys(record, "hash_ids", chained=False)
            prompt = _prompt(record, "input_length", keys, builder.block_tokens)
            arrival_s = _number(record, "timestamp", -math.inf)
            output = _tokens(record, "output_length", 0)
            parent = _number(record, "parent_chat_id", -math.inf, -1)
            session = chats.get(parent, source.number(record["chat_id"]))
            builder.add(keys, arrival_s, prompt, output, session)
            chats[record["chat_id"]] = session
    return builder


def read_lmcache(files: Sequence[Path], source: Source) -> TraceBuilder:
    """LMCache's ``lookup_hashes_*.jsonl`` (``lmcache server --lookup-hash-log-dir``).

    Hashes are of complete chunks and chained; equal ones of two models differ here.
    """
    builder = None
    for place, record in _lines(files, source):
        with source.place(place):
            chunk = _tokens(record, "chunk_size")
            size = builder.block_tokens if builder else source.block_tokens or chunk
            if chunk != size or not chunk:
                raise ValueError(f"chunk_size must be {size or '>= 1'}, got {chunk}")
            keys = _hash_keys(record, "chunk_hashes", source.number(record["model_name"]))
            prompt = _prompt(record, "seq_len", keys, chunk)
            arrival_s = float(_number(record, "timestamp", -math.inf))
            builder = builder or TraceBuilder(size, shown=_hash_text)
            builder.add(keys, arrival_s, prompt)
    return builder or TraceBuilder(source.block_tokens or 256)


def read_decision_log(files: Sequence[Path], source: Source) -> TraceBuilder:
    """Read this kit's decision log, rotated or not: its generations, by their ``chunk_keys``."""
    builder = TraceBuilder(source.block_tokens or _chunk_tokens(files), shown=_hash_text)
    for place, record in _lines(files, source):
        with source.place(place):
            if record.get("kind", "generation") != "generation":
                continue
            if not record.get("chunk_keys") and record.get("chunks"):
                raise ValueError("chunk_keys is missing: an older log cannot be replayed")
            keys = _hash_keys(record, "chunk_keys") if record.get("chunk_keys") else ()
            prompt = _prompt(record, "prompt_tokens", keys, builder.block_tokens)
            builder.add(keys, _number(record, "time_s", -math.inf), prompt)
    return builder


def _chunk_tokens(files):
    """Return the chunk size that fits all usable records: chunks = prompt_tokens // size."""
    low, high = 1, 2**31
    quiet = Source(skip_bad=True)
    for place, record in _lines(files, quiet):
        with quiet.place(place):
            keys = record.get("chunk_keys") or []
            tokens = _prompt(record, "prompt_tokens", keys, 1)
            if keys:
                low = max(low, tokens // (len(keys) + 1) + 1)
                high = min(high, tokens // len(keys))
    if high == 2**31:
        return 256  # LMCache's default; no record has a chunk
    if low > high:
        reason = "no one chunk size fits all records; give block_tokens"
        raise ValueError(f"{files[0]}, line 1: {reason}")
    power = 1 << (high.bit_length() - 1)  # the largest power of two <= high
    return power if power >= low else high


def read_weka(files: Sequence[Path], source: Source) -> TraceBuilder:
    """Agentic sessions, a file each; overlaid, sub-agents inside their session.

    Ids are local to a file and a model. The tail of a prompt has no id.
    """
    rng = np.random.default_rng(source.seed)
    if len(files) > 1:
        files = [files[i] for i in rng.permutation(len(files))][: source.max_sessions]
    starts_s = np.cumsum(rng.exponential(3600.0 / source.sessions_per_hour, len(files)))
    builder = None
    with _bar(source, len(files), "reading", " sessions") as bar:
        for session, (file, start_s) in enumerate(zip(files, starts_s)):
            with source.place(f"{file}, line 1"):
                builder = _add_session(file, session, float(start_s), source, builder)
            bar(1)
    return builder or TraceBuilder(source.block_tokens or 64)


def _add_session(file, session, start_s, source, builder):
    content = json.loads(_whole(file).decode())
    if not isinstance(content, dict) or not isinstance(content.get("requests"), list):
        raise ValueError("a session must be a JSON object with a list of requests")
    size, requests = _tokens(content, "block_size"), list(_flat(content["requests"], start_s))
    builder = builder or TraceBuilder(source.block_tokens or size, shown=_local_id)
    if size != builder.block_tokens:
        raise ValueError(f"block_size must be {builder.block_tokens}, got {size}")
    for number, (at_s, request) in enumerate(requests, start=1):
        with source.place(f"request {number}"):
            _add_agent_request(builder, request, at_s, session, source)
    return builder


def _whole(file):
    """Return a file's content, decompressed; read in pieces, as its size is not known."""
    content = bytearray()
    with open_bytes(file) as (stream, _):
        while piece := stream.read(1 << 20):
            content += piece
            if len(content) > SESSION_LIMIT:
                raise ValueError(f"session larger than {SESSION_LIMIT >> 20} MiB decompressed")
    return content


def _local_id(key):
    return key & 0xFFFFFFFF


def _flat(requests, start_s):
    """Yield (seconds, request) with sub-agents' requests in place; their clocks start anew."""
    for request in requests:
        at_s = start_s + _number(request, "t")
        if "requests" in request:
            yield from _flat(request["requests"], at_s)
        else:
            yield at_s, request


def _add_agent_request(builder, request, at_s, session, source):
    keys = _keys(request, "hash_ids")
    if len(keys) and not 0 <= keys.min() <= keys.max() < 2**32:
        raise ValueError(f"hash_ids must be 0..4294967295, got {keys.min()}..{keys.max()}")
    prompt = _prompt(request, "in", keys, builder.block_tokens)
    scope = source.number((session, request.get("model")))
    builder.add(keys | (scope << 32), at_s, prompt, _tokens(request, "out", 0), session)


class Format(NamedTuple):
    """How a format is read, found, and which of `read_trace`'s options it depends on."""

    read: Callable[[Sequence[Path], Source], TraceBuilder]
    mark: str | None  # a key that its first record has, and no record of a format above
    files: str = "*.jsonl"  # of a folder, gzipped or not
    options: tuple[str, ...] = ("skip_bad", "block_tokens")

    def files_of(self, path: Path) -> list[Path]:
        """Return the file, or a folder's files of this format, by name."""
        if not path.is_dir():
            return [path]
        return sorted([*path.glob(self.files), *path.glob(f"{self.files}.gz")])


_OVERLAID = ("skip_bad", "block_tokens", "seed", "sessions_per_hour", "max_sessions")

FORMATS = {
    "qwen": Format(read_qwen, "chat_id"),
    "mooncake": Format(read_mooncake, "hash_ids"),
    "lmcache": Format(read_lmcache, "chunk_hashes", "lookup_hashes_*.jsonl"),
    "decisions": Format(read_decision_log, "prompt_digest"),
    "weka": Format(read_weka, None, "*.json", _OVERLAID),
}
