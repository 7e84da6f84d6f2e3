"""Carries one decision out: claims the prompt's chunks, and moves them where they are wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from kvttl.lmcache.layout import by_hottest, hits_by_tier
from kvttl.manager.draft import Draft, claim_record
from kvttl.manager.generation import compact
from kvttl.manager.motion import Motion
from kvttl.manager.settling import Settler, Unsettled, under


class KVPlacement:
    """Claims and moves the KV of prompts; any thread may, see `motion`.

    Parameters
    ----------
    settler : Settler
        Gets what cannot be done at once.
    motion : Motion
        Keeps moves apart. Its controller says where KV is.
    advise : callable
        (draft, chunk keys) -> None: the last word about what is wanted, once the chunks are named.
    """

    def __init__(
        self, settler: Settler, motion: Motion, advise: Callable[[Draft, Sequence[str]], None]
    ) -> None:
        self._controller, self._settler, self._motion = motion.controller, settler, motion
        self._advise = advise

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
        with self._motion.watch() as others:
            try:
                layout = self._controller.layout(tokens, **under(draft.cache_salt))
            except Exception:
                owner, salt = draft.prompt_digest, draft.cache_salt
                self._settler.claim_later(owner, tokens, draft.wish, salt)
                draft.claimed = True
                raise
            self._place(draft, tokens, layout, cached_tokens, others)

    def _place(self, draft, tokens, layout, cached_tokens, others):
        """Claim, and move what is not where it is wanted; the rest is tried again later."""
        self._advise(draft, layout.keys)
        held = self._without_load_buffers(layout, cached_tokens)
        draft.chunks, draft.chunk_keys = len(held), layout.keys
        draft.tier_errors = self._controller.tier_errors()
        draft.tier_before = draft.tier_after = by_hottest(held)
        draft.hit_tokens = hits_by_tier(held, cached_tokens, self._controller.chunk_size_tokens)
        draft.wanted_again = self._wanted_again(draft, tokens, layout.keys, cached_tokens)
        plan = self._claim(draft, layout.keys, held, cached_tokens, others)
        contested, promotes = not others.isdisjoint(layout.keys), _promotes(plan)
        settled = False
        try:
            held = self._move_planned(draft, tokens, layout, held, plan)
            vain = any(move["status"] in ("timeout", "partial") for move in draft.moves)
            settled = not (contested or vain)
            if not promotes:  # else believe the directory: a copy may be there, or still come
                self._motion.remember(layout.keys, held, others)
        finally:
            self._motion.end(_keys_of(plan, layout.keys), layout.keys if promotes else ())
            if not settled:
                hot = compact(tokens) if contested else None
                again = Unsettled(draft.prompt_digest, draft.wish, layout.keys, tokens=hot)
                self._settler.try_again(again, draft.time_s)

    def _wanted_again(self, draft, tokens, keys, cached_tokens):
        """Return the tokens that were computed although they had been kept, by why they were gone.

        The chunk of a prompt's last token is computed in any case.
        """
        size = self._controller.chunk_size_tokens
        missed = keys[cached_tokens // size : (len(tokens) - 1) // size]
        before = self._settler.ledger.wanted_before(missed, draft.time_s)
        failing = dict.fromkeys(draft.tier_errors, "tier_error")
        why = Counter(failing.get(t, "room" if t else "ttl") for t in before if t is not None)
        return {reason: chunks * size for reason, chunks in why.items()}

    def _claim(self, draft, keys, held, cached_tokens, others):
        """Make the claim and begin the moves that it needs; returns these, as in `_plan`."""
        ledger = self._settler.ledger
        with self._motion.lock:
            if draft.parts:
                ledger.claim_parts(keys, draft.parts, draft.time_s)
            else:
                ledger.claim(draft.prompt_digest, keys, *draft.wish)
            self._settler.replaced(draft.prompt_digest, draft.time_s)
            draft.claimed = True
            wanted = ledger.wanted(keys, draft.time_s)
            plan = self._plan(keys, held, wanted, cached_tokens, others)
            self._motion.begin(_keys_of(plan, keys), others, keys if _promotes(plan) else ())
        return plan

    def _plan(self, keys, held, wanted, cached_tokens, others):
        """Group the chunks that have to move: (source, target, timeout) -> indices."""
        fresh_from = self._touched_chunks(cached_tokens, held)  # from here on just computed
        plan: dict[tuple[str, str, float | None], list[int]] = {}
        for index, (tiers, tier) in enumerate(zip(held, wanted)):
            fresh = index >= fresh_from
            source = tiers[0] if tiers else "gpu"
            # A copy whose write failed may never come: said in the record, looked for again.
            missing = fresh or not tiers or self._controller.has_nothing_colder(tiers, tier)
            target = tier if missing else self._controller.reachable(tiers, tier)
            if keys[index] not in others and source != target and target is not None:
                # Only a store that is still under way is worth waiting for.
                timeout_s = None if fresh or target == "gpu" else 0.0
                plan.setdefault((source, target, timeout_s), []).append(index)
        return plan

    def _move_planned(self, draft, tokens, layout, held, plan):
        """Carry a plan out; returns where the chunks are then."""
        if plan:
            self._settler.write_ahead(claim_record(draft.prompt_digest, layout.keys, draft.wish))
        if not all(held):
            self._controller.check_health()  # says why, if LMCache is away
        tiers = dict(zip(layout.keys, held))
        for (source, target, timeout_s), chunks in plan.items():
            what = {"tokens": tokens, "chunks": chunks, "layout": layout}
            move, seen = self._motion.move(source, target, timeout_s, **what)
            draft.moves.append(move)
            if move["moved_chunks"]:
                tiers |= seen
                draft.tier_after = by_hottest(tiers.values())
        return tuple(tiers.values())

    def _without_load_buffers(self, layout, cached_tokens):
        """Return each chunk's tiers, less the L1 copies that a load from L2 has just made.

        The directory shows such a copy for an instant, until the delete that
        follows the load; a chunk that was colder and has been a hit since
        cannot have become hot by itself.
        """
        held = layout.of(self._controller.instance_id)
        hits = self._touched_chunks(cached_tokens, held)
        return self._motion.as_last_seen(layout.keys[:hits], held) + held[hits:]

    def _touched_chunks(self, tokens, held):
        """Return how many chunks `tokens` tokens of prefix touch."""
        return -(-tokens // self._controller.chunk_size_tokens) if tokens and held else 0


def _keys_of(plan, keys):
    return [keys[index] for chunks in plan.values() for index in chunks]


def _promotes(plan):
    return any(target == "gpu" for _, target, _ in plan)
