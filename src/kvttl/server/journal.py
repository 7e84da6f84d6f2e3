"""What a restart must know of each model: its claims, and what lies below gpu; a file for each.

This is no second ledger: the manager's own gives its rows, and takes them back. A line is a
checksum and one row of JSON, so that a torn or damaged one is seen. What has changed is appended;
once that is more than the rest, the file is written anew, and takes the old one's place at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvttl import user_path, whole_file
from kvttl.decisions.log import DecisionLog, DecisionRecord
from kvttl.lmcache.tiers import pages
from kvttl.manager.claims import ClaimLedger
from kvttl.manager.policy import compile_policy
from kvttl.server.places import BIT_OF, HOT, Chunk, Model, Places

logger = logging.getLogger(__name__)

_FILE = "claims.jsonl"
_SPARE_BYTES = 1 << 20  # that a file may have beyond twice what it must
_ROWS_AT_ONCE = 128  # for which the ledger is kept from others
_RETRY_S = 10.0  # after a write that failed: a full disk


class Journal:
    """One model's file. To a manager it is a log: what a record stands for is written with it.

    Parameters
    ----------
    folder : Path
        Of this model.
    model : Model
        Whose claims these are.
    places : Places
        Knows what lies below gpu.
    log : DecisionLog, optional
        Gets the records themselves.

    Attributes
    ----------
    damaged : int
        Lines that could not be read.
    error : str
        Why it was not written, the last time.
    """

    def __init__(
        self, folder: Path, model: Model, places: Places, log: DecisionLog | None = None
    ) -> None:
        self.folder, self.damaged, self.error = folder, 0, ""
        self._model, self._places, self._log = model, places, log
        self._ledger: ClaimLedger | None = None
        self._lock = threading.Lock()
        self._file: Any = None
        self._number, self._not_before_s = 0, 0.0
        self._bytes = self._whole_bytes = self._whole_size = 0  # all; of the last whole file

    def restore(self, ledger: ClaimLedger) -> None:
        """Give a ledger and the places back what they were, and write down what changes."""
        for row in rows_of(self.folder / _FILE):
            try:
                if isinstance(row, dict):
                    self._places.groups.setdefault(self._model, set()).update(row["groups"])
                elif isinstance(row[0], int):
                    self._place(row[0], row[1:])
                else:
                    ledger.restore(row)
            except (LookupError, TypeError, ValueError):
                self.damaged += 1
        if self.damaged:
            logger.warning("%d lines of the journal in %s are damaged", self.damaged, self.folder)
        ledger.changed = {}
        self._places.take_changed(self._model)
        self._ledger = ledger

    def append(self, record: DecisionRecord) -> None:
        """Write down what has changed by the time of a record.

        Raises
        ------
        OSError
            It cannot be written now; later all of it is.
        """
        if self._log is not None:
            self._log.append(record)
        self.flush()
        if self.error:
            raise OSError(self.error)

    def flush(self) -> None:
        """Write down what has changed; a failure is an `error`."""
        with self._lock:
            if self._ledger is None or time.monotonic() < self._not_before_s:
                return
            try:
                self._write()
                self.error = ""
            except OSError as error:  # what is not written now is part of the next whole file
                self._file, self._not_before_s = None, time.monotonic() + _RETRY_S
                self.error = f"the journal cannot be written: {error}"
                logger.warning(self.error)

    def _write(self):
        least = self._whole_bytes * self._ledger.size / max(self._whole_size, 1)
        is_gone = self._file is None or os.fstat(self._file.fileno()).st_nlink == 0
        if is_gone or self._bytes > 2 * least + _SPARE_BYTES:
            self._write_whole()
        elif data := self._changes():
            if self._file.write(data) != len(data):
                raise OSError("the disk is full")
            self._bytes += len(data)

    def _write_whole(self):
        """Write all rows; what changes meanwhile is written behind them."""
        self._number += 2
        self._ledger.changed = {}
        self._places.take_changed(self._model)
        names, groups = self._ledger.names, self._places.groups.get(self._model) or {0}
        with whole_file(self.folder / _FILE) as file:
            file.write(_line({**self._model._asdict(), "groups": sorted(groups)}))
            for some in pages(names, _ROWS_AT_ONCE):
                file.writelines(map(_line, self._ledger.rows(self._number, some)))
            file.writelines(map(_line, _place_rows(self._places.chunks(self._model))))
            file.write(self._changes())
            file.flush()
            os.fsync(file.fileno())
            self._bytes = self._whole_bytes = file.tell()
        self._whole_size = self._ledger.size
        self._file = open(self.folder / _FILE, "ab", buffering=0)  # noqa: SIM115 - stays open

    def _changes(self):
        rows = self._ledger.rows(self._number)
        changed = self._places.take_changed(self._model)
        return b"".join(map(_line, [*rows, *_place_rows(changed, gone=True)]))

    def _place(self, bits, keys):
        chunks = self._places.of_keys(self._model, keys)
        for tier, bit in BIT_OF.items():
            if bit != HOT:
                (self._places.came if bits & bit else self._places.went)(chunks, tier)


class JournalFolder:
    """The journals of one server's models; only one server at a time has a folder.

    Parameters
    ----------
    folder : Path
        Made if need be, for its owner only.
    places : Places
        Of the server.

    Raises
    ------
    OSError
        It cannot be used; a BlockingIOError: another server does.
    """

    def __init__(self, folder: Path, places: Places) -> None:
        self._folder, self._places = folder, places
        self._journals: list[Journal] = []
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")  # noqa: SIM115 - held until the process ends
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def of(self, model: Model, log: DecisionLog | None = None) -> Journal:
        """Return a model's journal."""
        folder = self._folder / digest_of(model)
        folder.mkdir(mode=0o700, exist_ok=True)
        self._journals.append(Journal(folder, model, self._places, log))
        return self._journals[-1]

    def models(self) -> Iterator[Model]:
        """Yield the models that have a journal."""
        for path in self._folder.glob(f"*/{_FILE}"):
            header = next(rows_of(path), None)
            if isinstance(header, dict):
                yield Model(header["name"], header["world_size"])

    def flush(self) -> None:
        """Write down what has changed."""
        for journal in self._journals:
            journal.flush()

    def status(self) -> dict[str, Any]:
        """Return what could not be read or written."""
        errors = [journal.error for journal in self._journals if journal.error]
        return {"damaged_lines": sum(each.damaged for each in self._journals), "errors": errors}

    def close(self) -> None:
        """Write down the rest, and let another server have the folder."""
        self.flush()
        self._lock.close()


