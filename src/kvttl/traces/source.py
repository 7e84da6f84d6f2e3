"""What a reader is told and finds out while it reads, and the fields of a record, checked."""

import hashlib
import itertools
import json
import math
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
from tqdm.auto import tqdm

from kvttl.traces.opening import DAMAGE, text_lines

SESSIONS_PER_HOUR = 30.0  # of agentic sessions that are overlaid, unless told otherwise
TIME_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # -> so many a second
SUBAGENT_TIMES = ("absolute", "relative")
ORDER = "order"  # instead of a unit: there are no times, a request a second
_WORDS = dict(zip(TIME_UNITS, ("second", "millisecond", "microsecond", "nanosecond")))
_UNIT_NAMES = {name: unit for unit, word in _WORDS.items() for name in (unit, word, f"{word}s")}
_UNIT_FIELDS = ("time_unit", "timestamp_unit")
_SIZE_FIELDS = ("block_size", "trace_block_size", "kv_block_size", "block_tokens", "page_size")
_SIZE_FIELDS += ("tokens_per_block", "chunk_size")
LATEST_S = 1e12  # 31,688 years: what is later is no time
ASK_SIZE = "; say how many tokens a block has: --block-tokens, BLOCK_TOKENS="
ASK_UNIT = "; say the unit of time: --time-unit, TIME_UNIT="
_BAD = (ValueError, TypeError, KeyError, OverflowError, AttributeError, RecursionError, *DAMAGE)


