"""Where a decision's record goes: memory, the log, the metrics, and a line to the user.

None of them can break a generation: what fails is logged, and said in the record.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from caching_heuristics import TIERS
from kvttl.background import BoundedDeque
from kvttl.decisions.log import DecisionLog, DecisionRecord
from kvttl.decisions.metrics import DecisionMetrics

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 * 2**20  # of the records in memory
_RECORD_BYTES, _KEY_BYTES = 2_000, 120  # a record without its text, and each chunk key
_PART_BYTES = 400  # of what a policy has decided


class RecentRecords(BoundedDeque):
    """The last records, bounded in number and in bytes.

    Parameters
    ----------
    max_records, max_bytes : int
        The newest one is kept whatever it takes.
    """

    def __init__(self, max_records: int, max_bytes: int) -> None:
        super().__init__(max_records, max_bytes, _size_bytes)


def _size_bytes(record):
    key_bytes = _KEY_BYTES + len(record.cache_salt)
    parts = _PART_BYTES * len(record.decided) + 4 * len(record.prompt or "")
    return _RECORD_BYTES + key_bytes * len(record.chunk_keys) + parts


@dataclass(eq=False)
class RecordKeeper:
    """Keeps records, and passes them on.

    Parameters
    ----------
    max_records : int
        Kept in memory, 64 MiB at most; the oldest go first.
    log : DecisionLog, optional
        Gets every record.
    metrics : DecisionMetrics, optional
        Counts every record.
    notify : callable, optional
        Gets one line about each record.
    meter : RegretMeter, optional
        Sees every record.
    """

    max_records: int
    log: DecisionLog | None = None
    metrics: DecisionMetrics | None = None
    notify: Callable[[str], object] | None = None
    meter: Any = None

    def __post_init__(self) -> None:
        self.records = RecentRecords(self.max_records, _MAX_BYTES)
        self._keeping = threading.Lock()

    def keep(self, record: DecisionRecord) -> DecisionRecord:
        """Return the record after it has gone everywhere; it then says what went wrong there."""
        problem = self.write_ahead(record)
        if problem and not record.error:
            record = replace(record, error=problem)
        with self._keeping:
            self.records.append(record)
        try:
            if self.metrics is not None:
                self.metrics.observe(record)
            if self.meter is not None:
                self.meter.observe(record)
            for line in notices(record) if self.notify else ():
                self.notify(line)
        except Exception:
            logger.exception("telling about a decision failed")
        return record

    def write_ahead(self, record: DecisionRecord) -> str:
        """Append to the log; returns what went wrong, or an empty string.

        A claim before its KV moves: a process that is killed meanwhile must not lose it.
        """
        try:
            if self.log is not None:
                self.log.append(record)
        except Exception as error:  # a full disk; or a value that no JSON can hold
            logger.warning("the decision log cannot be written: %s", error)
            return f"the decision log cannot be written: {type(error).__name__}: {error}"
        return ""


def notices(record: DecisionRecord) -> list[str]:
    """Return the one-line notices about a decision.

    Examples
    --------
    >>> notices(DecisionRecord(0.0, "a", ttl_s=7200.0, tier_after={"remote": 3}))
    ['✓ KV in remote, TTL: 7200s']
    """
    if record.error:
        return [f"⚠ KV not managed: {record.error}"]
    if record.kind == "expiry":
        return [_expiry_notice(record)]
    ttl = "" if record.ttl_s is None else f"TTL: {record.ttl_s:.0f}s"
    lines = []
    for move in record.moves:
        path = f"from {move['from']} to {move['to']}"
        if move["moved_chunks"]:
            lines.append(f"✓ Moved KV {path}" + (ttl and f" ({ttl})"))
        elif move["status"] != "noop":
            lines.append(f"⚠ KV not moved {path}: {move['reason']}")
    held = [tier for tier in TIERS if record.tier_after.get(tier)]
    place = "+".join(held) or record.wanted_tier or "no tier"
    return lines or [f"✓ KV in {place}" + (ttl and f", {ttl}")]


def _expiry_notice(record):
    ended = f"✓ TTL in {record.from_tier} ended"
    if record.wanted_tier is None:
        return f"{ended}: KV dropped"
    return f"{ended}: KV now belongs in {record.wanted_tier} (TTL: {record.ttl_s:.0f}s)"
