"""The chunks that a policy knows, as runs: maximal stretches that were always used together.

A prefix tree. A run is cut where a request leaves it in the middle, so all chunks of a run have
one history, and what holds for one holds for all. Of a run the first chunks are resident, the
last ones go first. A policy's state is one record a run, and 8 bytes a chunk for its key.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

BINS = 22  # ages of a run: see `hazard.EDGES_S`
SIGNALS = 10  # see `signals`
LEVELS = 5  # caches that are followed at once: two shadows, and up to three nested tiers

# What a sweep reads is in front: it goes through all resident runs.
RUN = np.dtype(
    [
        ("since_s", "f8"),  # its age counts from here: its last use, then that generation's end
        ("best", "f8"),  # of a sweep: highest value among the runs after it
        ("place", "i4"),  # in `Runs.order`
        ("parent", "i4"),
        ("length", "i4"),  # chunks
        ("held", "i4", LEVELS),  # its first chunks that each cache holds
        ("depth", "i4"),  # chunks before it
        ("branches", "i4"),  # runs that follow it
        ("expires_s", "f8"),
        ("start", "i8"),  # of its keys in `Runs.keys`
        ("touch", "i8"),  # number of the request that used it last
        ("begin_s", "f8"),  # when that came
        ("count", "i4"),  # uses
        ("prompt_tokens", "i8"),  # of that request
        ("think_log", "f4"),  # that session's mean log(1 + think time), < 0: first turn
        ("codes", "u1", SIGNALS),
        ("tier", "i1"),  # wanted, where that was decided at its last use
        ("fresh", "u1"),  # whether its row is that of its codes
        ("running", "u1"),  # whether the generation of its last use has not ended
        ("gap_s", "f8"),  # since the use before the last, 0: there was none
        ("mean", "f8"),  # seconds between uses, and the sum of squares around it
        ("squares", "f8"),
        ("row", "f4", BINS),  # its index by age
    ]
)


LOG = np.dtype([("since_s", "f8"), ("touch", "i8"), ("run", "i4")])  # a use, to learn from


class Runs(NamedTuple):
    """All runs, the table that finds them, and the orders in which they were used."""

    run: np.ndarray  # (n,) RUN
    slot: np.ndarray  # (power of two,) int32: hash of a run's first key -> run, -1 = free
    keys: np.ndarray  # (chunks,) int64
    order: np.ndarray  # (m,) int32: runs by use, of a request the deepest first; old places too
    log: np.ndarray  # (e, 2) LOG: uses by their generations' ends; and by their own times
    size: np.ndarray  # (6,) int64: runs, keys, order, log x 2; places in order when it was tidied
    counter: np.ndarray  # (LEVELS + 1,) int64: chunks held by level; requests so far


N_RUNS, N_KEYS, N_ORDER, N_LOG, N_LIVE = 0, 1, 2, 3, 5
SEEN = LEVELS  # in `counter`


def new_runs(room: int = 256) -> Runs:
    """Return an empty tree."""
    arrays = np.zeros(room, RUN), np.full(2 * room, -1, np.int32), np.empty(room, np.int64)
    order, log = np.empty(room, np.int32), np.zeros((room, 2), LOG)
    return Runs(*arrays, order, log, np.zeros(6, np.int64), np.zeros(LEVELS + 1, np.int64))


def with_room(s: Runs, requests: int, chunks: int, uses: int) -> Runs:
    """Return the tree with room for more: two runs a request, so many chunks and uses."""
    more = {"run": 2 * requests, "keys": chunks, "order": uses, "log": uses}
    grown = s._asdict()
    used = *s.size[:N_LOG], max(s.size[N_LOG:N_LIVE])
    for filled, (name, room) in zip(used, more.items()):
        need, old = int(filled) + room, grown[name]
        if need > len(old):
            grown[name] = np.zeros((max(need, len(old) * 3 // 2), *old.shape[1:]), old.dtype)
            grown[name][: len(old)] = old
    s = Runs(**grown)
    need = int(s.size[N_RUNS]) + 2 * requests
    if 2 * need > len(s.slot):
        s = s._replace(slot=np.full(1 << (4 * need).bit_length(), -1, np.int32))
        fill_slots(s)
    return s


@njit(cache=True)
def _slot_of(s, key):
    """Return the slot of a run's first key, or the free one where it would be."""
    slot, keys, runs = s.slot, s.keys, s.run
    mixed = np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)
    mask = np.int64(len(slot) - 1)
    at = np.int64(mixed >> np.uint64(33)) & mask
    while slot[at] >= 0 and keys[runs[slot[at]].start] != key:
        at = (at + 1) & mask
    return at


@njit(cache=True)
def fill_slots(s):
    """Fill an empty table with all runs."""
    for run in range(s.size[N_RUNS]):
        s.slot[_slot_of(s, s.keys[s.run[run].start])] = run


