"""Decision records in files, as JSON lines, and as a pandas DataFrame."""

import contextlib
import logging
import math
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np

from caching_heuristics import METADATA_FIELDS, TIERS
from kvttl import user_path
from kvttl.background import check_whole
from kvttl.decisions.record import KINDS, SOURCES, DecisionRecord, parse_record

logger = logging.getLogger(__name__)


class DecisionLog(contextlib.AbstractContextManager):
    """Decisions as JSON lines in a folder, one file per writer, safe for concurrent use.

    A line is one write to a file opened for appending, so a crash can tear the
    last line only. There is no fsync: a power cut can take the last seconds.

    Parameters
    ----------
    folder : path
        Made, readable by its owner only, at the first record.
    max_bytes : int
        A line that would push its file over this begins the next file.
    keep_files : int, optional
        Files of this writer that stay; the oldest go first, and with them the
        claims in them. None = all.
    prompts : bool
        Write the prompts' text too, where a record has it.

    Raises
    ------
    ValueError
        If `max_bytes` or `keep_files` is not a whole number >= 1.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with DecisionLog(folder.name) as log:
    ...     log.append(DecisionRecord(0.0, "ab12", wanted_tier="disk"))
    >>> [record.wanted_tier for record in read_records(folder.name)]
    ['disk']
    >>> folder.cleanup()
    """

    _fd: int | None = None

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int = 64 * 2**20,
        keep_files: int | None = None,
        prompts: bool = False,
    ) -> None:
        self.folder = user_path(folder)
        self._max_bytes = check_whole("max_bytes", max_bytes)
        self._keep_files = None if keep_files is None else check_whole("keep_files", keep_files)
        self._prompts = prompts
        self._start_over()
        _LOGS.add(self)

    def _start_over(self):
        """Begin as a writer of its own: at first, and in the child of a fork."""
        self._lock = threading.Lock()  # the parent's may have been held
        self._files: list[Path] = []
        self._stem = ""
        self._sequence = self._size = 0
        self._close()

    @property
    def path(self) -> Path | None:
        """The file that is written to; None before the first record and after `close`."""
        return self._files[-1] if self._fd is not None else None

    def append(self, record: DecisionRecord) -> None:
        """Write one record.

        Raises
        ------
        OSError
            If it cannot be written, as on a full disk; nothing of it stays then.
        """
        if record.prompt is not None and not self._prompts:
            record = replace(record, prompt=None)
        line = record.to_json().encode() + b"\n"
        with self._lock:
            if self._needs_file(len(line)):
                self._open_next()
            try:
                _write_line(self._fd, line)
            except OSError:
                self._undo()
                raise
            self._size += len(line)

    def close(self) -> None:
        """Close the file; a later record would begin the next one."""
        with self._lock:
            self._close()

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _close(self):
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _needs_file(self, length):
        if self._fd is None or os.fstat(self._fd).st_nlink == 0:  # deleted by someone
            return True
        return self._size > 0 and self._size + length > self._max_bytes

    def _open_next(self):
        """Open the next file, then close the one before it and delete the oldest."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = None
        while fd is None:
            self._stem = self._stem or _new_stem()
            path = self.folder / f"{self._stem}-{self._sequence + 1:04d}.jsonl"
            try:
                fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:  # another machine's writer, on a shared disk
                self._stem = ""
        self._close()
        self._fd, self._size = fd, 0
        self._sequence += 1
        self._files.append(path)
        while self._keep_files is not None and len(self._files) > self._keep_files:
            with contextlib.suppress(OSError):
                self._files.pop(0).unlink()

    def _undo(self):
        """Take back the part of a line that was written before the disk was full."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._close()  # the torn line stays the last of its file

    __del__ = _close  # without the lock: what is being deleted has no other user


_LOGS: weakref.WeakSet[DecisionLog] = weakref.WeakSet()


def _start_over_after_fork():
    for log in list(_LOGS):
        log._start_over()


os.register_at_fork(after_in_child=_start_over_after_fork)


def _new_stem():
    now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    return f"decisions-{now}-{os.getpid()}-{secrets.token_hex(2)}"


def _write_line(fd, line):
    """Write a line in one call, or in as many as the disk insists on."""
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_records(path: str | Path, records: Iterable[DecisionRecord]) -> int:
    """Append records to a JSON-lines file, on lines of their own; returns how many."""
    count = 0
    with open(user_path(path), "a+b", buffering=0) as file:
        file.seek(max(file.tell() - 1, 0))
        if file.read(1) not in (b"", b"\n"):  # a writer before us died in mid-line
            _write_line(file.fileno(), b"\n")
        for count, record in enumerate(records, start=1):  # noqa: B007
            _write_line(file.fileno(), record.to_json().encode() + b"\n")
    return count


