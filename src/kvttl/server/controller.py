"""The manager's eyes and hands inside an LMCache server: no HTTP, no directory, no delay.

And what gpu had no room for, until it has.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from caching_heuristics import TIER_CODES, TIERS
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.lmcache.layout import (
    BaseController,
    KVLayout,
    Outcome,
    check_tokens,
    is_above,
    outcome_of,
)
from kvttl.lmcache.lease import ServerLease
from kvttl.lmcache.salts import chunk_key, kept_under
from kvttl.server.hands import Hands
from kvttl.server.places import TIERS_OF, UNDECIDED, Chunk, Model, Places

_NEW_S = 60.0
_COMING_S = 2.0  # a store may come so long after its request's end
_MOST_PUT_DOWN = 10_000  # chunks that are remembered
_BACK_CHUNKS = 64  # that come back at once


class InsideController(BaseController):
    """Knows and moves the KV cache of one model of the LMCache server that it runs in.

    Every direction is possible, also between the tiers below gpu.

    Parameters
    ----------
    context : MPCacheServerContext
        LMCache's.
    model : Model
        Whose KV cache this is.
    places, hands : Places, Hands
        Of the whole server.
    instance_id : str
        The server's.
    lease : ServerLease
        The right to manage the server, which all its models share.
    """

    def __init__(
        self,
        context: Any,
        model: Model,
        places: Places,
        hands: Hands,
        instance_id: str,
        lease: ServerLease,
    ) -> None:
        self.instance_id, self.chunk_size_tokens = instance_id, context.chunk_size
        self._hasher, self._model, self._lease = context.token_hasher, model, lease
        self._places, self._hands = places, hands
        self._epoch, self._in_force = 0, False

    def layout(self, tokens: Sequence[int], cache_salt: str = "") -> KVLayout:
        """Return where each complete chunk of `tokens` is, under a salt."""
        digests = self._hasher.compute_chunk_hashes(check_tokens(tokens))
        salt = kept_under(cache_salt)
        return self.layout_of([chunk_key(digest.hex(), salt) for digest in digests])

    def layout_of(self, keys: Sequence[str] | None = None) -> KVLayout:
        """Return where chunks are, by their keys.

        None: all of this model, less what came just now and waits for its request's decision.
        """
        if keys is None:
            new_s, chunks = time.time() - _NEW_S, self._places.chunks(self._model)
            chunks = [c for c in chunks if c.ends_s is not UNDECIDED or c.since_s < new_s]
        else:
            chunks = self._places.of_keys(self._model, keys)
        held = tuple(TIERS_OF[chunk.bits] for chunk in chunks)
        keys = tuple(chunk.key for chunk in chunks) if keys is None else tuple(keys)
        return KVLayout(keys, {self.instance_id: held} if any(held) else {})

    def discard(self, keys: Sequence[str]) -> int:
        """Delete every copy of some chunks; returns how many chunks keep one.

        Of chunks that are seen nowhere too: they may be older than this server.
        """
        chunks = self._places.of_keys(self._model, keys)
        for tier in ("gpu", *self._hands.tiers):
            there = [c for c in chunks if not c.bits or tier in TIERS_OF[c.bits]]
            self._hands.delete(there, tier)
        return sum(bool(chunk.bits) for chunk in chunks)

    def reachable(self, tiers: Sequence[str], wanted: str | None) -> str | None:
        """Return the wanted tier, or the next one that this server has."""
        if wanted in (None, "gpu", *self._hands.tiers) or not self._hands.can_copy:
            return super().reachable(tiers, wanted) if not self._hands.can_copy else wanted
        at = TIER_CODES[wanted]
        there = [tier for tier in (*TIERS[at:], *TIERS[at::-1]) if tier in self._hands.tiers]
        return there[0] if there else "gpu"

    def has_nothing_colder(self, tiers: Sequence[str], wanted: str | None) -> bool:
        """Say whether a copy has to be waited for: never, where it can be made."""
        return not self._hands.can_copy and super().has_nothing_colder(tiers, wanted)

    def lease(self) -> ServerLease:
        """Return the right to manage this server."""
        return self._lease

    def tier_errors(self) -> Mapping[str, str]:
        """Return why tiers take no copies."""
        return self._hands.failing()

    def room_chunks(self) -> tuple[int | None, int | None, int | None]:
        """Return how many chunks gpu has room for; of disk and remote nobody knows."""
        return (self._hands.hot_bytes() // self.chunk_bytes(), None, None)

    def chunk_bytes(self) -> int:
        """Return what a chunk takes on all ranks."""
        space = self._places.space(*self._model, "")
        if space is None or not space.size_bytes:
            raise LMCacheUnavailable(f"no engine of {self._model.name} has come yet")
        return space.all_bytes

    def held_chunks(self) -> Counter[str]:
        """Return how many chunks of this model each tier holds."""
        chunks = self._places.chunks(self._model)
        return Counter(tier for chunk in chunks for tier in TIERS_OF[chunk.bits])

    def valued(self, in_force: bool, keys: Sequence[str], answer: Any) -> None:
        """Let gpu's order follow what a policy says of chunks.

        `in_force`: which of its orders is. What it said in another one goes before all others.
        """
        self._epoch += in_force != self._in_force
        self._in_force = in_force
        hot = (answer.tier == TIER_CODES["gpu"]) & (answer.ttl_s > 0)
        worths = [v if is_hot else -math.inf for v, is_hot in zip(answer.value.tolist(), hot)]
        chunks = self._places.of_keys(self._model, keys)
        self._places.valued(chunks, [(self._epoch, worth) for worth in worths])

    def close(self) -> None:
        """Leave the right to the server to its other models."""

    def _move(self, request: Any, layout: KVLayout, due: Iterable[int]) -> Outcome:
        keys, target = [layout.keys[i] for i in due], request.target
        chunks = self._places.of_keys(self._model, keys)
        missing = [chunk for chunk in chunks if target not in TIERS_OF[chunk.bits]]
        wait_s = _COMING_S if request.timeout_s is None else request.timeout_s
        self._hands.copy(missing, target, wait_s)
        there = [chunk for chunk in chunks if target in TIERS_OF[chunk.bits]]
        for tier in TIERS if is_above(request.source, target) else ():
            if is_above(tier, target):
                hotter = [chunk for chunk in there if tier in TIERS_OF[chunk.bits]]
                self._hands.delete(hotter, tier)
        left = self.layout_of(keys)
        outcome = outcome_of(target, len(there), len(chunks) - len(there), left)
        kept = sum(is_above(held[0], target) for held in left.of(self.instance_id) if held)
        outcome.skip("hotter copy still shown (in use?)", kept)
        return outcome


class PutDown:
    """Chunks that left gpu only for want of room, until there is room again.

    Nothing comes back before what gpu holds has fallen below ``low * low / high`` of it, its
    watermarks; then it is filled up to `low`. So what comes back makes no pressure, and relief,
    which ends at `low`, lets nothing back.

    Parameters
    ----------
    usage : callable
        Returns the bytes that are used in gpu, and all.
    places : Places
        Knows what is coming to gpu.
    """

    def __init__(self, usage: Callable[[], tuple[int, int]], places: Places) -> None:
        self._usage, self._places, self._lock = usage, places, threading.Lock()
        self._chunks: dict[Chunk, None] = {}  # the last ones to go, which are worth most, last
        self._is_filling = False

    def __len__(self) -> int:
        return len(self._chunks)

    def note(self, chunks: Iterable[Chunk]) -> None:
        """Remember those of some chunks that have a copy below gpu; forgets what went first."""
        with self._lock:
            self._chunks |= dict.fromkeys(chunk for chunk in chunks if chunk.is_cold)
            too_many = max(len(self._chunks) - _MOST_PUT_DOWN, 0)
            for chunk in list(itertools.islice(self._chunks, too_many)):
                del self._chunks[chunk]

    def take(self, high: float, low: float) -> list[Chunk]:
        """Forget and return what may come back now, some chunks: what is worth most first."""
        used, total = self._usage() if self._chunks else (0, 0)
        used += self._places.coming.total()
        begins = low if self._is_filling else low * low / high
        room = low * total - used if used < begins * total else 0
        best = self._best(room) if room > 0 else []
        self._is_filling = bool(best)
        return best

    def _best(self, room_bytes):
        with self._lock:
            self._chunks = {chunk: None for chunk in self._chunks if chunk.is_cold}
            decided = [chunk for chunk in self._chunks if chunk.ends_s is not UNDECIDED]
            best = heapq.nlargest(_BACK_CHUNKS, decided, lambda c: (c.ends_s, -c.depth))
            sizes = itertools.accumulate(chunk.space.all_bytes for chunk in best)
            best = [chunk for chunk, size in zip(best, sizes) if size <= room_bytes]
            for chunk in best:
                del self._chunks[chunk]
        return best
