"""Where KV cache is: the layout of a prompt's chunks, and the controllers' interface.

Words, as in LMCache: a *chunk* is the smallest unit that moves
(``chunk_size_tokens`` tokens); its key covers everything before it, so equal
key means equal prefix. An incomplete last chunk is never stored.
"""

import hashlib
import time
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from caching_heuristics import TIER_CODES, TIERS
from kvttl.lmcache.client import LMCacheError
from kvttl.lmcache.lease import ServerLease
from kvttl.lmcache.salts import chunk_key, kept_under, salt_of

DEFAULT_INSTANCE = "lmcache_default_instance"


@dataclass(frozen=True)
class KVLayout:
    """Where each complete chunk of one prompt is.

    Parameters
    ----------
    keys : tuple of str
        Chunk keys in prefix order, shape (chunks,); see `chunk_key`.
    tiers : mapping
        Instance id -> the tiers of each chunk, hottest first, shape (chunks,).
    handles : mapping
        Chunk key -> the LMCache object keys behind it (one a rank), for deletes.
    """

    keys: tuple[str, ...]
    tiers: Mapping[str, tuple[tuple[str, ...], ...]]
    handles: Mapping[str, tuple[dict, ...]] = field(default_factory=dict, repr=False)

    def of(self, instance_id: str) -> tuple[tuple[str, ...], ...]:
        """Return each chunk's tiers on one instance; shape (chunks,)."""
        return self.tiers.get(instance_id, ((),) * len(self.keys))

    def under(self, salt: str) -> "KVLayout":
        """Return the layout of the chunks under one salt."""
        salt = kept_under(salt)
        return self.select(i for i, key in enumerate(self.keys) if salt_of(key) == salt)

    def select(self, indices: Iterable[int]) -> "KVLayout":
        """Return the layout of some chunks only."""
        chosen = list(indices)
        return KVLayout(
            tuple(self.keys[i] for i in chosen),
            {name: tuple(tiers[i] for i in chosen) for name, tiers in self.tiers.items()},
            self.handles,
        )

    def indices(
        self, chunks: Iterable[int] | None = None, keys: Iterable[str] | None = None
    ) -> list[int]:
        """Return which chunks are among these indices and these keys (None: all)."""
        wanted = range(len(self.keys)) if chunks is None else frozenset(chunks)
        named = frozenset(self.keys if keys is None else keys)
        return [i for i, key in enumerate(self.keys) if i in wanted and key in named]

    def movable(self, instance_id: str, source: str, target: str, chosen: list[int]) -> list[int]:
        """Return which of some chunks can go from one tier to another.

        Down go those that are hottest in `source`, up those with no copy as hot as `target`.
        A chunk that is shown nowhere has just been generated: its store, into gpu, is under way.
        """
        held = self.of(instance_id)
        if is_above(target, source):
            return [i for i in chosen if source in held[i] and is_above(target, held[i][0])]
        return [i for i in chosen if (held[i][0] if held[i] else "gpu") == source]


def vllm_config(llm: Any) -> Any:
    """Return the configuration of a `vllm.LLM` or an `AsyncLLM`; None for a stand-in."""
    return getattr(getattr(llm, "llm_engine", llm), "vllm_config", None)


def bytes_of_token(config: Any) -> int:
    """Return the bytes of KV cache that a token takes, on all ranks, by vLLM's configuration."""
    model, parallel = config.model_config, config.parallel_config
    values = model.get_num_kv_heads(parallel) * model.get_head_size()
    values *= model.get_num_layers(parallel) * (1 if model.use_mla else 2)
    return values * model.dtype.itemsize * parallel.world_size