@njit(cache=True)
def walk(s, keys, path):
    """Put the known runs of a prompt into `path`; returns how many, and their chunks.

    A run that the prompt leaves in the middle is not cut; its share counts as chunks.
    """
    at, runs, parent, known = 0, 0, -1, s.keys
    while at < len(keys):
        run = s.slot[_slot_of(s, keys[at])]
        if run < 0 or s.run[run].parent != parent:
            break
        start, length = s.run[run].start, s.run[run].length
        same, most = 1, min(length, len(keys) - at)
        while same < most and known[start + same] == keys[at + same]:
            same += 1
        path[runs] = run
        runs += 1
        at += same
        parent = run
        if same < length:
            break
    return runs, at


@njit(cache=True)
def cut(s, run, blocks):
    """Cut a run after some chunks; returns the new run, which is its front."""
    front = np.int32(s.size[N_RUNS])
    s.size[N_RUNS] += 1
    s.run[front] = s.run[run]
    new, old = s.run[front], s.run[run]
    s.slot[_slot_of(s, s.keys[old.start])] = front
    new.length = blocks
    new.place, new.branches = -1, 1
    old.parent = front
    old.start += blocks
    old.length -= blocks
    old.depth += blocks
    s.slot[_slot_of(s, s.keys[old.start])] = run
    for level in range(LEVELS):
        new.held[level] = min(blocks, old.held[level])
        old.held[level] -= new.held[level]
    return front


@njit(cache=True)
def add(s, keys, parent):
    """Append a run of unknown chunks after a known one (-1: none); returns it."""
    run = np.int32(s.size[N_RUNS])
    start = s.size[N_KEYS]
    s.size[N_RUNS] += 1
    s.size[N_KEYS] += len(keys)
    s.keys[start : start + len(keys)] = keys
    new = s.run[run]
    new.parent, new.start, new.length = parent, start, len(keys)
    new.depth = s.run[parent].depth + s.run[parent].length if parent >= 0 else 0
    new.branches = 0
    if parent >= 0:
        s.run[parent].branches += 1
    new.count, new.running, new.place, new.think_log = 0, 0, -1, -1.0
    new.since_s = new.begin_s = new.gap_s = new.mean = new.squares = 0.0
    new.tier = 0
    new.expires_s, new.best = np.inf, -np.inf
    for level in range(LEVELS):
        new.held[level] = 0
    s.slot[_slot_of(s, keys[0])] = run
    return run


@njit(cache=True)
def append_use(s, run):
    """Make a run the last in order."""
    s.run[run].place = s.size[N_ORDER]
    s.order[s.size[N_ORDER]] = run
    s.size[N_ORDER] += 1


@njit(cache=True)
def tidy_order(s):
    """Drop places that runs have left, and runs that no cache holds any part of."""
    kept, runs, order = 0, s.run, s.order
    for at in range(s.size[N_ORDER]):
        use = runs[order[at]]
        if use.place != at:
            continue
        held = 0
        for level in range(LEVELS):
            held += use.held[level]
        use.place = kept if held > 0 else -1
        if held > 0:
            order[kept] = order[at]
            kept += 1
    s.size[N_ORDER] = s.size[N_LIVE] = kept


def forget(s: Runs, limit: int, pinned) -> np.ndarray:
    """Forget the longest unused runs beyond `limit` chunks; returns where runs are now, -1 = gone.

    `pinned` are the levels of which no chunk is forgotten that they hold.

    A run is never used later than those before it, so prefixes stay whole.
    """
    runs = s.run[: s.size[N_RUNS]]
    newest = np.lexsort((runs["depth"], -runs["touch"]))
    keep = np.zeros(len(runs), bool)
    keep[newest[np.cumsum(runs["length"][newest]) <= limit]] = True
    keep |= (runs["held"][:, pinned] > 0).any(axis=1) | (runs["running"] > 0)
    before = runs["parent"][keep]
    while len(before := before[(before >= 0) & ~keep[before]]):
        keep[before] = True
        before = runs["parent"][before]
    tidy_order(s)
    to = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)
    _move(s, runs[keep], to)
    logs = [s.log["run"][: s.size[N_LOG + which], which] for which in range(2)]
    for places in (s.order[: s.size[N_ORDER]], *logs):
        places[:] = np.where(places >= 0, to[places], -1)
    s.counter[:LEVELS] = s.run["held"][: s.size[N_RUNS]].sum(axis=0)
    return to


def _move(s, kept, to):
    """Let these be all runs, with their new numbers; their keys move to the front."""
    starts = np.cumsum(kept["length"], dtype=np.int64) - kept["length"]
    moved = np.repeat(kept["start"] - starts, kept["length"])  # by so many places, of each key
    s.keys[: len(moved)] = s.keys[moved + np.arange(len(moved))]
    kept["start"], later = starts, kept["parent"] >= 0
    kept["parent"][later] = to[kept["parent"][later]]
    kept["branches"] = np.bincount(kept["parent"][later], minlength=len(kept))
    s.run[: len(kept)] = kept
    s.size[N_RUNS], s.size[N_KEYS] = len(kept), len(moved)
    s.slot[:] = -1
    fill_slots(s)
