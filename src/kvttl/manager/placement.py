"""Carries decisions out; no thread and no clock of its own: the manager calls it under a lock."""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from caching_heuristics import TIER_CODES, TIERS
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.lmcache.layout import (
    BaseController,
    by_hottest,
    has_nothing_colder,
    hits_by_tier,
    reachable,
)
from kvttl.manager.claims import ClaimLedger, Step

logger = logging.getLogger(__name__)

_BATCH_STEPS = 256  # expired claims a sweep looks up and moves at once
_BATCH_LATE = 32  # look-ups of a sweep for claims that could not be made before
_MAX_LATE = 1_000  # prompts whose claim waits for LMCache; a few kB of token ids each
_MAX_UNSETTLED = 100_000  # claims whose KV could not yet go where it belongs
_MAX_REMEMBERED = 200_000  # chunks; about 150 bytes each
_LONGEST_RETRY_S = 60.0


class _Unsettled(NamedTuple):
    step: Step
    kind: str  # of the record once it is done
    tries: int
    not_before_s: float


class KVPlacement:
    """Keeps each chunk where the hottest live claim wants it.

    Parameters
    ----------
    controller : BaseController
        Says where KV is, and moves it.
    ledger : ClaimLedger
        The claims.
    log_claim : callable
        Gets the fields of each claim before its KV moves: the place to write it down.

    Attributes
    ----------
    has_lost_claims : bool
        A bounded table was full: some KV may have no claim until it is adopted.
    """

    def __init__(
        self,
        controller: BaseController,
        ledger: ClaimLedger,
        log_claim: Callable[[Mapping[str, Any]], Any] = lambda _entry: None,
    ) -> None:
        self.controller = controller
        self.ledger = ledger
        self.log_claim = log_claim
        self.has_lost_claims = False
        self._last_tier: OrderedDict[str, str] = OrderedDict()  # chunk key -> where last seen
        self._unsettled: OrderedDict[str, _Unsettled] = OrderedDict()  # by prompt digest
        self._late: OrderedDict[str, tuple] = OrderedDict()  # claims not yet made, by digest

    @property
    def unsettled(self) -> int:
        """Claims whose KV is not yet where it belongs."""
        return len(self._unsettled) + len(self._late)

    # ---- one decision ------------------------------------------------------------

    def place(
        self,
        entry: dict[str, Any],
        tokens: Sequence[int],
        cached_tokens: int,
        now_s: float,
    ) -> None:
        """Claim a prompt's chunks as ``entry`` has decided, and move them there.

        Parameters
        ----------
        entry : dict
            Fields of a DecisionRecord, with ``prompt_digest``, ``wanted_tier`` and
            ``ttl_s``; filled step by step, so that a failure leaves what was known before it.
        tokens : sequence of int
            The prompt.
        cached_tokens : int
            Of these, how many the engine did not have to compute.
        now_s : float
            The access, seconds.
        """
        owner = entry["prompt_digest"]
        claim = (entry["wanted_tier"], now_s, entry["ttl_s"])
        self._late.pop(owner, None)
        try:
            layout = self.controller.layout(tokens)
        except Exception:
            self.claim_later(owner, tokens, claim)
            raise
        held = self._without_load_buffers(layout, cached_tokens)
        entry["chunks"], entry["chunk_keys"] = len(held), layout.keys
        entry["tier_before"] = entry["tier_after"] = by_hottest(held)
        entry["hit_tokens"] = hits_by_tier(held, cached_tokens, self.controller.chunk_size_tokens)
        self.ledger.claim(owner, layout.keys, *claim)
        self._unsettled.pop(owner, None)  # this decision looks at all of its chunks
        self._settle(entry, tokens, layout, held, cached_tokens, now_s)

    def claim_later(self, owner: str, tokens: Sequence[int], claim: tuple) -> None:
        """Let a sweep make a claim (tier, the access's time, TTL), unless one waits already."""
        if owner not in self._late:
            self._put(self._late, owner, (tokens, claim), _MAX_LATE)

    def _settle(self, entry, tokens, layout, held, cached_tokens, now_s):
        """Move what is not where it is wanted; what cannot be moved yet is tried again later."""
        plan = self._plan(held, self.ledger.wanted(layout.keys, now_s), cached_tokens)
        moves = entry["moves"] = []
        if plan:
            self.log_claim(entry)
        if any(target == "gpu" for _, target, _ in plan):
            self._forget(layout.keys)  # whatever fails now: from here on believe the directory
        done = False
        try:
            if not all(held):
                self.controller.check_health()  # says why, if LMCache is away
            for (source, target, timeout_s), chunks in plan.items():
                moves.append(self._move(source, target, timeout_s, tokens=tokens, chunks=chunks))
            done = all(move["status"] not in ("timeout", "partial") for move in moves)
        finally:
            if not done:
                wanted = entry["wanted_tier"]
                step = Step(entry["prompt_digest"], layout.keys, wanted, wanted, entry["ttl_s"])
                self._try_later(step, 0, now_s)
        if any(move["moved_chunks"] for move in moves):
            held = self.controller.layout_of(layout.keys).of(self.controller.instance_id)
            entry["tier_after"] = by_hottest(held)
        self._remember(layout.keys, held)
        if any(move["to"] == "gpu" and move["status"] != "done" for move in moves):
            self._forget(layout.keys)  # it may be there, or still come: believe the directory

    def _plan(self, held, wanted, cached_tokens):
        """Group the chunks that have to move: (source, target, timeout) -> indices."""
        fresh_from = self._touched_chunks(cached_tokens, held)  # from here on just computed
        plan: dict[tuple[str, str, float | None], list[int]] = {}
        for index, (tiers, tier) in enumerate(zip(held, wanted)):
            fresh = index >= fresh_from
            source = tiers[0] if tiers else "gpu"
            # A copy whose write failed may never come: said in the record, looked for again.
            missing = fresh or not tiers or has_nothing_colder(tiers, tier)
            target = tier if missing else reachable(tiers, tier)
            if source != target and target is not None:
                # Only a store that is still under way is worth waiting for.
                timeout_s = None if fresh or target == "gpu" else 0.0
                plan.setdefault((source, target, timeout_s), []).append(index)
        return plan

    def _move(self, source, target, timeout_s, **what):
        here = self.controller.instance_id
        status = self.controller.move([here, source], [here, target], timeout_s=timeout_s, **what)
        del status["layout"]  # the rest goes into a record
        return status

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
        codes = [TIER_CODES[self._last_tier.get(key, "gpu")] for key in keys]
        return tuple(
            tuple(tier for tier in tiers if TIER_CODES[tier] >= code) or tiers
            for tiers, code in zip(held, codes)
        )

    def _touched_chunks(self, tokens, held):
        """Return how many chunks `tokens` tokens of prefix touch."""
        return -(-tokens // self.controller.chunk_size_tokens) if tokens and held else 0

    def _remember(self, keys, held):
        """Keep where each chunk was last seen, for the next look (bounded)."""
        for key, tiers in zip(keys, held):
            if tiers:
                self._put(self._last_tier, key, tiers[0], _MAX_REMEMBERED)
            else:
                self._last_tier.pop(key, None)

    def _forget(self, keys):
        for key in keys:
            self._last_tier.pop(key, None)

    # ---- expiry ------------------------------------------------------------------

    def sweep(self, now_s: float) -> list[dict[str, Any]]:
        """Take one batch of expired claims down the ladder, and try again what failed before.

        Returns
        -------
        list of dict
            Fields of a DecisionRecord for each claim; empty = nothing was due. What
            fails is part of its entry and is tried again by a later sweep.
        """
        self._claim_late(now_s)
        due = [_Unsettled(s, "expiry", 0, now_s) for s in self.ledger.sweep(now_s, _BATCH_STEPS)]
        again = [u for u in self._unsettled.values() if u.not_before_s <= now_s][:_BATCH_STEPS]
        for unsettled in again:
            del self._unsettled[unsettled.step.owner]
        newer = {unsettled.step.owner for unsettled in due}
        batch = due + [unsettled for unsettled in again if unsettled.step.owner not in newer]
        return self._carry_out(batch, now_s) if batch else []

    def _claim_late(self, now_s):
        """Make some of the claims of prompts that were generated while LMCache was away."""
        for owner, (tokens, claim) in list(self._late.items())[:_BATCH_LATE]:
            try:
                keys = self.controller.layout(tokens).keys
                self.ledger.claim(owner, keys, *claim)
            except LMCacheUnavailable as error:
                logger.info("claims wait: %s", error)
                return  # so would the others
            except Exception as error:
                logger.warning("a claim could not be made: %s: %s", type(error).__name__, error)
                self._late.pop(owner, None)
                self.has_lost_claims = True
                continue
            self._late.pop(owner, None)
            self._log_late(owner, keys, claim)
            tier, _, ttl_s = claim
            self.settle_later(Step(owner, tuple(keys), tier, tier, ttl_s), now_s)

    def _log_late(self, owner, keys, claim):
        names = ("prompt_digest", "chunk_keys", "chunks", "wanted_tier", "time_s", "ttl_s")
        self.log_claim(dict(zip(names, (owner, tuple(keys), len(keys), *claim))))

    def _carry_out(self, batch, now_s):
        start_s = time.perf_counter()
        keys = list(dict.fromkeys(key for item in batch for key in item.step.chunks))
        before, after, failures, error = {}, {}, {}, ""
        try:
            before = after = self._tiers_of(keys)
            if not all(before.values()):
                self.controller.check_health()  # gone, or is only the directory empty?
            failures = self._lower(before, dict(zip(keys, self.ledger.wanted(keys, now_s))))
            after = self._tiers_of(keys)
            self._remember(after, after.values())
        except Exception as problem:  # LMCache is away, or a bug: neither may end the sweeper
            error = f"{type(problem).__name__}: {problem}"
            logger.info("a sweep failed: %s", error)
        latency_s = time.perf_counter() - start_s
        entries, taken = [], set()
        for item in batch:
            mine = [key for key in item.step.chunks if key not in taken]  # shared: in the first
            taken.update(mine)
            left = {key: failures[key] for key in mine if key in failures}
            entry = _entry(item, mine, before, after, left, now_s)
            entry |= {"error": error, "manage_s": latency_s / len(batch)}
            self._complete_moves(entry["moves"], latency_s)
            if error or left:
                self._try_later(item.step, item.tries, now_s)
            if item.tries == 0 or not (error or left):  # not a record for each vain try
                entries.append(entry)
        return entries

    def _tiers_of(self, keys):
        layout = self.controller.layout_of(keys)
        held = self._as_last_seen(layout.keys, layout.of(self.controller.instance_id))
        return dict(zip(layout.keys, held))

    def _lower(self, held, wanted):
        """Move chunks down to where they are wanted; returns those that stay, with the reason."""
        plan: dict[tuple[str, str | None], list[str]] = {}
        for key, tiers in held.items():
            target = reachable(tiers, wanted[key]) if tiers and wanted[key] else wanted[key]
            if tiers and (target is None or TIER_CODES[tiers[0]] < TIER_CODES[target]):
                plan.setdefault((tiers[0], target), []).append(key)
        failures = {}
        for (source, target), keys in plan.items():
            if target is None:
                left, reason = self.controller.discard(keys), "a copy is still shown (in use?)"
            else:
                move = self._move(source, target, None, keys=keys)
                left, reason = len(keys) - move["moved_chunks"], move["reason"]
            if left:
                failures |= dict.fromkeys(self._still_above(keys, target), (target, reason))
        # A chunk that has nothing colder to fall back on waits for a copy to appear.
        stuck = [key for key, tiers in held.items() if has_nothing_colder(tiers, wanted[key])]
        return {key: (wanted[key], "no colder copy seen") for key in stuck} | failures

    def _still_above(self, keys, target):
        limit = len(TIERS) if target is None else TIER_CODES[target]
        held = self._tiers_of(keys)
        return [key for key, tiers in held.items() if tiers and TIER_CODES[tiers[0]] < limit]

    def _complete_moves(self, moves, latency_s):
        for move in moves:
            tokens = move["moved_chunks"] * self.controller.chunk_size_tokens
            move |= {"moved_tokens": tokens, "latency_s": latency_s}

    def settle_later(self, step: Step, now_s: float) -> None:
        """Let the next sweep move a claim's chunks down to where they are wanted."""
        item = _Unsettled(step, "settled", 0, now_s)
        self._put(self._unsettled, step.owner, item, _MAX_UNSETTLED)

    def _try_later(self, step, tries, now_s):
        wait_s = min(2.0**tries, _LONGEST_RETRY_S)
        item = _Unsettled(step, "settled", tries + 1, now_s + wait_s)
        self._put(self._unsettled, step.owner, item, _MAX_UNSETTLED)

    def _put(self, table, key, value, limit):
        """Add the newest entry of a bounded table; the oldest go."""
        table.pop(key, None)
        table[key] = value
        while len(table) > limit:
            table.popitem(last=False)
            self.has_lost_claims |= table is not self._last_tier


def _entry(item, mine, before, after, left, now_s):
    """Return what became of one claim of a sweep, as fields of a DecisionRecord."""
    step = item.step
    moved = Counter(
        (before[key][0], after[key][0] if after.get(key) else "dropped")
        for key in mine
        if before.get(key) and before[key][:1] != after.get(key, ())[:1]
    )
    moves = [
        {"from": s, "to": t, "status": "done", "reason": "", "moved_chunks": n, "skipped": {}}
        for (s, t), n in moved.items()
    ]
    stays = Counter(
        (before[key][0], target or "dropped", reason) for key, (target, reason) in left.items()
    )
    moves += [
        {"from": s, "to": t, "status": "timeout", "reason": r, "moved_chunks": 0, "skipped": {r: n}}
        for (s, t, r), n in stays.items()
    ]
    return {
        "kind": item.kind,
        "time_s": now_s,
        "prompt_digest": step.owner,
        "chunks": len(step.chunks),
        "ttl_s": step.ttl_s,
        "from_tier": step.from_tier if step.from_tier != step.tier else None,
        "wanted_tier": step.tier,
        "tier_before": by_hottest(before.get(key, ()) for key in step.chunks),
        "tier_after": by_hottest(after.get(key, ()) for key in step.chunks),
        "moves": moves,
    }
