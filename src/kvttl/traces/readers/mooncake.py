"""Mooncake: ``timestamp`` (ms), ``input_length``, ``output_length``, chained ``hash_ids``."""

from typing import Annotated

import msgspec
import numpy as np
from numba import njit

from kvttl.traces.builder import TraceBuilder
from kvttl.traces.readers.base import Format
from kvttl.traces.source import LATEST_S, TIME_UNITS, batches, block_keys, records_of
from kvttl.traces.source import tokens as whole_tokens

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Plain(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The plainest line, as nearly all are; it declares nothing."""

    timestamp: int
    input_length: _Count
    hash_ids: msgspec.Raw
    output_length: _Count = 0


_decode = msgspec.json.Decoder(_Plain).decode


def declares(record: dict) -> bool:
    """Return whether a first line is no request: it declares what holds for all lines."""
    return not record.keys() & {"hash_ids", "input_length", "timestamp"}


def _read(files, source):
    """``block_size`` (else 512) and ``time_unit`` count, in each line or in a first line."""
    builder = TraceBuilder(512)
    for path, batch in batches(files, source):
        if not len(builder):  # the first line may declare what holds for all
            _add_lines(builder, source, files, records_of(path, batch[:1], source))
            batch = batch[1:]
        if not _add_plain(builder, source, batch):
            _add_lines(builder, source, files, records_of(path, batch, source))
    return builder


def _add_lines(builder, source, files, records):
    for place, record in records:
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


def _add_plain(builder, source, batch):
    """Add lines that are all plain and right at once, else none; returns whether."""
    size, known = builder.block_tokens, source.known
    if known.get("kind of time") != "a number":
        return False
    try:
        rows = [_decode(line) for _, line in batch]
        arrival_s = np.array([row.timestamp for row in rows], np.int64)
    except (msgspec.MsgspecError, OverflowError, RecursionError):
        return False
    lists = np.frombuffer(b"".join([row.hash_ids for row in rows]), np.uint8)
    keys, blocks = np.empty(len(lists), np.int64), np.zeros(len(rows) + 1, np.int64)
    filled, count = _fill(lists, keys, blocks)
    if filled != len(rows):
        return False
    keys, blocks = keys[:count], blocks[:-1]
    arrival_s = arrival_s / TIME_UNITS[known["time_unit"]]
    prompts = np.array([row.input_length for row in rows])
    few = not source.block_tokens and np.any(prompts - blocks * size >= size)
    if few or np.any(blocks > -(-prompts // size)) or np.any(abs(arrival_s) > LATEST_S):
        return False
    return builder.add_rows(keys, blocks, arrival_s, prompts, [row.output_length for row in rows])


@njit(cache=True)
def _fill(text, numbers, lengths):
    """Fill in the whole numbers of JSON lists, one after another, and the lists' lengths.

    Returns how many lists and numbers; -1 lists where the JSON is anything else.
    """
    lists, count, value, digits, sign, inside = 0, 0, np.int64(0), 0, 1, False
    for char in text:
        if char == 91 and not inside and lists < len(lengths) - 1:  # [
            inside = True
        elif not inside:
            return -1, count
        elif 48 <= char <= 57 and digits < 18:
            value, digits = value * 10 + (char - 48), digits + 1
        elif char == 45:  # -
            sign = -1
        elif char == 44 or char == 93:  # , ]
            if digits:
                numbers[count] = sign * value
                lengths[lists] += 1
                count, value, digits, sign = count + 1, np.int64(0), 0, 1
            if char == 93:
                lists, inside = lists + 1, False
        elif char != 32:
            return -1, count
    return lists, count


MOONCAKE = Format(_read, lambda record: "hash_ids" in record, "hash_ids")
