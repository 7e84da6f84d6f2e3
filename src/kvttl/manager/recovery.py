"""After a restart: claims from the decision log, so that no KV lives for ever.

What the log does not account for (the process died before it could write) is
found in LMCache's directory and gets a claim of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from kvttl.decisions.log import DecisionRecord
from kvttl.lmcache.client import LMCacheError, LMCacheUnavailable
from kvttl.lmcache.layout import is_above
from kvttl.manager.claims import Step
from kvttl.manager.placement import KVPlacement

logger = logging.getLogger(__name__)


def recover_claims(
    placement: KVPlacement, records: Iterable[DecisionRecord], now_s: float, adopted_ttl_s: float
) -> dict[str, int]:
    """Make the claims again that a log holds, and claim the KV that none accounts for.

    Parameters
    ----------
    placement : KVPlacement
        Gets the claims.
    records : iterable of DecisionRecord
        All kinds, in time order.
    now_s : float
        Claims whose time is up by now step down at the next sweep.
    adopted_ttl_s : float
        TTL of chunks that LMCache holds and no record names, from now on, in
        the tier where they are, seconds.

    Returns
    -------
    dict
        ``claims`` made again, ``adopted`` chunks, ``misplaced`` claims (their KV is
        hotter than the log says it should be: the next sweep moves it down).

    Raises
    ------
    LMCacheUnavailable, LMCacheError
        The directory cannot be read; the log's claims are made all the same.
    """
    latest = [r for r in _latest_claims(records) if _claim_again(placement.ledger, r)]
    layout = placement.controller.layout_of()
    held = dict(zip(layout.keys, layout.of(placement.controller.instance_id)))
    known = {key for record in latest for key in record.chunk_keys}
    claimed = dict(zip(held, placement.ledger.wanted(list(held), now_s)))  # by this process too
    orphans = [k for k, tiers in held.items() if tiers and k not in known and claimed[k] is None]
    for key in orphans:
        _adopt(placement, key, held[key][0], now_s, adopted_ttl_s)
    misplaced = _misplaced(latest, held, placement.ledger, now_s)
    for record in misplaced:
        tier = record.wanted_tier
        step = Step(record.prompt_digest, record.chunk_keys, tier, tier, record.ttl_s)
        placement.settle_later(step, now_s)
    return {"claims": len(latest), "adopted": len(orphans), "misplaced": len(misplaced)}


def _adopt(placement, key, tier, now_s, ttl_s):
    """Claim a chunk, and log it: else each restart would give it a new TTL."""
    placement.ledger.claim(key[:16], [key], tier, now_s, ttl_s)
    claim = {"prompt_digest": key[:16], "chunk_keys": (key,), "chunks": 1, "wanted_tier": tier}
    placement.log_claim({**claim, "time_s": now_s, "ttl_s": ttl_s})


def _claim_again(ledger, record):
    """Make a logged claim; False where the record makes no sense: its KV is adopted then."""
    try:
        wish = (record.wanted_tier, record.time_s, record.ttl_s)
        ledger.claim(record.prompt_digest, record.chunk_keys, *wish)
    except ValueError as error:
        logger.warning("a logged claim is left out: %s", error)
        return False
    return True


def adopt_lost_claims(placement: KVPlacement, now_s: float, ttl_s: float) -> None:
    """Claim KV whose claim had to give way to others in a full table."""
    if not placement.has_lost_claims:
        return
    try:
        recover_claims(placement, (), now_s, ttl_s)
        placement.has_lost_claims = False
    except (LMCacheUnavailable, LMCacheError) as error:
        logger.info("adopting KV without a claim waits: %s", error)


def _latest_claims(records):
    """Return the last decision about each prompt whose KV was not dropped since."""
    latest: dict[str, DecisionRecord] = {}
    for record in records:
        if record.kind in ("generation", "claim") and record.ttl_s and record.wanted_tier:
            earlier = latest.pop(record.prompt_digest, None)  # so that they stay in time order
            if earlier and not record.chunk_keys:  # LMCache was away and named no chunks
                record = replace(record, chunk_keys=earlier.chunk_keys)
            if record.chunk_keys:
                latest[record.prompt_digest] = record
        elif record.kind in ("expiry", "settled") and _was_dropped(record):
            claim = latest.get(record.prompt_digest)
            # One that was made meanwhile, of a generation just before, is another claim.
            if claim is not None and claim.time_s + claim.ttl_s <= record.time_s:
                del latest[record.prompt_digest]
    return list(latest.values())


def _was_dropped(record):
    gone = record.wanted_tier is None and not record.error
    return gone and all(move["status"] == "done" for move in record.moves)


def _misplaced(records, held, ledger, now_s):
    """Return the claims with a chunk that is hotter than any claim wants it."""
    wanted = dict(zip(held, ledger.wanted(list(held), now_s)))
    above = {
        key
        for key, tiers in held.items()
        if tiers and wanted[key] is not None and is_above(tiers[0], wanted[key])
    }
    return [record for record in records if above.intersection(record.chunk_keys)]
