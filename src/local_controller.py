"""A controller with no server: real bytes in this package's own three backends."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Mapping, Sequence

from caching_heuristics import TIER_CODES, TIERS
from kvttl.lmcache.layout import BaseController, KVLayout, Outcome, check_tokens, unseen
from storage_backends import BaseBackend, InMemoryBackend, LocalDiskBackend, RemoteBackend

MAX_TTL_S = 604_800  # bytes are kept at most this long, as max_ttl does


class LocalLMCacheController(BaseController):
    """The same interface with no server: real bytes in this package's three backends.

    It writes through as LMCache does: a stored chunk is at once in every tier.
    Other than LMCache it can copy from any tier to any other.

    Parameters
    ----------
    model : str
        Part of the chunk keys, so that models do not share KV.
    chunk_size_tokens : int
        Tokens a chunk, >= 1.
    backends : mapping, optional
        Tier -> backend; default memory, ``./cache_warm/`` and fakeredis.
    ttl_s : float
        Seconds that a backend keeps a chunk that nobody deletes.

    Examples
    --------
    >>> memory = {tier: InMemoryBackend() for tier in TIERS}
    >>> controller = LocalLMCacheController(chunk_size_tokens=2, backends=memory)
    >>> controller.store([1, 2, 3, 4, 5])  # two complete chunks
    2
    >>> controller.lookup([1, 2, 3, 4, 5])
    {'found': True, 'lmcache_default_instance': ['gpu', 'disk', 'remote']}
    >>> here = controller.instance_id
    >>> controller.move([here, "gpu"], [here, "disk"], [1, 2, 3, 4])["moved_tokens"]
    4
    """

    def __init__(
        self,
        model: str = "gemma-3-270m-it",
        *,
        chunk_size_tokens: int = 32,
        backends: Mapping[str, BaseBackend] | None = None,
        ttl_s: float = MAX_TTL_S,
    ) -> None:
        if not isinstance(chunk_size_tokens, int) or chunk_size_tokens < 1:
            raise ValueError(f"chunk_size_tokens must be >= 1, got {chunk_size_tokens!r}")
        self.model = model
        self.chunk_size_tokens = chunk_size_tokens
        self.backends = backends or {
            "gpu": InMemoryBackend(),
            "disk": LocalDiskBackend(),
            "remote": RemoteBackend(),
        }
        self._ttl_s = ttl_s
        self._known: dict[str, None] = {}  # keys ever stored, in order
        self._lock = threading.RLock()

    def tokenize(self, prompt: str) -> list[int]:
        """Return the attached engine's tokens, else the prompt's UTF-8 bytes."""
        if self._tokenizer is None:
            return list(prompt.encode())
        return super().tokenize(prompt)

    def store(self, tokens: Sequence[int], payloads: Sequence[bytes] | None = None) -> int:
        """Write a prompt's complete chunks to every tier; returns how many there are.

        Parameters
        ----------
        tokens : sequence of int
            The prompt.
        payloads : sequence of bytes, optional
            KV bytes, one item a chunk; default the chunk's token ids.
        """
        chunks = self._chunks(tokens)
        for index, (key, packed) in enumerate(chunks):
            self._store_chunk(key, payloads[index] if payloads else packed)
        return len(chunks)

    def load(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the payloads of the longest stored prefix, each from its hottest tier."""
        payloads = []
        for key, _ in self._chunks(tokens):
            values = (self.backends[tier].get(key) for tier in TIERS)
            payload = next((value for value in values if value is not None), None)
            if payload is None:
                break
            payloads.append(payload)
        return payloads

    def note_generated(self, tokens: Sequence[int]) -> None:
        """Store the chunks that no tier holds yet, as LMCache would."""
        with self._lock:
            for key, packed in self._chunks(tokens):
                if not self._held(key):
                    self._store_chunk(key, packed)

    def layout(self, tokens: Sequence[int]) -> KVLayout:
        """Return where each complete chunk of `tokens` is."""
        return self.layout_of([key for key, _ in self._chunks(tokens)])

    def layout_of(self, keys: Sequence[str] | None = None) -> KVLayout:
        """Return where chunks are, by their keys (None: all that were ever stored here)."""
        keys = list(self._known) if keys is None else keys
        held = tuple(self._held(key) for key in keys)
        return KVLayout(tuple(keys), {self.instance_id: held} if any(held) else {})

    def discard(self, keys: Sequence[str]) -> int:
        """Delete every copy of some chunks."""
        with self._lock:
            for key in keys:
                for backend in self.backends.values():
                    backend.delete(key)
                self._known.pop(key, None)
        return sum(bool(self._held(key)) for key in keys)

    def close(self) -> None:
        """Close the backends."""
        for backend in self.backends.values():
            backend.close()

    def _move(self, source, target, tokens, wanted, keys, timeout_s):
        outcome = Outcome()
        with self._lock:
            if keys is None:
                chunks = self._known if tokens is None else dict(self._chunks(tokens))
                keys = list(chunks)
            for index, key in enumerate(keys):
                if wanted is None or index in wanted:
                    self._move_chunk(key, source, target[1], outcome)
        if not outcome.moved and not outcome.skipped:
            outcome.reason = f"no complete chunk in {source[1]}"
        return outcome

    def _move_chunk(self, key, source, tier, outcome):
        """Copy a chunk to `tier`, look that it is there, then delete what is hotter."""
        instance, source_tier = source
        held = self._held(key) if instance == self.instance_id else ()
        hotter = [t for t in held if TIER_CODES[t] < TIER_CODES[tier]]
        # A demotion is of a chunk whose hottest copy is at the source; a promotion fills a gap.
        if source_tier not in held or hotter[:1] not in ([], [source_tier]):
            return
        if tier in held and not hotter:
            return
        if tier not in held:
            value = self.backends[source_tier].get(key)
            self.backends[tier].set(key, value, self._ttl_s)
            if self.backends[tier].get(key) is None:
                outcome.skipped[unseen(tier)] = outcome.skipped.get(unseen(tier), 0) + 1
                return
        for hot in hotter:
            self.backends[hot].delete(key)
        outcome.moved += 1

    def _store_chunk(self, key, payload):
        for backend in self.backends.values():
            backend.set(key, payload, self._ttl_s)
        self._known[key] = None

    def _held(self, key):
        return tuple(tier for tier in TIERS if self.backends[tier].get(key) is not None)

    def _chunks(self, tokens):
        """Return the complete chunks as (key, packed tokens); keys chain the prefix's hash."""
        tokens, size, chunks = check_tokens(tokens), self.chunk_size_tokens, []
        key = hashlib.sha256(self.model.encode()).hexdigest()
        for start in range(0, len(tokens) - size + 1, size):
            packed = array("q", tokens[start : start + size]).tobytes()
            key = hashlib.sha256(key.encode() + packed).hexdigest()
            chunks.append((key, packed))
        return chunks
