"""Carries decisions and expiries out; no thread and no clock of its own.

Several threads may be in here at once: decisions, and a sweep. One lock guards the
bookkeeping and is never held over a call to the controller, so that nobody waits for
another's moves. What holds all the same:

1. One move at a time for each chunk. A move begins under the lock: chunks that another
   move is about are left out, and so are those that the claims, looked at again, do not
   want there any more. The rest counts as *moving* until the move has ended.
2. A claim is made under the same lock. So a wish is either seen by a move that begins
   later, or it sees the chunks that are moving. Then its prompt becomes *unsettled*, with
   its tokens, and a sweep carries the wish out once the other move has ended: a hotter
   wish made during a move down ends up hotter.
3. A copy is deleted only by the controller, after it has seen a colder one; the last ones
   only if no claim wanted the chunk when the delete began.
4. Where a chunk was last seen is remembered only if no promotion began or ended since the
   look-up: an old answer must not hide a new hot copy.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from threading import Lock
from typing import Any, NamedTuple

from caching_heuristics import TIER_CODES
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.lmcache.layout import (
    BaseController,
    by_hottest,
    has_nothing_colder,
    hits_by_tier,
    is_above,
    reachable,
)
from kvttl.manager.claims import ClaimLedger
from kvttl.manager.draft import Draft, Wish, claim_record
from kvttl.manager.generation import compact
from kvttl.manager.tables import BoundedTable

logger = logging.getLogger(__name__)

_BATCH_CLAIMS = 256  # expired claims a sweep looks up at once
_BATCH_CHUNKS = 128  # chunks a sweep moves at once
_BATCH_LATE = 32  # look-ups of a sweep for claims that could not be made before
_MAX_LATE, _MAX_LATE_BYTES = 1_000, 16 * 2**20
_MAX_UNSETTLED, _MAX_UNSETTLED_BYTES = 100_000, 64 * 2**20
_KEY_BYTES = 120  # a chunk key of 64 digits, and its place in a tuple
_MAX_REMEMBERED = 200_000  # chunks; about 150 bytes each
_LONGEST_RETRY_S = 60.0
_OTHER_MOVE = "another move of it is under way"


class _Late(NamedTuple):
    """A claim that waits for LMCache to name the prompt's chunks."""

    owner: str
    tokens: array
    wish: Wish

    @property
    def size_bytes(self):
        return self.tokens.itemsize * len(self.tokens)


class _Unsettled(NamedTuple):
    """A claim whose chunks are to be moved to where they are wanted."""

    owner: str
    chunks: tuple[str, ...]
    tier: str | None  # wanted; None = in none
    ttl_s: float | None
    ended_in: str | None = None  # the tier whose TTL has just passed
    tokens: array | None = None  # where a promotion is due: LMCache prefetches by prompt
    tries: int = 0
    not_before_s: float = 0.0

    @property
    def size_bytes(self):
        tokens = 0 if self.tokens is None else self.tokens.itemsize * len(self.tokens)
        return _KEY_BYTES * len(self.chunks) + tokens


