"""Puts KV where its claims want it, later: TTLs that ended, and what could not be done at once.

No thread and no clock of its own. How it keeps clear of decisions: see `motion`.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from operator import attrgetter
from typing import Any, NamedTuple

from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.lmcache.layout import by_hottest, is_above
from kvttl.lmcache.salts import salt_of
from kvttl.manager.claims import ClaimLedger, owner_of
from kvttl.manager.draft import Wish, claim_record
from kvttl.manager.generation import compact
from kvttl.manager.motion import Motion
from kvttl.manager.tables import BoundedTable

logger = logging.getLogger(__name__)

_BATCH_CLAIMS = 256  # expired claims a sweep looks up at once
_BATCH_CHUNKS = 128  # chunks a sweep moves at once
_BATCH_LATE = 32  # look-ups of a sweep for claims that could not be made before
_MAX_LATE, _MAX_LATE_BYTES = 1_000, 16 * 2**20
_MAX_UNSETTLED, _MAX_UNSETTLED_BYTES = 100_000, 64 * 2**20
_KEY_BYTES = 120  # a chunk key of 64 digits, and its place in a tuple
_LONGEST_RETRY_S = 60.0
_OTHER_MOVE = "another move of it is under way"


class Unsettled(NamedTuple):
    """A wish whose chunks are to be moved to where they are wanted, or first to be named."""

    owner: str
    wish: Wish  # its tier None = wanted in none
    chunks: tuple[str, ...] = ()  # none yet: a late one
    ended_in: str | None = None  # the tier whose TTL has just passed
    tokens: array | None = None  # where it is late or hot: LMCache names and prefetches by prompt
    tries: int = 0
    not_before_s: float = 0.0
    cache_salt: str = ""  # of a late one; else its chunks' keys say it
    why: str = ""  # a policy could not be asked

    @property
    def size_bytes(self):
        tokens = 0 if self.tokens is None else self.tokens.itemsize * len(self.tokens)
        return sum(_KEY_BYTES + len(salt_of(key)) for key in self.chunks) + tokens

    @property
    def salt(self):
        return salt_of(self.chunks[0]) if self.chunks else self.cache_salt


def under(cache_salt: str) -> dict[str, str]:
    """Return the argument that names a salt; a controller that knows none is not asked for one."""
    return {"cache_salt": cache_salt} if cache_salt else {}


class Settler:
    """Keeps the claims that wait: for a name of their chunks, or for their KV to be moved.

    Parameters
    ----------
    ledger : ClaimLedger
        The claims.
    motion : Motion
        Keeps moves apart; its lock guards the tables here. Its controller says where KV is.
    write_ahead : callable
        Gets a record of each claim before its KV moves: the place to write it down.

    Attributes
    ----------
    has_unclaimed : bool
        A bounded table was full: some KV may have no claim until it is adopted.
    may_be_unseen : bool
        The directory may not show all KV that is claimed: claims are older than this process.
    strays : set of str
        Keys of KV that had no claim at the last look.
    """

    def __init__(
        self, ledger: ClaimLedger, motion: Motion, write_ahead: Callable[[DecisionRecord], Any]
    ) -> None:
        self.ledger, self._motion, self.write_ahead = ledger, motion, write_ahead
        self._controller = motion.controller
        self.has_unclaimed, self.may_be_unseen, self.strays = False, False, frozenset()
        size_bytes = attrgetter("size_bytes")
        self._unsettled = BoundedTable(_MAX_UNSETTLED, _MAX_UNSETTLED_BYTES, size_bytes)
        self._late = BoundedTable(_MAX_LATE, _MAX_LATE_BYTES, size_bytes)

    @property
    def unsettled(self) -> int:
        """Claims whose KV is not yet where it belongs, and those that are not made yet."""
        return len(self._unsettled) + len(self._late)

    def replaced(self, owner: str, accessed_s: float) -> None:
        """Forget what waits for a prompt that is being placed anew; under the lock."""
        late = self._late.get(owner)
        if late is not None and late.wish.accessed_s <= accessed_s:
            self._late.pop(owner)
        self._unsettled.pop(owner)

    def sweep(self, now_s: float) -> list[DecisionRecord]:
        """Take one batch of expired claims down the ladder, and try again what failed before.

        Returns
        -------
        list of DecisionRecord
            One a claim; empty = nothing was due. What fails is part of its record and
            is tried again by a later sweep.
        """
        self._claim_late(now_s)
        with self._motion.lock:
            steps = self.ledger.sweep(now_s, _BATCH_CLAIMS)
            again = [item for item in self._unsettled.values() if item.not_before_s <= now_s]
            again = [self._unsettled.pop(item.owner) for item in again[:_BATCH_CLAIMS]]
        due = [
            Unsettled(s.owner, Wish(s.tier, now_s, s.ttl_s), s.chunks, s.from_tier, why=s.why)
            for s in steps
        ]
        newer = {step.owner for step in steps}
        batch = due + [item for item in again if item.owner not in newer]
        return self._settle(batch, now_s) if batch else []

    def bring_back(self, keys: tuple[str, ...], now_s: float) -> DecisionRecord:
        """Have chunks of one salt in gpu again, those that are still wanted there; only once.

        Their controller finds chunks by their keys. What fails waits for the next request.
        """
        start_s, tokens = time.perf_counter(), array("q")
        item = Unsettled(owner_of(keys[-1]), Wish("gpu", now_s, None), keys, tokens=tokens)
        with self._motion.watch() as others:
            before = self._motion.tiers_of(keys)
            self._promote(item, before, now_s, others, set())
            after = self._motion.tiers_of(keys)
        moves = self._moves(keys, before, after, {}, time.perf_counter() - start_s)
        return _record_of(item, before, after, now_s, moves=tuple(moves))

    def _settle(self, batch, now_s):
        """Move the chunks of claims to where they are wanted; returns the records."""
        start_s, before, after, failures, error = time.perf_counter(), {}, {}, {}, ""
        keys = list(dict.fromkeys(key for item in batch for key in item.chunks))
        try:
            with self._motion.watch() as others:
                before = after = self._motion.tiers_of(keys)
                if not all(before.values()):
                    self._controller.check_health()  # gone, or is only the directory empty?
                    self._drop_forgotten(before, now_s, others)
                failures = self._lower(before, now_s, others)
                doubtful = set()
                for item in batch:
                    failures |= self._promote(item, before, now_s, others, doubtful)
                after = self._motion.tiers_of(keys)
                self._motion.remember(after, after.values(), others | doubtful)
        except Exception as problem:  # LMCache is away, or a bug: neither may end the sweeper
            error = f"{type(problem).__name__}: {problem}"
            logger.info("a sweep failed: %s", error)
        latency_s = time.perf_counter() - start_s
        records, taken = [], set()
        for item in batch:
            mine = [key for key in item.chunks if key not in taken]  # shared: in the first
            taken.update(mine)
            left = {key: failures[key] for key in mine if key in failures}
            if error or left:
                self.try_again(item, now_s)
            if item.tries == 0 or not (error or left):  # not a record for each vain try
                moves = tuple(self._moves(mine, before, after, left, latency_s))
                made = {"moves": moves, "error": error, "manage_s": latency_s / len(batch)}
                records.append(_record_of(item, before, after, now_s, **made))
        return records

    def _drop_forgotten(self, held, now_s, others):
        """Delete copies that no claim wants and that a restarted coordinator does not show."""
        if not (self.may_be_unseen or self._controller.has_forgotten()):
            return
        unseen = [key for key, tiers in held.items() if not tiers and key not in others]
        with self._motion.lock:
            wanted = self.ledger.wanted(unseen, now_s)
            mine = [key for key, tier in zip(unseen, wanted) if tier is None]
            self._motion.begin(mine, others)
        try:
            self._controller.discard(mine)
        finally:
            self._motion.end(mine)

    def _lower(self, held, now_s, others):
        """Move chunks down to where they are wanted; returns those that stay, with the reason."""
        wanted = dict(zip(held, self.ledger.wanted(list(held), now_s)))
        plan: dict[tuple[str, str | None], list[str]] = {}
        for key, tiers in held.items():
            if way := self._way_down(tiers, wanted[key]):
                plan.setdefault(way, []).append(key)
        # A chunk that has nothing colder to fall back on waits for a copy to appear.
        alone = [
            key
            for key, tiers in held.items()
            if self._controller.has_nothing_colder(tiers, wanted[key])
        ]
        left = {key: (wanted[key], "no colder copy seen") for key in alone}
        for way, keys in plan.items():
            for start in range(0, len(keys), _BATCH_CHUNKS):
                some = keys[start : start + _BATCH_CHUNKS]
                left |= self._lower_some(way, some, held, now_s, others)
        return left

    def _way_down(self, tiers, wanted):
        """Return the move of a chunk that is hotter than it is wanted, as (source, target).

        The target None = dropped; the answer None = it stays.
        """
        target = self._controller.reachable(tiers, wanted) if tiers else None
        goes = bool(tiers) and (target is None or is_above(tiers[0], target))
        return (tiers[0], target) if goes else None

    def _lower_some(self, way, keys, held, now_s, others):
        """Move chunks that are still wanted there now; returns those that stay."""
        source, target = way
        with self._motion.lock:
            wanted = self.ledger.wanted(keys, now_s)
            keys = [
                key for key, tier in zip(keys, wanted) if self._way_down(held[key], tier) == way
            ]
            left = dict.fromkeys(others.intersection(keys), (target, _OTHER_MOVE))
            mine = [key for key in keys if key not in left]
            self._motion.begin(mine, others)
        try:
            if mine and target is None:
                stay, reason = self._controller.discard(mine), "a copy is still shown (in use?)"
            elif mine:
                move, _ = self._motion.move(source, target, keys=mine)
                stay, reason = len(mine) - move["moved_chunks"], move["reason"]
            if mine and stay:
                left |= dict.fromkeys(self._still_above(mine, target), (target, reason))
        finally:
            self._motion.end(mine)
        return left

    def _still_above(self, keys, target):
        held = self._motion.tiers_of(keys).items()
        return [k for k, tiers in held if tiers and (not target or is_above(tiers[0], target))]

    def _promote(self, item, held, now_s, others, doubtful):
        """Carry out a wish for gpu that another move was in the way of; returns what still is."""
        if item.tokens is None:
            return {}
        ways: dict[str, list[int]] = {}
        with self._motion.lock:
            wanted = self.ledger.wanted(item.chunks, now_s)
            hot = [index for index, tier in enumerate(wanted) if tier == "gpu"]
            left = others.intersection(item.chunks[index] for index in hot)
            for index in hot:
                key, tiers = item.chunks[index], held.get(item.chunks[index])
                if tiers and tiers[0] != "gpu" and key not in left:
                    ways.setdefault(tiers[0], []).append(index)
            mine = [item.chunks[index] for chunks in ways.values() for index in chunks]
            promoted = item.chunks if mine else ()
            self._motion.begin(mine, others, promoted)
        doubtful.update(promoted)  # a copy may still come
        try:
            for source, chunks in ways.items():
                what = {"tokens": item.tokens.tolist(), "chunks": chunks, **under(item.salt)}
                if not item.tokens:
                    what = {"keys": [item.chunks[index] for index in chunks]}
                self._motion.move(source, "gpu", **what)
        finally:
            self._motion.end(mine, promoted)
        return dict.fromkeys(left, ("gpu", _OTHER_MOVE))

    def _moves(self, keys, before, after, left, latency_s):
        """Yield what has moved, and what is `left`, as the moves of a record."""
        done = Counter(
            (before[key][0], after[key][0] if after.get(key) else "dropped")
            for key in keys
            if before.get(key) and before[key][:1] != after.get(key, ())[:1]
        )
        vain = Counter((before[key][0], to or "dropped", why) for key, (to, why) in left.items())
        size = self._controller.chunk_size_tokens if done else 0
        for (source, target, *why), chunks in (*done.items(), *vain.items()):
            move = {"from": source, "to": target, "status": "timeout" if why else "done"}
            moved = 0 if why else chunks
            move |= {"reason": "".join(why), "skipped": dict.fromkeys(why, chunks)}
            move |= {"moved_chunks": moved, "moved_tokens": moved * size, "latency_s": latency_s}
            yield move

    # ---- claims that wait -----------------------------------------------------------

    def claim_later(
        self, owner: str, tokens: Sequence[int], wish: Wish, cache_salt: str = ""
    ) -> None:
        """Let a sweep make a claim, unless one of a later access waits already."""
        tokens = tokens if isinstance(tokens, array) else compact(tokens)
        with self._motion.lock:
            waiting = self._late.get(owner)
            if waiting is None or waiting.wish.accessed_s < wish.accessed_s:
                late = Unsettled(owner, wish, tokens=tokens, cache_salt=cache_salt)
                self.has_unclaimed |= self._late.put(owner, late) > 0

    def _claim_late(self, now_s):
        """Make some of the claims of prompts that were generated while LMCache was away."""
        with self._motion.lock:
            batch = list(itertools.islice(self._late.values(), _BATCH_LATE))
        for late in batch:
            try:
                with self._motion.watch() as others:
                    tokens, salt = late.tokens.tolist(), under(late.cache_salt)
                    keys = self._controller.layout(tokens, **salt).keys
                    with self._motion.lock:
                        self.ledger.claim(late.owner, keys, *late.wish)
                        contested = not others.isdisjoint(keys)
            except LMCacheUnavailable as error:
                logger.info("claims wait: %s", error)
                return  # so would the others
            except Exception as error:
                logger.warning("a claim could not be made: %s: %s", type(error).__name__, error)
                self.has_unclaimed = True
            else:
                self.write_ahead(claim_record(late.owner, keys, late.wish))
                tokens = late.tokens if contested else None
                self.settle_later(late._replace(chunks=keys, tokens=tokens))
            with self._motion.lock:
                if self._late.get(late.owner) is late:  # not one that came meanwhile
                    self._late.pop(late.owner)

    def try_again(self, item: Unsettled, now_s: float) -> None:
        """Let a sweep try again, after a pause that doubles from try to try."""
        not_before_s = now_s + min(2.0**item.tries, _LONGEST_RETRY_S)
        again = {"tries": item.tries + 1, "not_before_s": not_before_s, "ended_in": None}
        self.settle_later(item._replace(**again))

    def settle_later(self, item: Unsettled) -> None:
        """Let the next sweep move chunks; what came for the same prompt meanwhile stays: newer."""
        with self._motion.lock:
            newer = self._unsettled.get(item.owner)
            if newer is not None:
                item = newer if newer.tokens is not None else newer._replace(tokens=item.tokens)
            self.has_unclaimed |= self._unsettled.put(item.owner, item) > 0

    # ---- for `recovery` ---------------------------------------------------------------

    def held(self) -> dict[str, tuple[str, ...]]:
        """Return where each chunk of this LMCache server is."""
        layout = self._controller.layout_of()
        return dict(zip(layout.keys, layout.of(self._controller.instance_id)))

    def adopt(
        self, held: Mapping[str, Sequence[str]], claimed: Set[str], now_s: float, ttl_s: float
    ) -> int:
        """Claim each chunk that is held but has no claim, where it is; returns how many.

        A record is written of each: else every restart would give it a new TTL.
        `claimed` are keys whose claims are known to have ended, or to go on.
        """
        adopted = []
        with self._motion.watch() as others, self._motion.lock:
            wanted = self.ledger.wanted(list(held), now_s)
            for (key, tiers), tier in zip(held.items(), wanted):
                if tiers and tier is None and key not in claimed and key not in others:
                    wish = Wish(tiers[0], now_s, ttl_s)
                    self.ledger.claim(owner_of(key), (key,), *wish)
                    adopted.append(claim_record(owner_of(key), (key,), wish))
        for record in adopted:
            self.write_ahead(record)
        return len(adopted)

    def unclaimed(self, held: Mapping[str, Sequence[str]], now_s: float) -> set[str]:
        """Return the chunks that are held and that no claim wants."""
        wanted = zip(held.items(), self.ledger.wanted(list(held), now_s))
        return {key for (key, tiers), tier in wanted if tiers and tier is None}

    def too_hot(self, held: Mapping[str, Sequence[str]], now_s: float) -> dict[str, str]:
        """Return where chunks are wanted that are hotter than any claim wants them."""
        wanted = zip(held.items(), self.ledger.wanted(list(held), now_s))
        return {
            k: tier for (k, tiers), tier in wanted if tier and tiers and is_above(tiers[0], tier)
        }


def _record_of(item, before, after, now_s, **made):
    """Return the record of what became of one claim of a sweep."""
    kind = "expiry" if item.ended_in else "settled"
    wanted = {"wanted_tier": item.wish.tier, "ttl_s": item.wish.ttl_s, "from_tier": item.ended_in}
    wanted |= {"cache_salt": item.salt, "policy_error": item.why}
    for name, held in (("tier_before", before), ("tier_after", after)):
        made[name] = by_hottest(held.get(key, ()) for key in item.chunks)
    return DecisionRecord(now_s, item.owner, kind=kind, chunks=len(item.chunks), **wanted, **made)