class BaseController(ABC):
    """What `MultiTierCache` needs to know and do about KV cache.

    Positions are ``[instance_id, tier]`` pairs, tiers ``"gpu"``, ``"disk"``,
    ``"remote"``.
    """

    instance_id: str = DEFAULT_INSTANCE
    cache_salt: str = ""  # of what is asked for without one
    chunk_size_tokens: int
    _tokenizer: Any = None

    def attach_engine(self, llm: Any) -> None:
        """Use `llm`'s tokenizer, and its model name where that matters."""
        get_tokenizer = getattr(llm, "get_tokenizer", None)
        self._tokenizer = get_tokenizer() if get_tokenizer else self._tokenizer

    @property
    def tokenizer(self) -> Any:
        """The attached engine's tokenizer.

        Raises
        ------
        LMCacheError
            If no engine is attached: LMCache 0.5.6 has no tokenizer of its own.
        """
        if self._tokenizer is None:
            advice = "attach the engine with set_llm(llm) first"
            raise LMCacheError(f"no tokenizer: {advice} (the LMCache server has no /tokenize)")
        return self._tokenizer

    def tokenize(self, prompt: str) -> list[int]:
        """Return the prompt's token ids, as the attached engine's `tokenizer` makes them."""
        return list(self.tokenizer.encode(prompt))

    def lookup(self, tokens: Sequence[int], cache_salt: str = "") -> dict[str, Any]:
        """Return ``{"found": bool, "<instance_id>": ["gpu", ...]}``.

        An instance's list names the tiers that hold **all** complete chunks of
        the prompt, hottest first; ``found`` says that every chunk is somewhere.
        `cache_salt`: the tenant's, or a record's.
        """
        layout = self.layout(tokens, *filter(None, [cache_salt]))
        found = {
            instance: [tier for tier in TIERS if held and all(tier in tiers for tiers in held)]
            for instance, held in layout.tiers.items()
        }
        return {"found": any(held and all(held) for held in layout.tiers.values()), **found}

    def note_generated(self, tokens: Sequence[int], cache_salt: str = "") -> None:
        """Hear that the engine has just processed `tokens` (LMCache stores by itself)."""

    def check_health(self) -> None:
        """Raise LMCacheUnavailable, with the reason, if KV cannot be managed now."""

    def has_forgotten(self) -> bool:
        """Return whether KV may be somewhere where `layout_of` does not show it."""
        return False

    def reachable(self, tiers: Sequence[str], wanted: str | None) -> str | None:
        """Return where a chunk can go that wants `wanted`: there, else the next colder copy.

        LMCache cannot write a missing L2 copy, so a chunk in gpu and remote that
        wants disk goes to remote; one that only remote holds stays there.

        Examples
        --------
        >>> BaseController.reachable(None, ("gpu", "remote"), "disk")
        'remote'
        >>> BaseController.reachable(None, ("gpu", "disk"), "remote")
        'gpu'
        """
        if wanted in (None, "gpu") or wanted in tiers:
            return wanted
        colder = [tier for tier in tiers if TIER_CODES[tier] > TIER_CODES[wanted]]
        return colder[0] if colder else tiers[0]

    def has_nothing_colder(self, tiers: Sequence[str], wanted: str | None) -> bool:
        """Say whether a chunk waits for a copy that only others can make, to go where it wants."""
        return wanted not in (None, "gpu") and bool(tiers) and is_above(tiers[-1], wanted)

    def lease(self) -> ServerLease | None:
        """Return a manager's right to the server; None where there is no server to share.

        Raises
        ------
        AlreadyManaged
            Another process manages it.
        """

    def hand_over(
        self, ladder: Mapping[str, float], policy: Any, clock: Callable[[], float]
    ) -> Any:
        """Return the `Handover` of a manager whose server decides; None: the manager does."""

    def check_alone(self) -> None:
        """Raise AlreadyManaged if the server has come to decide by itself."""

    def tier_errors(self) -> Mapping[str, str]:
        """Return why tiers take no writes now, by tier; empty if all do, or nobody knows."""
        return {}

    def room_chunks(self) -> tuple[int | None, int | None, int | None]:
        """Return how many chunks gpu, disk and remote have room for; None = nobody knows."""
        return (None, None, None)

    def work_left(self) -> int:
        """Return how much the server has still to write or load; 0: it is at rest."""
        return 0

    def chunk_bytes(self) -> int | None:
        """Return what a chunk's KV cache takes; None = nobody knows."""

    def held_chunks(self) -> Mapping[str, int]:
        """Return how many chunks each tier holds; empty = nobody knows."""
        return {}

    def close(self) -> None:
        """Release connections."""

    @abstractmethod
    def layout(self, tokens: Sequence[int], cache_salt: str = "") -> KVLayout:
        """Return where each complete chunk of `tokens` is, under a salt."""

    @abstractmethod
    def layout_of(self, keys: Sequence[str] | None = None) -> KVLayout:
        """Return where chunks are, by their keys (None: all of this instance and all tenants)."""

    @abstractmethod
    def discard(self, keys: Sequence[str]) -> int:
        """Delete every copy of some chunks on this instance: final expiry.

        Returns how many of them still have a copy (in use, or being written):
        call again later.
        """

    def move(
        self,
        old_position: Sequence[str],
        new_position: Sequence[str],
        tokens: Sequence[int] | None = None,
        *,
        chunks: Iterable[int] | None = None,
        keys: Sequence[str] | None = None,
        timeout_s: float | None = None,
        layout: KVLayout | None = None,
        cache_salt: str = "",
    ) -> dict[str, Any]:
        """Move KV from one tier to another; a copy is deleted only when another was seen.

        A demotion leaves no hotter copy. A promotion keeps the colder ones, since
        LMCache writes L2 only when KV is first stored.

        Parameters
        ----------
        old_position, new_position : sequence of str
            ``[instance_id, tier]``.
        tokens : sequence of int, optional
            The prompt; None = everything at the old position that is under `cache_salt`.
        chunks : iterable of int, optional
            Move only these chunks (indices in prefix order) of `tokens`.
        keys : sequence of str, optional
            In place of `tokens`: the chunks with these keys.
        timeout_s : float, optional
            How long to wait until the new copy is seen; 0 = look once.
        layout : KVLayout, optional
            Where the chunks are, as just looked up: saves this call's own look-up.
        cache_salt : str
            The tenant's, or a record's; empty = this controller's.

        Returns
        -------
        dict
            ``status``: ``"done"``, ``"noop"`` (nothing to move), ``"partial"``, ``"timeout"``
            (no copy appeared; source kept) or ``"unsupported"``; ``reason``; ``moved_tokens``,
            ``moved_chunks``; ``skipped`` (reason -> chunks); ``latency_s``; ``layout``: the
            KVLayout of the chunks in question as last seen (None: nothing was looked at).

        Raises
        ------
        ValueError, LMCacheUnavailable
            A malformed position (named with what is allowed); LMCache does not answer.
        """
        start_s = time.perf_counter()
        source = check_position("old_position", old_position)
        target = check_position("new_position", new_position)
        if keys is not None and (tokens, chunks) != (None, None):
            raise ValueError("give keys, or tokens (and chunks), not both")
        request = MoveRequest(*source, *target, tokens, timeout_s, cache_salt)
        outcome = self._carry_out(request, chunks, keys, layout)
        done = outcome.as_dict(self.chunk_size_tokens) | {"from": source[1], "to": target[1]}
        return {**done, "latency_s": time.perf_counter() - start_s}

    def _carry_out(self, request, chunks, keys, layout):
        if refusal := self._refusal(request):
            return Outcome(status="unsupported", reason=refusal)
        here, source, _, target, *_ = request
        if source == target:
            return Outcome(status="noop", reason="already there")
        layout = self._look(request, keys) if layout is None else layout
        chosen = layout.indices(chunks, keys)
        due = layout.movable(here, source, target, chosen)
        none_due = Outcome("noop", layout=layout.select(chosen))
        outcome = self._move(request, layout, due) if due else none_due
        if not outcome.moved and not outcome.skipped:
            outcome.reason = f"no complete chunk in {source} that could go to {target}"
        if is_above(target, source):
            held = layout.of(here)
            outcome.skip(f"not in {source}", sum(not held[i] for i in chosen))
        return outcome

    def _refusal(self, request: "MoveRequest") -> str:
        """Return why this direction cannot be done at all, or an empty string."""
        if request.here == request.there:
            return ""
        return (
            "no move between instances: an LMCache server writes its own tiers only; generate "
            f"the prompt on {request.there} (which stores it), and let {request.here}'s TTL end"
        )

    def _look(self, request: "MoveRequest", keys: Sequence[str] | None) -> KVLayout:
        """Return the layout of the chunks that a move is about."""
        if keys is None and request.tokens is not None:
            return self.layout(request.tokens, *filter(None, [request.cache_salt]))
        layout = self.layout_of(keys)
        return layout.under(request.cache_salt) if keys is None else layout

    @abstractmethod
    def _move(self, request: "MoveRequest", layout: KVLayout, due: Sequence[int]) -> "Outcome":
        """Carry out, for `movable` chunks of `layout`, a move that `_refusal` has let pass."""


