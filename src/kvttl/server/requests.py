"""Looks at requests where LMCache's own handlers see them, for some microseconds each."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from lmcache.v1.multiprocess.custom_types import PrepareStoreResponse

from kvttl.server.compat import PROBE
from kvttl.server.guard import Guard
from kvttl.server.hands import Hands
from kvttl.server.hints import Hints
from kvttl.server.places import Chunk, Places

_WORD_LASTS_S = 60.0  # of an engine: a busy server hears of ends late
_MOST_UNSURE = 10_000
_MAX_OPEN_S = 900.0  # LMCache ends a session that nobody ends after 600 s
_WORD_S = 1.0  # that a request's end waits for it


class Ended(NamedTuple):
    """A request that has ended, as LMCache's session shows it."""

    key: Any  # the look-up's: model, salt, and the request's settings
    tokens: list[int]
    hit_tokens: int
    began_s: float
    ended_s: float
    finish: str | None = None  # what the engine says, if it says anything
    output_tokens: int = 0


def as_output(ended: Ended, hints: Hints) -> Any:
    """Return what is known of an answer, as vLLM's RequestOutput has it."""
    stored = max(len(ended.tokens) - len(ended.key.token_ids), 0)  # of the answer, if it is too
    tokens = int(hints.wishes.get("output_tokens", ended.output_tokens or stored))
    answer = {"finish_reason": hints.wishes.get("finish", ended.finish), "token_ids": range(tokens)}
    answer |= {"text": None, "logprobs": None}
    prompt = {"prompt_token_ids": ended.tokens, "num_cached_tokens": ended.hit_tokens}
    return SimpleNamespace(**prompt, outputs=[SimpleNamespace(**answer)])


class Endings:
    """Pairs requests that have ended with what their engine says of that, in either order.

    An engine without this kit's connector says nothing. Where none has spoken yet nothing waits.

    Parameters
    ----------
    decide : callable
        Gets each `Ended`.
    """

    def __init__(self, decide: Callable[[Ended], Any]) -> None:
        self._decide, self._lock, self._has_heard = decide, threading.Lock(), False
        self._alone: dict[str, tuple[float, Any]] = {}  # request id -> since when, and which half

    def meet(self, request_id: str, half: Ended | dict[str, Any]) -> None:
        """Take a request's end, or its engine's word: ``finish`` and ``output_tokens``."""
        self._has_heard |= isinstance(half, dict)
        with self._lock:
            _, other = self._alone.pop(request_id, (0.0, None))
            waits = self._has_heard and type(other) in (type(None), type(half))
            if waits:
                self._alone[request_id] = time.monotonic(), half
        if not waits:
            ended, word = (half, other or {}) if isinstance(half, Ended) else (other, half)
            self._decide(ended._replace(**word))

    def release(self, older_s: float) -> None:
        """Let no request wait for longer; a word waits, since a busy server hears of ends late."""
        now_s = time.monotonic()
        for request_id, (since_s, half) in list(self._alone.items()):
            is_end = isinstance(half, Ended)
            is_over = since_s <= now_s - (older_s if is_end else _WORD_LASTS_S)
            if is_over and self._alone.pop(request_id, None) and is_end:
                self._decide(half)


