"""Two controllers of KV cache behind one interface: LMCache over HTTP, or local backends.

`LMCacheController` drives a real LMCache deployment: the coordinator (key
directory) and, through it, the LMCache servers. `LocalLMCacheController` keeps
real bytes in this package's own three backends and needs no server.
"""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from caching_heuristics import TIERS
from kvttl.lmcache.client import LMCacheError as LMCacheError
from kvttl.lmcache.client import LMCacheHTTP
from kvttl.lmcache.client import LMCacheUnavailable as LMCacheUnavailable
from kvttl.lmcache.directory import Directory
from kvttl.lmcache.inside import Handover, ServerModule
from kvttl.lmcache.layout import (
    BaseController,
    InProcessController,
    KVLayout,
    bytes_of_token,
    unseen,
    vllm_config,
)
from kvttl.lmcache.lease import AlreadyManaged, ServerLease
from kvttl.lmcache.salts import check_salt, salted
from tiered_caching import BaseBackend, InMemoryBackend, LocalDiskBackend, RemoteBackend


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
        Shows one tenant's KV only, and is the salt of requests that bring none; empty = all
        tenants' KV, and such requests have none.
    instance_id : str
        The LMCache server that the engine is connected to.
    move_timeout_s : float
        How long a move waits to see the new copy, seconds.
    limits : float
        ``connect_timeout_s`` (0.5), ``read_timeout_s`` (2.0), ``retry_after_s`` (1.0): how long
        a call waits, and when a service that was away is tried again, seconds; see `Service`.

    Notes
    -----
    The directory follows an event stream, so it lags behind the servers by the
    flush interval. remote -> disk is refused: the server has no L2-to-L2 copy,
    and it writes L2 only when KV is first stored. A server that runs `kvttl.server` is asked
    itself, moves in every direction, and takes a manager's decisions over.
    """

    def __init__(
        self,
        host: str = "localhost",
        port: int = 9000,
        model: str = "gemma-3-270m-it",
        *,
        world_size: int = 1,
        cache_salt: str = "",
        instance_id: str = BaseController.instance_id,
        move_timeout_s: float = 2.0,
        **limits: float,
    ) -> None:
        self.instance_id = instance_id
        self.move_timeout_s = move_timeout_s
        self._http = LMCacheHTTP(f"http://{host}:{port}", **limits)
        self._address = f"{_ip_of(host)}:{port}"
        salt = salted(check_salt(cache_salt or None))
        if salt != cache_salt:  # a request's is hashed: the two would not be the same
            allowed = "1 to 64 letters, digits and . _ -"
            raise ValueError(f"cache_salt of a controller must be {allowed}, got {cache_salt!r}")
        self._directory = Directory(self._http, model, world_size, salt)
        self._inside = ServerModule(self._http, instance_id, self._about)
        # Tiers whose last demotion waited in vain (a dead Redis, a full disk):
        # later moves there look once and do not wait, until one succeeds.
        self._stalled_tiers: set[str] = set()
        self._token_bytes: int | None = None  # of an engine's KV cache

    model = property(attrgetter("_directory.model"), doc="The model name that KV is stored under.")
    cache_salt = property(attrgetter("_directory.cache_salt"), doc="The tenant whose KV this is.")

    @cached_property
    def chunk_size_tokens(self) -> int:
        """Tokens a chunk, as the LMCache server says."""
        return self._http.chunk_size_tokens(self.instance_id)

    def attach_engine(self, llm: object) -> None:
        """Use the engine's tokenizer and the model name it stores KV under."""
        super().attach_engine(llm)
        if (config := vllm_config(llm)) is not None:
            self._directory = replace(self._directory, model=config.model_config.model)
            self._token_bytes = bytes_of_token(config)

    def _about(self):
        return self.model, self._directory.world_size, self.cache_salt

    @property
    def _module(self) -> ServerModule | None:
        """The server's own decider; None where it has none, or is away."""
        try:
            return self._inside if self._http.has_module(self.instance_id) else None
        except LMCacheUnavailable:
            return None

    def layout(self, tokens: Sequence[int], cache_salt: str = "") -> KVLayout:
        """Return where the directory says that each complete chunk is, under a salt.

        Raises
        ------
        ValueError
            A token id that is not an integer >= 0.
        LMCacheUnavailable, LMCacheError
            The coordinator does not answer, or refuses.
        """
        if (module := self._module) is None:
            return self._directory.layout(tokens, cache_salt)
        layout = module.layout(tokens, cache_salt)
        with contextlib.suppress(LMCacheError):  # it knows the other servers
            shown = self._directory.layout(tokens, cache_salt)
            if not layout.keys:  # no engine has come to the server yet
                return shown
            if shown.keys == layout.keys:
                others = {n: held for n, held in shown.tiers.items() if n != self.instance_id}
                return replace(layout, tiers={**others, **layout.tiers})
        return layout

    def layout_of(self, keys: Sequence[str] | None = None) -> KVLayout:
        """Return where the directory says that chunks are, by their keys (None: all).

        Raises
        ------
        LMCacheUnavailable, LMCacheError
            The coordinator does not answer, or refuses.
        """
        where = self._module or self._directory
        if keys is None:
            return where.listed(self.instance_id)
        return where.layout_of(keys, self.instance_id)

    def discard(self, keys: Sequence[str]) -> int:
        """Delete every copy of some chunks on this instance; returns how many chunks keep one."""
        where = self._module or self._directory
        return where.discard(self.layout_of(keys), self.instance_id)

    def check_health(self) -> None:
        """Raise LMCacheUnavailable if the coordinator or the server is away."""
        self._http.ping(self.instance_id)

    def has_forgotten(self) -> bool:
        """Return whether the coordinator or the server was restarted since this began."""
        return self._http.signed_up_again(self.instance_id)

    def work_left(self) -> int:
        """Return how much the server has still to write, load or decide; 0: it is at rest."""
        return self._http.work_left(self.instance_id)

    def lease(self) -> ServerLease:
        """Return a manager's right to this instance's server; see `ServerLease`."""
        return ServerLease(f"{self.instance_id} at {self._address}")

    def tier_errors(self) -> dict[str, str]:
        """Return why tiers take no writes, as a server that this kit has started says it."""
        errors = self._http.tier_errors(self.instance_id)
        with contextlib.suppress(LMCacheError):  # away, or no engine has come yet
            if (module := self._module) is not None:
                return {**module.ask("room")["errors"], **errors}
        return errors

    def hand_over(
        self, ladder: Mapping[str, float], policy: Any, clock: Callable[[], float]
    ) -> Handover | None:
        """Return the `Handover` of a manager if the server decides."""
        module = self._module
        return None if module is None else Handover(module, ladder, clock, policy)

    def check_alone(self) -> None:
        """Raise AlreadyManaged if the server has come to decide by itself."""
        if self._module is not None:
            decides = f"LMCache server {self.instance_id} decides by itself now (kvttl.server)"
            raise AlreadyManaged(f"{decides}: make a new manager, which hands its decisions over")

    def fleet(self) -> dict[str, dict[str, int]]:
        """Return how many objects each server under the coordinator holds in each tier.

        Of all models and tenants; a server that died is listed until its time-out (30 s).

        Raises
        ------
        LMCacheUnavailable, LMCacheError
            The coordinator does not answer, or refuses.
        """
        return {instance: self._held(instance) for instance in self._http.instances()}

    def room_chunks(self) -> tuple[int | None, int | None, int | None]:
        """Return how many chunks gpu has room for; nobody knows before an engine is attached.

        Raises
        ------
        LMCacheUnavailable, LMCacheError
            The server does not answer, or refuses.
        """
        if (module := self._module) is not None:
            return tuple(module.ask("room")["chunks"])
        if not (chunk_bytes := self.chunk_bytes()):
            return super().room_chunks()
        return (self._http.memory_bytes(self.instance_id) // chunk_bytes, None, None)

    def chunk_bytes(self) -> int | None:
        """Return what a chunk's KV cache takes; None before an engine is attached."""
        return self._token_bytes and self._token_bytes * self.chunk_size_tokens

    def held_chunks(self) -> dict[str, int]:
        """Return how many objects the directory shows in each tier, of all models."""
        return self._held(self.instance_id)

    def _held(self, instance):
        return {tier: self._http.count_keys(instance, tier) for tier in TIERS}

    def close(self) -> None:
        """Close the HTTP session."""
        self._http.close()

    def _refusal(self, request):
        if self._module is not None:
            return super()._refusal(request)
        if (request.source, request.target) == ("remote", "disk"):
            return "the LMCache server has no L2-to-L2 copy; promote to gpu instead"
        if request.tokens is None and request.target == "gpu" and request.source != "gpu":
            return "the LMCache server prefetches by prompt: pass the prompt's tokens"
        return super()._refusal(request)

    def _look(self, request, keys):
        # Everything at the old position; the module is asked for it as for chunks.
        if keys is None and request.tokens is None and self._module is None:
            listed = self._directory.listed(request.here, [request.source])
            return listed.under("" if request.cache_salt == self.cache_salt else request.cache_salt)
        return super()._look(request, keys)

    def _move(self, request, layout, due):
        instance, tier, timeout_s = request.here, request.target, request.timeout_s
        if (module := self._module) is not None:
            return module.move(layout.select(due), request.source, tier, timeout_s)
        if timeout_s is None:
            timeout_s = 0.0 if tier in self._stalled_tiers else self.move_timeout_s
        if tier == "gpu":
            # Keys are prefix-chained, so a prefetch is always of a prefix of the prompt.
            prefix = request.tokens[: (due[-1] + 1) * self.chunk_size_tokens]
            return self._directory.promote(layout.select(due), instance, prefix, timeout_s)
        outcome = self._directory.demote(layout.select(due), instance, tier, timeout_s)
        if unseen(tier) in outcome.skipped:
            if timeout_s > 0:  # a single look proves nothing
                self._stalled_tiers.add(tier)
        elif outcome.moved:
            self._stalled_tiers.discard(tier)
        return outcome


def _ip_of(host):
    """Return a host's address, so that its names count as one; the name where none is known."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return host


MAX_TTL_S = 604_800  # bytes are kept at most this long, as max_ttl does


class LocalLMCacheController(InProcessController):
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
        defaults = (InMemoryBackend, LocalDiskBackend, RemoteBackend)
        self.backends = backends or {backend.tier: backend() for backend in defaults}
        self._ttl_s = ttl_s
        self._known: dict[str, None] = {}  # keys ever stored, in order
        self._lock = threading.RLock()

    def tokenize(self, prompt: str) -> list[int]:
        """Return the attached engine's tokens, else the prompt's UTF-8 bytes."""
        return list(prompt.encode()) if self._tokenizer is None else super().tokenize(prompt)

    def store(
        self, tokens: Sequence[int], payloads: Sequence[bytes] | None = None, cache_salt: str = ""
    ) -> int:
        """Write a prompt's complete chunks to every tier; returns how many there are.

        Parameters
        ----------
        tokens : sequence of int
            The prompt.
        payloads : sequence of bytes, optional
            KV bytes, one item a chunk; default the chunk's token ids.
        cache_salt : str
            The tenant's, or a record's.
        """
        chunks = self._chunks(tokens, cache_salt)
        for index, (key, packed) in enumerate(chunks):
            self._store_chunk(key, payloads[index] if payloads else packed)
        return len(chunks)

    def load(self, tokens: Sequence[int], cache_salt: str = "") -> list[bytes]:
        """Return the payloads of the longest stored prefix, each from its hottest tier."""
        found = (self._hottest(key) for key, _ in self._chunks(tokens, cache_salt))
        return list(itertools.takewhile(lambda payload: payload is not None, found))

    def note_generated(self, tokens: Sequence[int], cache_salt: str = "") -> None:
        """Store the chunks that no tier holds yet, as LMCache would."""
        with self._lock:
            for key, packed in self._chunks(tokens, cache_salt):
                if not self._held(key):
                    self._store_chunk(key, packed)

    def discard(self, keys: Sequence[str]) -> int:
        """Delete every copy of some chunks."""
        with self._lock:
            for key in keys:
                self._known.pop(key, None)
            return super().discard(keys)

    def close(self) -> None:
        """Close the backends."""
        for backend in self.backends.values():
            backend.close()

    def _move(self, request, layout, due):
        held = layout.of(request.here)  # one that is held nowhere is not under way here
        keys = [layout.keys[i] for i in due if held[i]]
        with self._lock:
            source, target = self.backends[request.source], self.backends[request.target]
            for key in keys:
                if key not in target and (payload := source.get(key)) is not None:
                    target.set(key, payload, self._ttl_s)
            return self._keep_from(request.target, request.source, keys)

    def _hottest(self, key):
        values = (self.backends[tier].get(key) for tier in TIERS)
        return next((value for value in values if value is not None), None)

    def _delete(self, key, tiers):
        for tier in tiers:
            self.backends[tier].delete(key)

    def _store_chunk(self, key, payload):
        for backend in self.backends.values():
            backend.set(key, payload, self._ttl_s)
        self._known[key] = None