class InProcessController(BaseController):
    """A controller whose tiers are objects of this process, so that it can look by itself."""

    model: str = ""  # part of the keys
    backends: Mapping[str, Any]  # tier -> what knows whether a key is in it
    _known: Iterable[str]  # keys of all chunks

    def layout(self, tokens: Sequence[int], cache_salt: str = "") -> KVLayout:
        """Return where each complete chunk of `tokens` is, under a salt."""
        return self.layout_of([key for key, _ in self._chunks(tokens, cache_salt)])

    def layout_of(self, keys: Sequence[str] | None = None) -> KVLayout:
        """Return where chunks are, by their keys (None: all)."""
        keys = tuple(self._known if keys is None else keys)
        held = tuple(self._held(key) for key in keys)
        return KVLayout(keys, {self.instance_id: held} if any(held) else {})

    def discard(self, keys: Sequence[str]) -> int:
        """Delete every copy of some chunks; returns how many chunks keep one."""
        for key in keys:
            self._delete(key, TIERS)
        return sum(bool(self._held(key)) for key in keys)

    @abstractmethod
    def _delete(self, key: str, tiers: Iterable[str]) -> None:
        """Delete a chunk's copies in some tiers, where there are any."""

    def _held(self, key):
        return tuple(tier for tier in TIERS if key in self.backends[tier])

    def _chunks(self, tokens, cache_salt=""):
        """Return the complete chunks as (key, packed tokens); keys chain the prefix's hash."""
        salt = kept_under(cache_salt)
        tokens, size, chunks = check_tokens(tokens), self.chunk_size_tokens, []
        key = hashlib.sha256(self.model.encode()).hexdigest()
        for start in range(0, len(tokens) - size + 1, size):
            packed = array("q", tokens[start : start + size]).tobytes()
            key = hashlib.sha256(key.encode() + packed).hexdigest()
            chunks.append((chunk_key(key, salt), packed))
        return chunks

    def _keep_from(self, target, source, keys):
        """Delete the copies from `source` down to `target` of chunks that `target` holds."""
        there = [key for key in keys if key in self.backends[target]]
        for key in there:
            self._delete(key, TIERS[TIER_CODES[source] : TIER_CODES[target]])
        return outcome_of(target, len(there), len(keys) - len(there), self.layout_of(keys))