class KVPlacement:
    """Keeps each chunk where the hottest live claim wants it; safe for concurrent use.

    Parameters
    ----------
    controller : BaseController
        Says where KV is, and moves it.
    ledger : ClaimLedger
        The claims.
    write_ahead : callable
        Gets a record of each claim before its KV moves: the place to write it down.

    Attributes
    ----------
    has_unclaimed : bool
        A bounded table was full: some KV may have no claim until it is adopted.
    """

    def __init__(
        self,
        controller: BaseController,
        ledger: ClaimLedger,
        write_ahead: Callable[[DecisionRecord], Any] = lambda _record: None,
    ) -> None:
        self.controller, self.ledger, self._write_ahead = controller, ledger, write_ahead
        self.has_unclaimed = False
        self._lock = Lock()  # guards all below; never held over a call to the controller
        self._moving: set[str] = set()
        self._promotions = 0  # how many have begun, plus how many have ended
        self._last_tier: OrderedDict[str, str] = OrderedDict()  # chunk key -> where last seen
        size = _size_bytes
        self._unsettled = BoundedTable(_MAX_UNSETTLED, _MAX_UNSETTLED_BYTES, size)
        self._late = BoundedTable(_MAX_LATE, _MAX_LATE_BYTES, size)

    @property
    def unsettled(self) -> int:
        """Claims whose KV is not yet where it belongs, and those that are not made yet."""
        return len(self._unsettled) + len(self._late)

    # ---- one decision ------------------------------------------------------------

    def place(self, draft: Draft, tokens: Sequence[int], cached_tokens: int) -> None:
        """Claim a prompt's chunks as `draft` has decided, and move them there.

        Parameters
        ----------
        draft : Draft
            With a wish; what is found and done is filled in.
        tokens : sequence of int
            The prompt.
        cached_tokens : int
            Of these, how many the engine did not have to compute.
        """
        seen = self._promotions
        try:
            layout = self.controller.layout(tokens)
        except Exception:
            self.claim_later(draft.prompt_digest, tokens, draft.wish)
            draft.claimed = True
            raise
        held = self._without_load_buffers(layout, cached_tokens)
        draft.chunks, draft.chunk_keys = len(held), layout.keys
        draft.tier_before = draft.tier_after = by_hottest(held)
        draft.hit_tokens = hits_by_tier(held, cached_tokens, self.controller.chunk_size_tokens)
        plan, contested = self._claim(draft, layout.keys, held, cached_tokens)
        moving = [layout.keys[index] for chunks in plan.values() for index in chunks]
        settled = False
        try:
            held = self._move_planned(draft, tokens, layout, held, plan)
            settled = not contested and all(
                move["status"] not in ("timeout", "partial") for move in draft.moves
            )
        finally:
            self._end(moving, layout.keys if _promotes(plan) else ())
            if not settled:
                wait = (draft.prompt_digest, layout.keys, draft.wanted_tier, draft.ttl_s)
                again = compact(tokens) if contested else None
                self._try_again(_Unsettled(*wait, tokens=again), draft.time_s)
        self._remember(layout.keys, held, seen)

    def _claim(self, draft, keys, held, cached_tokens):
        """Make the claim and begin the moves that it needs; returns these, as in `_plan`.

        The second answer says whether other moves are about some of the chunks.
        """
        with self._lock:
            self._make_claim(draft.prompt_digest, keys, draft.wish)
            draft.claimed = True
            wanted = self.ledger.wanted(keys, draft.time_s)
            contested = {index for index, key in enumerate(keys) if key in self._moving}
            plan = self._plan(held, wanted, cached_tokens, contested)
            moving = [keys[index] for chunks in plan.values() for index in chunks]
            self._begin(moving, keys if _promotes(plan) else ())
        return plan, bool(contested)

    def _make_claim(self, owner, keys, wish):
        """Make a claim; what was still to be done for the prompt's last one is part of this."""
        self.ledger.claim(owner, keys, *wish)
        late = self._late.get(owner)
        if late is not None and late.wish.accessed_s <= wish.accessed_s:
            self._late.pop(owner)
        self._unsettled.pop(owner)

    def _plan(self, held, wanted, cached_tokens, contested):
        """Group the chunks that have to move: (source, target, timeout) -> indices."""
        fresh_from = self._touched_chunks(cached_tokens, held)  # from here on just computed
        plan: dict[tuple[str, str, float | None], list[int]] = {}
        for index, (tiers, tier) in enumerate(zip(held, wanted)):
            fresh = index >= fresh_from
            source = tiers[0] if tiers else "gpu"
            # A copy whose write failed may never come: said in the record, looked for again.
            missing = fresh or not tiers or has_nothing_colder(tiers, tier)
            target = tier if missing else reachable(tiers, tier)
            if index not in contested and source != target and target is not None:
                # Only a store that is still under way is worth waiting for.
                timeout_s = None if fresh or target == "gpu" else 0.0
                plan.setdefault((source, target, timeout_s), []).append(index)
        return plan

    def _move_planned(self, draft, tokens, layout, held, plan):
        """Carry a plan out; returns where the chunks are then."""
        if plan:
            self._write_ahead(claim_record(draft.prompt_digest, layout.keys, draft.wish))
        if not all(held):
            self.controller.check_health()  # says why, if LMCache is away
        tiers = dict(zip(layout.keys, held))
        for (source, target, timeout_s), chunks in plan.items():
            what = {"tokens": tokens, "chunks": chunks, "layout": layout}
            move, seen = self._move(source, target, timeout_s, **what)
            draft.moves.append(move)
            if move["moved_chunks"]:
                tiers |= seen
                draft.tier_after = by_hottest(tiers.values())
        return tuple(tiers.values())

    def _move(self, source, target, timeout_s, **what):
        """Return what a move did, and where its chunks were seen last."""
        here = self.controller.instance_id
        done = self.controller.move([here, source], [here, target], timeout_s=timeout_s, **what)
        layout = done.pop("layout")  # the rest goes into a record
        return done, {} if layout is None else dict(zip(layout.keys, layout.of(here)))

    # ---- moves that are under way --------------------------------------------------

    def _begin(self, keys, promoted=()):
        """Count chunks as moving; `promoted`: those that may get hotter (under the lock)."""
        self._moving.update(keys)
        self._forget(promoted)

    def _end(self, keys, promoted=()):
        with self._lock:
            self._moving.difference_update(keys)
            self._forget(promoted)

    def _forget(self, keys):
        """Believe the directory about these chunks, whatever now becomes of a promotion."""
        self._promotions += bool(keys)
        for key in keys:
            self._last_tier.pop(key, None)

    # ---- what the engine took from where -----------------------------------------

    def _without_load_buffers(self, layout, cached_tokens):
        """Return each chunk's tiers, less the L1 copies that a load from L2 has just made.

        The directory shows such a copy for an instant, until the delete that
        follows the load; a chunk that was colder and has been a hit since
        cannot have become hot by itself.
        """
        held = layout.of(self.controller.instance_id)
        hits = self._touched_chunks(cached_tokens, held)
        return self._as_last_seen(layout.keys[:hits], held) + held[hits:]

    def _as_last_seen(self, keys, held):
        """Return the tiers of chunks without those hotter than where they were last seen."""
        with self._lock:
            codes = [TIER_CODES[self._last_tier.get(key, "gpu")] for key in keys]
        return tuple(
            tuple(tier for tier in tiers if TIER_CODES[tier] >= code) or tiers
            for tiers, code in zip(held, codes)
        )

    def _touched_chunks(self, tokens, held):
        """Return how many chunks `tokens` tokens of prefix touch."""
        return -(-tokens // self.controller.chunk_size_tokens) if tokens and held else 0

    def _remember(self, keys, held, seen):
        """Keep where chunks were seen below gpu, for the next look (bounded)."""
        with self._lock:
            for key, tiers in zip(keys, held):
                self._last_tier.pop(key, None)
                if seen == self._promotions and tiers and tiers[0] != "gpu":
                    self._last_tier[key] = tiers[0]
            while len(self._last_tier) > _MAX_REMEMBERED:
                self._last_tier.popitem(last=False)

    # ---- expiry ------------------------------------------------------------------

    def sweep(self, now_s: float) -> list[DecisionRecord]:
        """Take one batch of expired claims down the ladder, and try again what failed before.

        Returns
        -------
        list of DecisionRecord
            One a claim; empty = nothing was due. What fails is part of its record and
            is tried again by a later sweep.
        """
        self._claim_late(now_s)
        with self._lock:
            due = [
                _Unsettled(step.owner, step.chunks, step.tier, step.ttl_s, step.from_tier)
                for step in self.ledger.sweep(now_s, _BATCH_CLAIMS)
            ]
            again = [item for item in self._unsettled.values() if item.not_before_s <= now_s]
            again = [self._unsettled.pop(item.owner) for item in again[:_BATCH_CLAIMS]]
        newer = {item.owner for item in due}
        batch = due + [item for item in again if item.owner not in newer]
        return self._settle(batch, now_s) if batch else []

    def _settle(self, batch, now_s):
        """Move the chunks of claims to where they are wanted; returns the records."""
        start_s, seen = time.perf_counter(), self._promotions
        keys = list(dict.fromkeys(key for item in batch for key in item.chunks))
        before, after, failures, error = {}, {}, {}, ""
        try:
            before = after = self._tiers_of(keys)
            if not all(before.values()):
                self.controller.check_health()  # gone, or is only the directory empty?
            failures = self._lower(before, now_s)
            for item in batch:
                failures |= self._promote(item, before, now_s)
            after = self._tiers_of(keys)
            self._remember(after, after.values(), seen)
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
                self._try_again(item, now_s)
            if item.tries == 0 or not (error or left):  # not a record for each vain try
                moves = [*self._done(mine, before, after), *_not_done(before, left)]
                for move in moves:
                    move["latency_s"] = latency_s
                made = {"moves": tuple(moves), "error": error, "manage_s": latency_s / len(batch)}
                records.append(_record_of(item, before, after, now_s, **made))
        return records

    def _tiers_of(self, keys):
        layout = self.controller.layout_of(keys)
        held = self._as_last_seen(layout.keys, layout.of(self.controller.instance_id))
        return dict(zip(layout.keys, held))

    def _lower(self, held, now_s):
        """Move chunks down to where they are wanted; returns those that stay, with the reason."""
        wanted = dict(zip(held, self.ledger.wanted(list(held), now_s)))
        plan: dict[tuple[str, str | None], list[str]] = {}
        for key, tiers in held.items():
            if way := _way_down(tiers, wanted[key]):
                plan.setdefault(way, []).append(key)
        # A chunk that has nothing colder to fall back on waits for a copy to appear.
        alone = [key for key, tiers in held.items() if has_nothing_colder(tiers, wanted[key])]
        left = {key: (wanted[key], "no colder copy seen") for key in alone}
        for way, keys in plan.items():
            for start in range(0, len(keys), _BATCH_CHUNKS):
                left |= self._lower_some(way, keys[start : start + _BATCH_CHUNKS], held, now_s)
        return left

    def _lower_some(self, way, keys, held, now_s):
        """Move chunks that are still wanted there now; returns those that stay."""
        (source, target), left = way, {}
        with self._lock:
            wanted = self.ledger.wanted(keys, now_s)
            keys = [key for key, tier in zip(keys, wanted) if _way_down(held[key], tier) == way]
            mine = [key for key in keys if key not in self._moving]
            left = dict.fromkeys(self._moving.intersection(keys), (target, _OTHER_MOVE))
            self._begin(mine)
        try:
            if mine and target is None:
                stay, reason = self.controller.discard(mine), "a copy is still shown (in use?)"
            elif mine:
                move, _ = self._move(source, target, None, keys=mine)
                stay, reason = len(mine) - move["moved_chunks"], move["reason"]
            if mine and stay:
                left |= dict.fromkeys(self._still_above(mine, target), (target, reason))
        finally:
            self._end(mine)
        return left

    def _still_above(self, keys, target):
        held = self._tiers_of(keys)
        return [key for key, tiers in held.items() if tiers and is_above(tiers[0], target)]

    def _promote(self, item, held, now_s):
        """Carry out a wish for gpu that another move was in the way of; returns what still is."""
        if item.tokens is None:
            return {}
        ways: dict[str, list[int]] = {}
        with self._lock:
            wanted = self.ledger.wanted(item.chunks, now_s)
            hot = [index for index, tier in enumerate(wanted) if tier == "gpu"]
            left = self._moving.intersection(item.chunks[index] for index in hot)
            for index in hot:
                tiers = held.get(item.chunks[index])
                if tiers and tiers[0] != "gpu" and item.chunks[index] not in left:
                    ways.setdefault(tiers[0], []).append(index)
            mine = [item.chunks[index] for chunks in ways.values() for index in chunks]
            self._begin(mine, item.chunks if mine else ())
        try:
            for source, chunks in ways.items():
                self._move(source, "gpu", None, tokens=item.tokens.tolist(), chunks=chunks)
        finally:
            self._end(mine, item.chunks if mine else ())
        return dict.fromkeys(left, ("gpu", _OTHER_MOVE))

    def _done(self, keys, before, after):
        """Return what has moved, as the moves of a record."""
        moved = Counter(
            (before[key][0], after[key][0] if after.get(key) else "dropped")
            for key in keys
            if before.get(key) and before[key][:1] != after.get(key, ())[:1]
        )
        size = self.controller.chunk_size_tokens if moved else 0
        for (source, target), chunks in moved.items():
            done = {"from": source, "to": target, "status": "done", "reason": "", "skipped": {}}
            yield {**done, "moved_chunks": chunks, "moved_tokens": chunks * size}

    # ---- claims that wait -----------------------------------------------------------

    def claim_later(self, owner: str, tokens: Sequence[int], wish: Wish) -> None:
        """Let a sweep make a claim, unless one of a later access waits already."""
        late = _Late(owner, tokens if isinstance(tokens, array) else compact(tokens), wish)
        with self._lock:
            waiting = self._late.get(owner)
            if waiting is None or waiting.wish.accessed_s < wish.accessed_s:
                self.has_unclaimed |= self._late.put(owner, late) > 0

    def _claim_late(self, now_s):
        """Make some of the claims of prompts that were generated while LMCache was away."""
        with self._lock:
            batch = list(itertools.islice(self._late.values(), _BATCH_LATE))
        for late in batch:
            try:
                keys = self.controller.layout(late.tokens.tolist()).keys
                self.ledger.claim(late.owner, keys, *late.wish)
            except LMCacheUnavailable as error:
                logger.info("claims wait: %s", error)
                return  # so would the others
            except Exception as error:
                logger.warning("a claim could not be made: %s: %s", type(error).__name__, error)
                self.has_unclaimed = True
            else:
                self._write_ahead(claim_record(late.owner, keys, late.wish))
                self.settle_later(late.owner, keys, late.wish)
            with self._lock:
                if self._late.get(late.owner) is late:  # not one that came meanwhile
                    self._late.pop(late.owner)

    def settle_later(self, owner: str, keys: tuple[str, ...], wish: Wish) -> None:
        """Let the next sweep move a claim's chunks down to where they are wanted."""
        with self._lock:
            if self._unsettled.get(owner) is None:  # else it will, and may know more
                item = _Unsettled(owner, keys, wish.tier, wish.ttl_s)
                self.has_unclaimed |= self._unsettled.put(owner, item) > 0

    def _try_again(self, item, now_s):
        """Let a sweep try again, after a pause that doubles from try to try."""
        not_before_s = now_s + min(2.0**item.tries, _LONGEST_RETRY_S)
        again = {"tries": item.tries + 1, "not_before_s": not_before_s, "ended_in": None}
        with self._lock:
            self.has_unclaimed |= self._unsettled.put(item.owner, item._replace(**again)) > 0

    # ---- for `recovery` ---------------------------------------------------------------

    def held(self) -> dict[str, tuple[str, ...]]:
        """Return where each chunk of this LMCache server is."""
        layout = self.controller.layout_of()
        return dict(zip(layout.keys, layout.of(self.controller.instance_id)))

    def adopt(
        self, held: Mapping[str, Sequence[str]], claimed: Set[str], now_s: float, ttl_s: float
    ) -> int:
        """Claim each chunk that is held but has no claim, where it is; returns how many.

        A record is written of each: else every restart would give it a new TTL.
        `claimed` are keys whose claims are known to have ended, or to go on.
        """
        adopted = []
        with self._lock:
            wanted = self.ledger.wanted(list(held), now_s)
            for (key, tiers), tier in zip(held.items(), wanted):
                if tiers and tier is None and key not in claimed and key not in self._moving:
                    wish = Wish(tiers[0], now_s, ttl_s)
                    self.ledger.claim(key[:16], (key,), *wish)
                    adopted.append(claim_record(key[:16], (key,), wish))
        for record in adopted:
            self._write_ahead(record)
        return len(adopted)

    def too_hot(self, held: Mapping[str, Sequence[str]], now_s: float) -> set[str]:
        """Return the chunks that are hotter than any claim wants them."""
        wanted = zip(held.items(), self.ledger.wanted(list(held), now_s))
        return {key for (key, tiers), tier in wanted if tier and tiers and is_above(tiers[0], tier)}


def _size_bytes(waiting):
    return waiting.size_bytes


def _promotes(plan):
    return any(target == "gpu" for _, target, _ in plan)


def _way_down(tiers, wanted):
    """Return the move of a chunk that is hotter than it is wanted, as (source, target).

    The target None = dropped; the answer None = it stays.
    """
    target = reachable(tiers, wanted) if tiers else None
    goes = bool(tiers) and (target is None or is_above(tiers[0], target))
    return (tiers[0], target) if goes else None


def _not_done(before, left):
    """Return what could not be moved, as the moves of a record."""
    stays = Counter(
        (before[key][0], target or "dropped", reason) for key, (target, reason) in left.items()
    )
    for (source, target, reason), chunks in stays.items():
        vain = {"from": source, "to": target, "status": "timeout", "reason": reason}
        yield {**vain, "moved_chunks": 0, "moved_tokens": 0, "skipped": {reason: chunks}}


def _record_of(item, before, after, now_s, **made):
    """Return the record of what became of one claim of a sweep."""
    return DecisionRecord(
        now_s,
        item.owner,
        kind="expiry" if item.ended_in else "settled",
        chunks=len(item.chunks),
        ttl_s=item.ttl_s,
        from_tier=item.ended_in,
        wanted_tier=item.tier,
        tier_before=by_hottest(before.get(key, ()) for key in item.chunks),
        tier_after=by_hottest(after.get(key, ()) for key in item.chunks),
        **made,
    )