def open_journals(setting: str, base_path: Any, places: Places) -> JournalFolder | None:
    """Return the journals that a setting asks for, by default beside the folder of the chunks."""
    folder = setting or (base_path and f"{str(base_path).rstrip('/')}.kvttl")
    try:
        return JournalFolder(user_path(folder), places) if folder not in ("off", None) else None
    except OSError as error:
        logger.warning("no journal, %s cannot be used or another server does: %s", folder, error)
        return None


def take_up(module: Any) -> None:
    """Make a module's policy, take up what was before the start, claim what else there is."""
    compile_policy(module.settings.policy)
    gc.disable()  # 100,000 chunks take half as long
    try:
        for model in module.journals.models() if module.journals else ():
            module.manager(model)
    finally:
        gc.freeze()  # what is there by now stays
        gc.enable()
    if module.journals and module.settings.adopt:
        for tier, contents in module.hands.contents():
            module.places.look_through(tier, contents)
        for model in list(module.places.groups):
            module.guard(module.manager(model).account, "adoption")()


def digest_of(model: Model) -> str:
    """Name a model's folder."""
    return hashlib.sha256(f"{model.name}@{model.world_size}".encode()).hexdigest()[:16]


def rows_of(path: Path) -> Iterator[Any]:
    """Yield the rows of a file, None for a damaged line; a torn last one is no line."""
    data = path.read_bytes() if path.exists() else b""
    for line in data.split(b"\n")[:-1]:
        row = None
        with contextlib.suppress(ValueError):
            if int(line[:8], 16) == zlib.crc32(line[9:]):
                row = json.loads(line[9:])
        yield row


def _line(row):
    data = json.dumps(row, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(data), data)


def _place_rows(chunks: Iterable[Chunk], gone: bool = False) -> Iterator[list]:
    """Yield rows of chunks by the tiers below gpu that hold them; `gone`: of those in none too."""
    by_bits: dict[int, list[str]] = {}
    for chunk in chunks:
        if gone or chunk.bits & ~HOT:
            by_bits.setdefault(chunk.bits & ~HOT, []).append(chunk.key)
    for bits, keys in by_bits.items():
        yield from ([bits, *some] for some in pages(keys, _ROWS_AT_ONCE))
