"""LMCache's recorded calls (``lmcache server --trace-level storage``), files that hold LMCT."""

import itertools

import msgspec

from kvttl.traces.builder import Details, TraceBuilder
from kvttl.traces.opening import LINE_LIMIT
from kvttl.traces.readers.base import Format, hash_text
from kvttl.traces.source import ASK_SIZE, hash_keys, label

MAGIC, _VERSION = b"LMCT", 1
_LOOKUP = "StorageManager.submit_prefetch_task"
_EVENTS = "a trace of level {!r} says what was stored and read, not which request asked for it;"
_EVENTS += " record --trace-level storage, or --lookup-hash-log-dir"


def _read(files, source):
    """A look-up is a request; chunks are complete, and those of two models differ.

    Of several groups of layers, or ranks, the first tells: all have the same chunks.
    """
    if source.block_tokens is None:
        raise ValueError(f"{files[0]}, line 1: tokens of a chunk are not said{ASK_SIZE}")
    builder = TraceBuilder(source.block_tokens, shown=hash_text)
    for path in files:
        for number, frame in _frames(path):
            with source.place(f"{path}, line {number}"):
                record = msgspec.msgpack.decode(frame)
                if number == 1:
                    _check(record)
                elif record["qualname"].endswith(_LOOKUP):
                    _add(builder, source, record)
    return builder


def _frames(path):
    """Yield (number, content) of frames: four bytes of length, and so many of content."""
    with open(path, "rb") as file:
        for number in itertools.count(1):
            if not (size := file.read(4)):
                return
            length = int.from_bytes(size, "big")
            frame = file.read(length) if length <= LINE_LIMIT else b""
            if len(size) < 4 or len(frame) < length:
                raise ValueError(f"{path}, line {number}: damaged: a record is cut short")
            yield number, frame


def _check(header):
    if header["magic"] != MAGIC or header["format_version"] != _VERSION:
        raise ValueError(f"format_version must be {_VERSION}, got {header['format_version']!r}")
    if header["level"] != "storage":
        raise ValueError(_EVENTS.format(header["level"]))


def _add(builder, source, record):
    spec = record["args"]["spec"]["v"]
    if spec["lock_mode"]["v"] == "NO_LOCK":
        return  # a warm-up, which nobody reads
    chunks = [key["v"] for key in spec["key_groups"][0]["v"]["keys"]]
    model = label(chunks[0], "model_name") if chunks else -1
    hashes = {"chunk_hash": [f"0x{chunk['chunk_hash'].hex()}" for chunk in chunks]}
    keys = hash_keys(hashes, "chunk_hash", source.number(model))
    prompt, details = len(chunks) * builder.block_tokens, Details(model=model)
    builder.add(keys, source.seconds(record, "t_wall"), prompt, details=details)


LMCT = Format(_read, lambda record: False, "LMCT", "*.lct")