@dataclass
class Source:
    """What a reader needs while it reads: its options, what lines declared, what it skipped."""

    skip_bad: bool = False
    progress: bool = False
    seed: int = 0
    sessions_per_hour: float = SESSIONS_PER_HOUR
    max_sessions: int | None = None
    block_tokens: int | None = None
    time_unit: str | None = None
    subagent_times: str | None = None
    output_rate: float | None = None

    def __post_init__(self):
        self.skipped, self.first_bad, self.ticks = 0, "", 0
        self.names: dict[Any, int] = {}  # sessions and models -> number
        self.known: dict[str, Any] = {}  # what the lines so far have in common
        self.said: dict[str, Any] = {}  # the same of a line that may be bad
        if not 0 < self.sessions_per_hour < math.inf:
            allowed = "sessions_per_hour must be > 0 and finite"
            raise ValueError(f"{allowed}, got {self.sessions_per_hour!r}")
        self.sessions_per_hour = float(self.sessions_per_hour)
        if self.output_rate is not None and not self.output_rate > 0:
            raise ValueError(f"output_rate must be > 0 tokens a second, got {self.output_rate!r}")
        for name, low in (("seed", 0), ("max_sessions", 1), ("block_tokens", 1)):
            value = getattr(self, name)
            if value is not None and not low <= value < 2**31:
                raise ValueError(f"{name} must be {low} to 2147483647, got {value!r}")
        choices = {"time_unit": (*TIME_UNITS, ORDER), "subagent_times": SUBAGENT_TIMES}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in (None, *allowed):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def number(self, name: Any) -> int:
        return self.names.setdefault(name, len(self.names))

    @contextmanager
    def place(self, where: str):
        """Turn an error inside into one that says where it was, or count it."""
        try:
            yield
            self.known |= self.said
        except _BAD as error:
            missing = isinstance(error, KeyError)
            reason = f"{where}: {f'{error.args[0]!r} is missing' if missing else error}"
            if not self.skip_bad:
                raise ValueError(reason) from error
            self.skipped += 1
            self.first_bad = self.first_bad or reason
        finally:
            self.said.clear()

    def agreed(self, name: str, declared: Any, given: Any, usual: Any) -> Any:
        """Return what a record declares, else what is known or given, else what is usual.

        Raises
        ------
        ValueError
            Two of the first three differ.
        """
        known = self.known.get(name, given)
        if None not in (known, declared) and known != declared:
            by = "was asked for" if known == given else "other lines have it"
            raise ValueError(f"{name} must be {known}, as {by}, got {declared}")
        self.said[name] = value = usual if known is declared is None else declared or known
        return value

    def block_size(self, record: dict, usual: int | None, names=_SIZE_FIELDS) -> int:
        """Return the tokens of a block of a record."""
        name = next((name for name in names if record.get(name) is not None), names[0])
        declared = None if usual and record.get(name) is None else tokens(record, name)
        if declared == 0:
            raise ValueError(f"{name} must be >= 1, got 0")
        return self.agreed(name, declared, self.block_tokens, usual)

    def prompt(self, record: dict, name: str, keys, size: int, covered: bool = False) -> int:
        """Return the tokens of a prompt.

        Raises
        ------
        ValueError
            It cannot have so many blocks, or, if blocks have to be `covered`,
            so few: nobody said how many tokens a block has, and it is not `size`.
        """
        count = tokens(record, name)
        few = covered and not self.block_tokens and count - len(keys) * size >= size
        if few or len(keys) > -(-count // size):
            blocks = f"{len(keys)} blocks of {size} tokens are {'fewer' if few else 'more'}"
            raise ValueError(f"{blocks} than {count} tokens need{ASK_SIZE}")
        return count

    def per_second(self, record: dict, usual: str, value: Any = 0) -> int:
        """Return how many of the units of a record's time are a second.

        Raises
        ------
        ValueError
            Nobody said the unit, and the value cannot be of the usual one.
        """
        declared = next((record[name] for name in _UNIT_FIELDS if name in record), None)
        if declared is not None and f"{declared}" not in _UNIT_NAMES:
            raise ValueError(f"time_unit must be one of {', '.join(TIME_UNITS)}, got {declared!r}")
        first = "time_unit" not in self.known
        unit = self.agreed("time_unit", _UNIT_NAMES.get(f"{declared}"), self.time_unit, usual)
        told = self.agreed("told", True if declared else None, bool(self.time_unit) or None, None)
        if not told:
            epoch = usual == "ms" and first and (1e9 <= value < 1e11 or value >= 1e14)
            if epoch or (usual == "ms" and value % 1) or (usual == "s" and value >= 1e11):
                raise ValueError(f"a time of {value!r} is not in {usual}{ASK_UNIT}")
        return TIME_UNITS[unit]

    def seconds(self, record: dict, name: str, usual: str = "s") -> float:
        """Return a record's time: a number of some unit, or an ISO date and time."""
        if self.time_unit == ORDER:
            self.ticks += 1
            return float(self.ticks)
        if name not in record:  # timestamp_ms names its unit
            unit = next((unit for unit in TIME_UNITS if f"{name}_{unit}" in record), None)
            if unit is None:
                has_none = f"--time-unit {ORDER}, TIME_UNIT={ORDER} takes requests a second apart"
                raise ValueError(f"{name!r} is missing; {has_none}")
            record = {**record, name: record[f"{name}_{unit}"], "time_unit": unit}
        if isinstance(record[name], str):
            arrival_s = _iso_seconds(name, record[name])
            self.agreed("kind of time", "a date", None, None)
            return arrival_s
        self.agreed("kind of time", "a number", None, None)
        value = number(record, name, -math.inf)
        return in_time(name, value / self.per_second(record, usual, value))


def in_time(name: str, seconds: float) -> float:
    """Return seconds that are a possible time."""
    if not abs(seconds) <= LATEST_S:
        raise ValueError(f"{name} must be a time within {LATEST_S:g} s, got {seconds:g} s")
    return seconds


def _iso_seconds(name, text):
    try:
        moment = datetime.fromisoformat(text if text[4:5] == "-" else "")
    except ValueError:
        wanted = f"{name} must be a number or an ISO date and time"
        raise ValueError(f"{wanted}, got {text!r:.60}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def number(record: dict, name: str, lowest: float = 0.0, default=None) -> float:
    """Return a finite number >= `lowest` of a record."""
    value = record[name] if default is None else record.get(name, default)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not lowest <= value < math.inf:
        allowed = "finite" if lowest == -math.inf else f">= {lowest:g} and finite"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r:.60}")
    return value


def tokens(record: dict, name: str, default=None) -> int:
    """Return a whole number of tokens of a record."""
    value = number(record, name, 0, default)
    if value != int(value) or value >= 2**31:
        raise ValueError(f"{name} must be a whole number of tokens < 2147483648, got {value!r:.60}")
    return int(value)


def label(record: dict, name: str) -> str | int:
    """Return a text of a record, not too long for a column of names; -1 if it has none."""
    value = record.get(name)
    return value[:80] if isinstance(value, str) and value else -1


def lasted_s(record: dict, name: str, per_second: int = 1000) -> float:
    """Return how long something took, NaN where a record does not say, or says null."""
    if record.get(name) is None:
        return math.nan
    return in_time(name, number(record, name) / per_second)


def text(record: dict, name: str) -> str:
    """Return a text of a record."""
    if not isinstance(record[name], str):
        raise ValueError(f"{name} must be text, got {record[name]!r:.60}")
    return record[name]


def block_keys(record: dict, name: str, chained: bool = True) -> np.ndarray:
    """Return the list of integer block ids of a record as int64; chained ones differ."""
    values = record[name]
    if not isinstance(values, list) or set(map(type, values)) - {int}:  # true is not 1
        raise ValueError(f"{name} must be a list of integers, got {values!r:.60}")
    if chained and len(set(values)) < len(values):
        twice = Counter(values).most_common(1)[0][0]
        raise ValueError(f"{name} must not name a block twice in one request, got {twice} again")
    try:
        return np.array(values, np.int64)
    except OverflowError:  # ids beyond int64 wrap: they are names, not numbers
        if not -(2**63) <= min(values) <= max(values) < 2**64:
            raise ValueError(
                f"{name} must be a list of 64-bit integers, got {values!r:.60}"
            ) from None
        return np.array([_signed(value) for value in values], np.int64)


def hash_keys(record: dict, name: str, scope: int = 0) -> np.ndarray:
    """Return the 64-bit keys of a record's hashes, kept apart by `scope` (0, 1, ...)."""
    values = record[name]
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list of hashes, got {values!r:.60}")
    keys = np.array([_hash_key(value) for value in values], np.int64)
    return keys ^ np.int64(_signed(scope * 0x9E3779B97F4A7C15))


def _hash_key(value):
    """Return a 64-bit key of a hash: hexadecimal text, other text, or an integer."""
    if isinstance(value, str):
        if value.startswith("0x"):
            value = int(value, 16)
        else:
            digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
            value = int.from_bytes(digest, "little")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a chunk hash must be text or an integer, got {value!r:.60}")
    return _signed(value)


def _signed(value):
    return (value + 2**63) % 2**64 - 2**63


def batches(files, source: Source):
    """Yield (file, up to 512 of its (number, line)) of files of lines."""
    for path in files:
        with bar(source, os.path.getsize(path), path.name) as shown:
            lines = text_lines(path, source, shown.update)
            while batch := list(itertools.islice(lines, 512)):
                yield path, batch


def records(files, source: Source):
    """Yield (file and line, record) of JSON-lines files; bad JSON is a bad line."""
    for path, batch in batches(files, source):
        yield from records_of(path, batch, source)


def records_of(path, batch, source: Source):
    """Yield the `records` of one batch."""
    for line_number, line in batch:
        with source.place(place := f"{path}, line {line_number}"):
            yield place, parsed(line)


def parsed(line: bytes) -> dict:
    """Return the JSON object of a line."""
    try:
        record = msgspec.json.decode(line)
    except msgspec.DecodeError:  # the other library takes NaN, and says more of what is wrong
        text = line.decode()
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error}): {text.strip()[:40]!r}") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {line.decode().strip()[:40]!r}")
    return record


def bar(source: Source, total: int, name: str, unit: str = "B"):
    """Return a bar that counts bytes or files; shown after a second only, or not at all."""
    look = {"unit_scale": True, "delay": 1, "disable": not source.progress}
    return tqdm(total=total, desc=name, unit=unit, **look)