def read_records(
    path: str | Path, kinds: Iterable[str] | None = ("generation", "expiry", "settled", "shed")
) -> Iterator[DecisionRecord]:
    """Return the records of a file in its order, or of a folder's files in time order.

    A line that is not a record is reported and skipped. `kinds` = None asks for
    all, the write-ahead claims too.

    Raises
    ------
    ValueError
        If one of `kinds` is not in `KINDS`.
    OSError
        If the file cannot be read; of a folder's files such a one is reported only.
    """
    records = each_record(path, kinds)
    return iter(sorted(records, key=attrgetter("time_s"))) if user_path(path).is_dir() else records


def each_record(path: str | Path, kinds: Iterable[str] | None) -> Iterator[DecisionRecord]:
    """Yield records as `read_records` does, one at a time; a folder's file after file."""
    kinds = frozenset(KINDS if kinds is None else kinds)
    if not kinds <= set(KINDS):
        raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {sorted(kinds)}")
    path = user_path(path)
    return _read_folder(path, kinds) if path.is_dir() else _read_file(path, kinds)


def _read_folder(folder, kinds):
    for path in sorted(folder.glob("*.jsonl")):
        try:
            yield from _read_file(path, kinds)
        except OSError as error:  # deleted by its writer's rotation, say
            logger.warning("%s cannot be read: %s", path, error)


def _read_file(path, kinds):
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            try:
                record = parse_record(line)
            except (ValueError, TypeError, RecursionError) as error:
                logger.warning("%s line %d is not a decision record: %s", path, number, error)
            else:
                if record.kind in kinds:
                    yield record


def _lines(file):
    """Yield the lines of a file; one that no record is as long as is empty."""
    while line := file.readline(_LONGEST_LINE):
        part = line
        while part and not part.endswith(b"\n"):
            if part := file.readline(_LONGEST_LINE):
                line = b""
        yield line


_LONGEST_LINE = 32 * 2**20  # bytes
_COUNTS = ("hit_tokens", "tier_before", "tier_after")
_FRAME_TIERS = (*TIERS, "none")
_DTYPES = {  # of the frame's columns, in order; a tuple = the known categories
    "time": "datetime64[ns, UTC]",
    "kind": KINDS,
    **dict.fromkeys(("prompt_digest", "prompt", "cache_salt"), "str"),
    **dict.fromkeys(("prompt_tokens", "chunks"), "int64"),
    **dict.fromkeys(METADATA_FIELDS, "float64"),
    **dict.fromkeys([f"{name}_source" for name in METADATA_FIELDS], SOURCES),
    "ttl_s": "float64",
    **dict.fromkeys(("wanted_tier", "from_tier"), TIERS),
    **dict.fromkeys([f"{name}_{tier}" for name in _COUNTS for tier in _FRAME_TIERS], "int64"),
    "moves": "int64",
    **dict.fromkeys(("moved", "move_status"), "str"),
    "moved_chunks": "int64",
    **dict.fromkeys(("move_s", "generate_s", "manage_s"), "float64"),
    "error": "str",
}


def to_frame(records: Iterable[DecisionRecord]):
    """Return records as a DataFrame, one row each, with the same typed columns for any records.

    Write-ahead claims are left out. ``time`` is UTC; metadata that is absent or
    not a number is NaN; a tier that is absent counts 0; ``moved`` lists the
    moves that moved chunks, ``move_s`` is what all moves took.

    Examples
    --------
    >>> frame = to_frame([DecisionRecord(0.0, "a", hit_tokens={"disk": 64}, ttl_s=60.0)])
    >>> frame[["hit_tokens_disk", "hit_tokens_gpu", "ttl_s"]].values.tolist()
    [[64.0, 0.0, 60.0]]
    """
    import pandas as pd

    rows = [_row(record) for record in records if record.kind != "claim"]
    frame = pd.DataFrame(rows, columns=list(_DTYPES))
    frame["time"] = pd.to_datetime(frame["time"].astype(float), unit="s", utc=True, errors="coerce")
    for name, dtype in _DTYPES.items():
        if isinstance(dtype, tuple):
            others = sorted(set(frame[name].dropna()) - set(dtype), key=str)
            dtype = pd.CategoricalDtype([*dtype, *others])
        frame[name] = frame[name].astype(dtype)
    return frame


def _row(record):
    """Return one row of the frame, before its columns get their types."""
    row = {name: getattr(record, name) for name in _DTYPES if hasattr(record, name)}
    row["time"] = record.time_s
    for name in METADATA_FIELDS:
        row[name] = _number(record.metadata.get(name))
        row[f"{name}_source"] = record.metadata_sources.get(name)
    for name in _COUNTS:
        counts = getattr(record, name)
        row |= {f"{name}_{tier}": counts.get(tier, 0) for tier in _FRAME_TIERS}
    return row | _move_columns(record.moves)


def _move_columns(moves):
    moved = [move for move in moves if move.get("moved_chunks")]
    return {
        "moves": len(moves),
        "moved": ", ".join(f"{move.get('from')}→{move.get('to')}" for move in moved),
        "move_status": ", ".join(str(move.get("status")) for move in moves),
        "moved_chunks": sum(move["moved_chunks"] for move in moved),
        "move_s": np.nansum([_number(move.get("latency_s")) for move in moves]),
    }


def _number(value):
    """Return a number as a float; NaN for all else."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