class RequestHooks:
    """Makes room before stores, takes note of them, and hands ended requests on.

    Parameters
    ----------
    context : MPCacheServerContext
        LMCache's.
    places, hands : Places, Hands
        Of the server.
    guard : Guard
        Around all that is done here.
    ended : callable
        Gets each `Ended`, on the thread of LMCache that ends it: not to be kept waiting.

    Attributes
    ----------
    open : dict
        Request id -> when it was looked up, Unix time.
    endings : Endings
        Hears from engines how requests have ended.
    unseen : int
        Requests whose look-up did not come by here: another module has the handlers.
    reached : threading.Event
        Set once the request `PROBE` has come by here.
    """

    def __init__(
        self,
        context: Any,
        places: Places,
        hands: Hands,
        guard: Guard,
        ended: Callable[[Ended], Any],
    ) -> None:
        self._context, self._places, self._hands = context, places, hands
        self.endings = Endings(ended)
        self.open: dict[str, float] = {}
        self.unseen, self.reached = 0, threading.Event()
        self._unsure: set[tuple[str, int]] = set()  # stores that there may have been no room for
        self._has_slots = bool(context.shm_pool_info["shm_name"])  # else `commit_store` allocates
        self._note_open = guard(self._opened, "look-up")
        self._room_for = guard(self._room, "room for a store", default=contextlib.nullcontext())
        self._note_stored = guard(self._stored, "store")
        self._is_admitted = guard(self._admits, "admission", default=True)
        listener = guard(self._session_ended, "end of a session")
        context.session_manager.destroy_listeners.append(listener)

    # ---- in place of LMCache's handlers ------------------------------------------------------

    def query_prefetch_status(self, call: Callable, request_id: str) -> Any:
        """Note that requests come by here, if this one asks for that."""
        if request_id != PROBE:
            return call(request_id)
        self.reached.set()
        return 0

    def lookup(self, call: Callable, key: Any, *rest: Any) -> Any:
        """Note that a request has begun."""
        self._note_open(key)
        return call(key, *rest)

    def prepare_store(self, call: Callable, key: Any, *rest: Any) -> Any:
        """Make room where slots in shared memory are given out."""
        if not self._has_slots:
            return call(key, *rest)
        if not self._is_admitted(key):  # no slot to fill: as if all were there already
            return PrepareStoreResponse({"slots": [], "chunk_indices": []})
        with self._room_for(key):
            return call(key, *rest)

    def commit_store(self, call: Callable, key: Any, instance_id: int, data: bytes) -> Any:
        """Make room where the data comes along; note what is stored."""
        if data and not self._is_admitted(key):  # what has slots is to be committed in any case
            return True
        with self._room_for(key) if data else contextlib.nullcontext():
            done = call(key, instance_id, data)
            if done:  # noted before others look for room
                self._note_stored(key)
        return done

    def store(self, call: Callable, key: Any, *rest: Any) -> Any:
        """Make room before a GPU's KV cache is copied; note what is stored."""
        if not self._is_admitted(key):
            return b"", True  # no event to wait for
        with self._room_for(key):
            answer = call(key, *rest)
            self._note_stored(key)
        return answer

    # ---- what that means ----------------------------------------------------------------------

    def _opened(self, key):
        self.open[key.request_id] = time.time()

    def _admits(self, key):
        is_admitted = not key.request_configs or Hints(key.request_configs, math.inf).admitted
        if not is_admitted:
            self._hands.done["not stored"] += (key.end - key.start) // self._context.chunk_size
        return is_admitted

    def _room(self, key):
        space = self._places.space(key.model_name, key.world_size, key.cache_salt)
        if space is None:
            return contextlib.nullcontext()
        chunks = (key.end - key.start) // self._context.chunk_size
        room = self._hands.room_for(chunks * space.size_bytes, space.tenant)
        room.refused = lambda: self._unsure.add((key.request_id, key.start))
        return room

    def _stored(self, key):
        """Name the chunks by the hashes that LMCache has just made for itself."""
        space = self._places.space(key.model_name, key.world_size, key.cache_salt)
        if space is None:
            return
        digests, first = self._digests(key), key.start // self._context.chunk_size
        unsure = (key.request_id, key.start)
        if unsure in self._unsure:
            self._unsure.discard(unsure)
            there = self._hands.in_gpu([Chunk(space, digest) for digest in digests])
            digests = [chunk.digest for chunk in there]
        self._places.stored(space, first, digests)

    def _digests(self, key):
        session = self._context.session_manager.get(key.request_id)
        hasher = self._context.token_hasher
        if session is None or len(session.token_ids) < key.end:  # it has ended meanwhile
            return hasher.compute_chunk_hashes(list(key.token_ids), None, key.start, key.end)
        hashes = session.get_hashes(key.start, key.end)
        return hashes if isinstance(hashes[0], bytes) else list(map(hasher.hash_to_bytes, hashes))

    def _session_ended(self, session):
        began_s, key = self.open.pop(session.request_id, None), session.lookup_ipc_key
        if began_s is not None and key is not None:  # else a store came after the request's end
            hits = max(session.prefetch_hit_chunks, 0) * self._context.chunk_size
            half = Ended(key, session.token_ids, hits, began_s, time.time())
            self.endings.meet(session.request_id, half)
        elif session.prefetch_hit_chunks >= 0:
            self.unseen += 1

    def forget_lost(self) -> None:
        """Forget requests that never had a session: shorter than a chunk, or of no known model.

        Those whose engine keeps silent are decided about.
        """
        self.endings.release(_WORD_S)
        if len(self._unsure) > _MOST_UNSURE:  # of stores that failed
            self._unsure.clear()
        limit_s = time.time() - _MAX_OPEN_S
        for request_id, began_s in list(self.open.items()):
            if began_s > limit_s:
                break
            self.open.pop(request_id, None)
