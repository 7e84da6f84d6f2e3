"""Two controllers of KV cache behind one interface: LMCache over HTTP, or local backends.

`LMCacheController` drives a real LMCache deployment: the coordinator (key
directory) and, through it, the LMCache servers. `LocalLMCacheController` keeps
real bytes in this package's own three backends and needs no server.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from caching_heuristics import TIER_CODES, TIERS
from kvttl.lmcache.client import BACKENDS, LMCacheError, LMCacheHTTP, LMCacheUnavailable
from kvttl.lmcache.layout import (
    DEFAULT_INSTANCE,
    BaseController,
    KVLayout,
    Outcome,
    check_tokens,
    engine_config,
    unseen,
)
from tiered_caching import BaseBackend, InMemoryBackend, LocalDiskBackend, RemoteBackend

__all__ = [
    "BaseController",
    "KVLayout",
    "LMCacheController",
    "LMCacheError",
    "LMCacheUnavailable",
    "LocalLMCacheController",
]
TIER_OF_BACKEND = {backend: tier for tier, backend in BACKENDS.items()}
_POLL_S = 0.005  # about what one directory look-up costs
_VERIFY_S = 0.5  # a delete shows in the directory within an event flush (0.2 s by default)


class LMCacheController(BaseController):
    """Drives a real LMCache deployment through its coordinator.

    Parameters
    ----------
    host, port : str, int
        The coordinator's HTTP address.
    model : str
        The model name that the engine stores KV under; `attach_engine` (hence
        ``MultiTierCache.set_llm``) replaces it by the engine's own.
    world_size : int
        The engine's tensor-parallel size.
    cache_salt : str
        Tenant salt of the requests, as given to the engine.
    instance_id : str
        The LMCache server that the engine is connected to.
    move_timeout_s : float
        How long a move waits to see the new copy, seconds.
    connect_timeout_s, read_timeout_s, retry_after_s : float
        See `LMCacheHTTP`.

    Notes
    -----
    The directory follows an event stream, so it lags behind the servers by the
    flush interval. remote -> disk is refused: the server has no L2-to-L2 copy,
    and it writes L2 only when KV is first stored.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = 9000,
        model: str = "gemma-3-270m-it",
        *,
        world_size: int = 1,
        cache_salt: str = "",
        instance_id: str = DEFAULT_INSTANCE,
        move_timeout_s: float = 2.0,
        connect_timeout_s: float = 0.5,
        read_timeout_s: float = 2.0,
        retry_after_s: float = 1.0,
    ) -> None:
        self.model = model
        self.world_size = world_size
        self.cache_salt = cache_salt
        self.instance_id = instance_id
        self.move_timeout_s = move_timeout_s
        self._http = LMCacheHTTP(
            f"http://{host}:{port}", connect_timeout_s, read_timeout_s, retry_after_s
        )
        self._chunk_size_tokens: int | None = None
        self._shapes: list[dict] = []  # object keys of a chunk, without its hash
        # Tiers whose last demotion waited in vain (a dead Redis, a full disk):
        # later moves there look once and do not wait, until one succeeds.
        self._stalled_tiers: set[str] = set()

    @property
    def chunk_size_tokens(self) -> int:
        """Tokens a chunk, as the LMCache server says."""
        if self._chunk_size_tokens is None:
            self._chunk_size_tokens = self._http.chunk_size_tokens(self.instance_id)
        return self._chunk_size_tokens

    def attach_engine(self, llm: Any) -> None:
        """Use the engine's tokenizer and the model name it stores KV under."""
        super().attach_engine(llm)
        if (config := engine_config(llm)) is not None:
            self.model = config.model_config.model
            self._shapes = []

    def layout(self, tokens: Sequence[int]) -> KVLayout:
        """Return where the directory says that each complete chunk is.

        Raises
        ------
        ValueError
            A token id that is not an integer >= 0.
        LMCacheUnavailable, LMCacheError
            The coordinator does not answer, or refuses.
        """
        tokens = check_tokens(tokens)
        if not tokens:
            return KVLayout((), {})
        layout = _read_layout(self._http.lookup(self._prompt(tokens)))
        self._learn(layout)
        return layout

    def layout_of(self, keys: Sequence[str] | None = None) -> KVLayout:
        """Return where the directory says that chunks are, by their keys (None: all).

        Raises
        ------
        LMCacheUnavailable, LMCacheError
            The coordinator does not answer, or refuses.
        """
        if keys is None:
            pages = (self._http.list_keys(self.instance_id, tier) for tier in TIERS)
            ours = (entry for page in pages for entry in page if self._ours(entry))
            return _read_layout({str(entry["key"]): entry for entry in ours}.values())
        handles = self._handles(keys) if keys else []
        return _read_layout(self._http.lookup({"keys": handles})) if handles else KVLayout((), {})

    def discard(self, keys: Sequence[str]) -> int:
        """Delete every copy of some chunks on this instance; returns how many chunks keep one."""
        layout, sent_at_s = self.layout_of(keys), {}
        deadline_s = time.monotonic() + _VERIFY_S
        while True:
            held = dict(zip(layout.keys, layout.of(self.instance_id)))
            by_tier = {tier: [key for key in held if tier in held[key]] for tier in TIERS}
            left = sum(bool(tiers) for tiers in held.values())
            self._delete(self.instance_id, layout, by_tier, sent_at_s)
            if not left or time.monotonic() >= deadline_s:
                return left
            time.sleep(_POLL_S)
            layout = self._look_again(layout)

    def check_health(self) -> None:
        """Raise LMCacheUnavailable if the coordinator or the server is away."""
        self._http.ping(self.instance_id)

    def fleet(self) -> dict[str, dict[str, int]]:
        """Return how many objects each server under the coordinator holds in each tier.

        Of all models and tenants; a server that died is listed until its time-out (30 s).

        Raises
        ------
        LMCacheUnavailable, LMCacheError
            The coordinator does not answer, or refuses.
        """
        return {
            instance: {tier: self._http.count_keys(instance, tier) for tier in TIERS}
            for instance in self._http.instances()
        }

    def close(self) -> None:
        """Close the HTTP session."""
        self._http.close()

    def _prompt(self, tokens):
        return {
            "model_name": self.model,
            "world_size": self.world_size,
            "token_ids": tokens,
            "cache_salt": self.cache_salt,
        }

    def _ours(self, entry):
        """Say whether a directory entry is of this model and tenant."""
        key = entry["key"]
        return key["model_name"] == self.model and key["cache_salt"] == self.cache_salt

    def _handles(self, keys):
        """Return the object keys of chunks: those of a chunk seen before, with another hash."""
        if not self._shapes:  # a new process that looks at KV of an earlier one
            self._learn(self.layout_of())
        return [{**dict(shape), "chunk_hash_hex": key} for key in keys for shape in self._shapes]

    def _learn(self, layout):
        """Remember what distinguishes a chunk's object keys, one for each rank and group."""
        if not self._shapes and layout.keys:
            handles = layout.handles[layout.keys[0]]
            self._shapes = [
                {name: value for name, value in handle.items() if name != "chunk_hash_hex"}
                for handle in handles
            ]

    def _refusal(self, source, target, tokens):
        if source[0] != target[0]:
            return (
                "no move between instances: an LMCache server writes its own tiers only; generate "
                f"the prompt on {target[0]} (which stores it), and let {source[0]}'s TTL end"
            )
        if source[1] == "remote" and target[1] == "disk":
            return "the LMCache server has no L2-to-L2 copy; promote to gpu instead"
        if tokens is None and target[1] == "gpu" and source[1] != "gpu":
            return "the LMCache server prefetches by prompt: pass the prompt's tokens"
        return super()._refusal(source, target, tokens)

    def _move(self, source, target, tokens, wanted, keys, timeout_s):
        tier = target[1]
        if timeout_s is None:
            timeout_s = 0.0 if tier in self._stalled_tiers else self.move_timeout_s
        if tokens is not None:
            tokens = check_tokens(tokens)
        if tier == "gpu":
            return self._promote(source, tokens, wanted, timeout_s)
        layout = self._at_source(source, tokens, wanted, keys)
        outcome = self._demote(source, tier, layout, timeout_s)
        if unseen(tier) in outcome.skipped:
            if timeout_s > 0:  # a single look proves nothing
                self._stalled_tiers.add(tier)
        elif outcome.moved:
            self._stalled_tiers.discard(tier)
        return outcome

    def _demote(self, source, tier, layout, timeout_s):
        """Delete the hotter copies of each chunk once the directory shows one in `tier`."""
        instance = source[0]
        total, sent_at_s = len(layout.keys), {}
        deadline_s = time.monotonic() + timeout_s
        while layout.keys:
            held = dict(zip(layout.keys, layout.of(instance)))
            waiting = [key for key in layout.keys if tier not in held[key]]
            hotter = {t: [k for k in layout.keys if _hotter_copy(t, tier, held[k])] for t in TIERS}
            self._delete(instance, layout, hotter, sent_at_s)
            unfinished = [*waiting, *{key for keys in hotter.values() for key in keys}]
            late_s = time.monotonic() - deadline_s
            # Deletes that were sent are seen through even when nothing is waited for.
            if not unfinished or late_s > (_VERIFY_S if len(unfinished) > len(waiting) else 0):
                break
            time.sleep(_POLL_S)
            layout = self._look_again(layout)
        if not total:
            return Outcome(reason=f"no complete chunk in {source[1]}")
        outcome = Outcome(moved=total - len(unfinished))
        if waiting:
            outcome.skipped[unseen(tier)] = len(waiting)
        if len(unfinished) > len(waiting):
            outcome.skipped["hotter copy still shown (in use?)"] = len(unfinished) - len(waiting)
        return outcome

    def _at_source(self, source, tokens, wanted, keys):
        """Return the layout of the chunks that a demotion is about."""
        instance, source_tier = source
        if keys is not None:
            layout = self.layout_of(keys)
        else:
            layout = self._list_tier(source) if tokens is None else self.layout(tokens)
        held = layout.of(instance)
        # A chunk shown nowhere has just been generated: its store is under way.
        chosen = [
            i
            for i in range(len(layout.keys))
            if (wanted is None or i in wanted)
            and (held[i][0] == source_tier if held[i] else source_tier == "gpu")
        ]
        return layout.select(chosen)

    def _list_tier(self, source):
        instance, tier = source
        return _read_layout(self._http.list_keys(instance, tier))

    def _look_again(self, layout):
        """Return the same chunks' layout now."""
        handles = [handle for key in layout.keys for handle in layout.handles[key]]
        return _read_layout(self._http.lookup({"keys": handles}))

    def _delete(self, instance, layout, keys_by_tier, sent_at_s):
        """Send deletes; again at once for locked copies (still being written to L2)."""
        now_s = time.monotonic()
        for tier, keys in keys_by_tier.items():
            due = [k for k in keys if now_s - sent_at_s.get((tier, k), -1e9) >= _VERIFY_S]
            if due:
                handles = [handle for key in due for handle in layout.handles[key]]
                if not self._http.delete(instance, tier, handles):
                    sent_at_s.update({(tier, key): now_s for key in due})

    def _promote(self, source, tokens, wanted, timeout_s):
        """Prefetch a prompt's chunks from L2 into L1 and wait until the directory shows them."""
        instance, source_tier = source
        layout = self.layout(tokens)
        held = layout.of(instance)
        chosen = [i for i in range(len(held)) if wanted is None or i in wanted]
        todo = [i for i in chosen if "gpu" not in held[i] and source_tier in held[i]]
        absent = sum(not held[i] for i in chosen)
        outcome = Outcome(skipped={f"not in {source_tier}": absent} if absent else {})
        if not todo:
            outcome.status, outcome.reason = "noop", f"nothing in {source_tier} that gpu lacks"
            return outcome
        # Keys are prefix-chained, so a prefetch is always of a prefix of the prompt.
        prefix = tokens[: (todo[-1] + 1) * self.chunk_size_tokens]
        deadline_s = time.monotonic() + timeout_s
        self._http.prefetch(instance, self._prompt(prefix), deadline_s)
        layout = layout.select(todo)
        while True:
            layout = self._look_again(layout)
            outcome.moved = layout.counts(instance)["gpu"]
            if outcome.moved == len(todo) or time.monotonic() >= deadline_s:
                break
            time.sleep(_POLL_S)
        if outcome.moved < len(todo):
            outcome.skipped[unseen("gpu")] = len(todo) - outcome.moved
        return outcome