class MoveRequest(NamedTuple):
    """What `BaseController.move` was asked for: from a tier of an instance to another."""

    here: str
    source: str
    there: str
    target: str
    tokens: Sequence[int] | None
    timeout_s: float | None
    cache_salt: str = ""


@dataclass
class Outcome:
    """What a move did, while it is being done."""

    status: str = ""
    reason: str = ""
    moved: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    layout: KVLayout | None = None  # of the chunks in question, as last seen

    def skip(self, reason: str, chunks: int) -> None:
        """Count chunks that did not move."""
        if chunks:
            self.skipped[reason] = self.skipped.get(reason, 0) + chunks

    def as_dict(self, chunk_size_tokens: int) -> dict[str, Any]:
        if not self.status:
            self.status = "partial" if self.moved and self.skipped else "done"
            if not self.moved:
                self.status = "timeout" if self.skipped else "noop"
        reason = self.reason or "; ".join(f"{n} chunks: {why}" for why, n in self.skipped.items())
        moved = {"moved_tokens": self.moved * chunk_size_tokens, "moved_chunks": self.moved}
        said = {"status": self.status, "reason": reason, **moved}
        return {**said, "skipped": dict(self.skipped), "layout": self.layout}


def outcome_of(tier: str, moved: int, left: int, layout: KVLayout) -> Outcome:
    """Return what a move did after which `left` chunks had no copy in `tier`."""
    outcome = Outcome(moved=moved, layout=layout)
    outcome.skip(unseen(tier), left)
    return outcome


def check_position(name, position):
    """Return (instance, tier), or raise a ValueError that says what is wrong."""
    pair = tuple(position) if isinstance(position, (list, tuple)) else ()
    if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise ValueError(f"{name} must be [instance_id, tier], got {position!r}")
    if pair[1] not in TIER_CODES:
        raise ValueError(f"{name}'s tier must be one of {', '.join(TIERS)}, got {pair[1]!r}")
    return pair


def check_tokens(tokens):
    """Return token ids as a list of plain integers >= 0."""
    listed = list(tokens)
    plain = {int}.issuperset(map(type, listed)) and min(listed, default=0) >= 0
    return listed if plain else [_check_token(token) for token in listed]  # that is slower


def _check_token(token):
    if not hasattr(token, "__index__") or isinstance(token, bool) or token < 0:
        raise ValueError(f"tokens must be integers >= 0, got {token!r}")
    return int(token)


def unseen(tier: str) -> str:
    """Return the reason of a move that found no copy at its target."""
    return f"no copy in {tier} seen"


def by_hottest(held: Iterable[Sequence[str]]) -> Mapping[str, int]:
    """Count chunks by their hottest tier; ``none`` are not seen anywhere (yet).

    Examples
    --------
    >>> by_hottest([("gpu", "disk"), ("disk",), ()])
    {'gpu': 1, 'disk': 1, 'none': 1}
    """
    counts = Counter(tiers[0] if tiers else "none" for tiers in held)
    return {tier: counts[tier] for tier in (*TIERS, "none") if counts[tier]}


def is_above(tier: str, other: str) -> bool:
    """Say whether a tier is hotter than another."""
    return TIER_CODES[tier] < TIER_CODES[other]


def hits_by_tier(held: Sequence[Sequence], cached_tokens: int, chunk_tokens: int) -> dict[str, int]:
    """Split the engine's cached-token count by the hottest tier that each chunk was in.

    Examples
    --------
    >>> hits_by_tier([("gpu", "disk"), ("disk",), ()], 64, 32)
    {'gpu': 32, 'disk': 32}
    """
    hits: Counter[str] = Counter()
    for number, tiers in enumerate(held):
        tokens = min(chunk_tokens, cached_tokens - number * chunk_tokens)
        if tokens > 0:
            hits[tiers[0] if tiers else "none"] += tokens
    return dict(hits)
