"""After a restart: claims from the decision log, so that no KV lives for ever.

What the log does not account for (the process died before it could write) is
found in LMCache's directory and gets a claim of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from kvttl.decisions.log import DecisionRecord
from kvttl.lmcache.client import LMCacheError
from kvttl.manager.claims import owner_of
from kvttl.manager.draft import Wish
from kvttl.manager.settling import Settler, Unsettled

logger = logging.getLogger(__name__)


def recover_claims(
    settler: Settler, records: Iterable[DecisionRecord], now_s: float, adopted_ttl_s: float
) -> dict[str, int]:
    """Make the claims again that a log holds, and claim the KV that none accounts for.

    Parameters
    ----------
    settler : Settler
        Gets the claims.
    records : iterable of DecisionRecord
        All kinds, each writer's in the order in which it wrote them.
    now_s : float
        Claims whose time is up by now step down at the next sweep.
    adopted_ttl_s : float
        TTL of chunks that LMCache holds and no record names, from now on, in
        the tier where they are, seconds.

    Returns
    -------
    dict
        ``claims`` made again, ``adopted`` chunks, ``unsettled`` claims (their KV is
        hotter than the log says it should be: the next sweep moves it down).

    Raises
    ------
    LMCacheUnavailable, LMCacheError
        The directory cannot be read; the log's claims are made all the same.
    """
    latest = [r for r in _latest_claims(records) if _claim_again(settler, r)]
    settler.may_be_unseen |= bool(latest)
    held = settler.held()
    known = {key for record in latest for key in record.chunk_keys}
    adopted = settler.adopt(held, known, now_s, adopted_ttl_s)
    too_hot = settler.too_hot(held, now_s)
    unsettled = [record for record in latest if too_hot.keys() & record.chunk_keys]
    for record in unsettled:
        settler.settle_later(Unsettled(record.prompt_digest, _wish(record), record.chunk_keys))
    for key in too_hot.keys() - known:  # of claims that are there already
        settler.settle_later(Unsettled(owner_of(key), Wish(too_hot[key], now_s, None), (key,)))
    return {"claims": len(latest), "adopted": adopted, "unsettled": len(unsettled)}


def _wish(record):
    return Wish(record.wanted_tier, record.time_s, record.ttl_s)


def _claim_again(settler, record):
    """Make a logged claim; False where the record makes no sense: its KV is adopted then."""
    try:
        settler.ledger.claim(record.prompt_digest, record.chunk_keys, *_wish(record))
    except ValueError as error:
        logger.warning("a logged claim is left out: %s", error)
        return False
    return True


def adopt_unclaimed(settler: Settler, now_s: float, ttl_s: float) -> None:
    """Claim KV whose claim had to give way to others in a full table."""
    if settler.has_unclaimed:
        adopt_strays(settler, now_s, ttl_s)


def adopt_strays(settler: Settler, now_s: float, ttl_s: float) -> None:
    """Claim KV that had no claim at the last look either, so that none lives for ever.

    It was stored by others, or its claim was lost. What a decision under way is about
    has one at the next look. Where a claim gave way, there is no wait for that.
    """
    at_once, settler.has_unclaimed = settler.has_unclaimed, False  # another may give way meanwhile
    try:
        held = settler.held()
    except LMCacheError as error:
        settler.has_unclaimed |= at_once
        logger.info("looking for KV without a claim waits: %s", error)
        return
    unclaimed = settler.unclaimed(held, now_s)
    stray = {key: held[key] for key in (unclaimed if at_once else unclaimed & settler.strays)}
    if stray:
        settler.adopt(stray, frozenset(), now_s, ttl_s)
    settler.strays = unclaimed - stray.keys()


def _latest_claims(records):
    """Return the last decision about each prompt whose KV was not dropped since."""
    latest: dict[str, DecisionRecord] = {}
    for record in records:
        if record.kind in ("generation", "claim") and record.ttl_s and record.wanted_tier:
            earlier = latest.get(record.prompt_digest)
            if earlier and earlier.time_s > record.time_s:  # it was only written down later
                continue
            if earlier and not record.chunk_keys:  # LMCache was away and named no chunks
                record = replace(record, chunk_keys=earlier.chunk_keys)
            if record.chunk_keys:
                latest[record.prompt_digest] = record
        elif record.kind in ("expiry", "settled") and _was_dropped(record):
            claim = latest.get(record.prompt_digest)
            # One that was made meanwhile, of a generation just before, is another claim.
            if claim is not None and claim.time_s + claim.ttl_s <= record.time_s:
                del latest[record.prompt_digest]
    return sorted(latest.values(), key=attrgetter("time_s"))


def _was_dropped(record):
    gone = record.wanted_tier is None and not record.error
    return gone and all(move.get("status") == "done" for move in record.moves)