def _hotter_copy(tier, target, held):
    """Say whether a chunk's copy in `tier` may go: there is one in `target`, which is colder."""
    return tier in held and target in held and TIER_CODES[tier] < TIER_CODES[target]


def _read_layout(results):
    """Turn a directory answer (one entry per object key) into a layout (one per chunk)."""
    handles: dict[str, list] = {}
    placements: dict[str, list] = {}
    for entry in results:
        key = entry["key"]["chunk_hash_hex"]
        handles.setdefault(key, []).append(entry["key"])
        placements.setdefault(key, []).append(
            {(p["instance_id"], tier) for p in entry["placements"] if (tier := tier_of(p))}
        )
    # With several ranks a chunk is in a tier only if every rank's object is.
    common = {key: set.intersection(*sets) for key, sets in placements.items()}
    instances = sorted({instance for held in common.values() for instance, _ in held})
    tiers = {
        instance: tuple(
            tuple(tier for tier in TIERS if (instance, tier) in held) for held in common.values()
        )
        for instance in instances
    }
    return KVLayout(tuple(common), tiers, {key: tuple(h) for key, h in handles.items()})


def tier_of(placement: Mapping[str, Any]) -> str | None:
    """Return this kit's name of a directory placement's tier (None: not one of ours).

    Examples
    --------
    >>> tier_of({"tier": "l1", "backend": "dram"}), tier_of({"tier": "l2", "backend": "fs"})
    ('gpu', 'disk')
    """
    if placement["tier"] == "l1":
        return "gpu"
    return TIER_OF_BACKEND.get(placement["backend"])


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
