"""LMCache 0.5.6's own rules without LMCache: the manager's real code on a model of the server.

`kvttl.replay.engine` answers fast what a policy would hit. This answers slowly (a few
thousand requests) what this kit's manager *on LMCache* would: its real claims,
ladder and moves, on a memory tier that evicts in batches above a watermark,
does not take in what it loads from below, and refuses what does not fit.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from caching_heuristics import TIER_CODES, TIERS
from kvttl.lmcache.layout import InProcessController, outcome_of
from kvttl.lmcache.tiers import pages

EVICTION_WATERMARK, EVICTION_RATIO = 0.8, 0.2  # defaults of `lmcache server` 0.5.6
_COPY_CHUNKS = 64  # that the server module takes through gpu at once


class LMCacheModel(InProcessController):
    """Where an LMCache server with a disk and a Redis adapter would hold its chunks.

    Parameters
    ----------
    hot_chunks : int
        Chunks that the memory tier (L1) has room for, >= 1.
    chunk_size_tokens : int
        Tokens a chunk.
    retain : bool
        LMCache's prefetch policy ``retain``: what a hit loads from disk or Redis
        stays in L1. The default policy drops it after the load.
    watermark, ratio : float
        LMCache's ``trigger_watermark`` and ``eviction_ratio``: from which used share on it evicts,
        and which share goes then.

    Examples
    --------
    >>> model = LMCacheModel(hot_chunks=4, chunk_size_tokens=2)
    >>> model.serve([1, 2, 3, 4, 5]), model.serve([1, 2, 3, 4, 9])
    ({}, {'gpu': 4})
    """

    def __init__(
        self,
        hot_chunks: int,
        chunk_size_tokens: int = 32,
        retain: bool = False,
        watermark: float = EVICTION_WATERMARK,
        ratio: float = EVICTION_RATIO,
    ) -> None:
        if hot_chunks < 1:
            raise ValueError(f"hot_chunks must be >= 1, got {hot_chunks}")
        self.watermark, self.ratio = watermark, ratio
        self.hot_chunks, self.chunk_size_tokens, self.retain = hot_chunks, chunk_size_tokens, retain
        self.stored_tokens: list[int] = []  # of what was served last
        # Of gpu the order matters: least recently used first.
        self.held: dict[str, dict[str, None]] = {tier: {} for tier in TIERS}
        self.backends = self.held

    # ---- what the engine sees ----------------------------------------------------

    def serve(self, tokens: Sequence[int]) -> dict[str, int]:
        """Look a prompt up, load, compute and store the rest; returns hit tokens by tier."""
        return self.serve_at_once([tokens])[0]

    def serve_at_once(self, prompts: Iterable[Sequence[int]]) -> list[dict[str, int]]:
        """Serve prompts that come together: all are looked up before any is stored."""
        named = [[key for key, _ in self._chunks(tokens)] for tokens in prompts]
        found = [self._load(keys, self._retained) for keys in named]
        self.stored_tokens = [self._store(*each) for each in zip(named, found)]
        size = self.chunk_size_tokens
        return [{t: n * size for t in TIERS if (n := tiers.count(t))} for tiers in found]

    def _store(self, keys, found):
        """Store what was computed, and return its tokens."""
        new = [key for key in keys[len(found) :] if key not in self.held["gpu"]]
        self._make_room(new)
        fits = len(new) <= self._free()  # one allocation for all: all of them or none
        if fits:
            self._create(new)
            for tier in self._written_through:
                self.held[tier].update(dict.fromkeys(new))
        self._touch(keys)
        return len(new) * self.chunk_size_tokens * fits

    def evict(self) -> None:
        """Do what LMCache's eviction loop does once a second, until it has nothing to do."""
        hot = self.held["gpu"]
        while len(hot) >= self.watermark * self.hot_chunks:
            for key in list(hot)[: max(1, int(len(hot) * self.ratio))]:
                del hot[key]

    _written_through = TIERS[1:]

    def _make_room(self, new):
        """LMCache makes none: what does not fit is not stored."""

    def _room_to_load(self, keys, chunks):
        """LMCache makes none: what does not fit is not loaded."""

    def _retained(self, keys):
        return keys if self.retain else []

    def _load(self, keys, kept):
        """Return the tier of each chunk of the longest prefix that can be loaded.

        `kept` returns which of those that come from below stay in gpu.
        """
        sources = [tiers[0] for tiers in itertools.takewhile(bool, map(self._held, keys))]
        self._room_to_load(keys, len(sources) - sources.count("gpu"))
        free = self._free()
        for tier in TIERS[1:]:  # one allocation an adapter: all of its chunks or none
            wanted = sources.count(tier)
            if wanted > free:
                sources = sources[: sources.index(tier)]
                break
            free -= wanted
        self._create(kept([key for key, tier in zip(keys, sources) if tier != "gpu"]))
        return sources

    def _free(self):
        return self.hot_chunks - len(self.held["gpu"])

    def _create(self, keys):
        self.held["gpu"].update(dict.fromkeys(reversed(keys)))

    def _touch(self, keys):
        """Make a prompt's chunks the most recently used, its first one last of all."""
        hot = self.held["gpu"]
        for key in reversed(keys):
            if key in hot:
                del hot[key]
                hot[key] = None

    # ---- what the manager sees ---------------------------------------------------

    def room_chunks(self) -> tuple[int | None, int | None, int | None]:
        return (self.hot_chunks, None, None)

    @property
    def _known(self):
        return dict.fromkeys(key for tier in TIERS for key in self.held[tier])

    def _delete(self, key, tiers):
        for tier in tiers:
            self.held[tier].pop(key, None)

    def _refusal(self, request):
        if (request.source, request.target) == ("remote", "disk"):
            return "LMCache has no L2-to-L2 copy"
        return super()._refusal(request)

    def _move(self, request, layout, due):
        keys = [layout.keys[i] for i in due]
        if request.target == "gpu":  # a prefetch is of a prefix
            return self._promote(layout.keys[: due[-1] + 1], keys)
        return self._keep_from(request.target, request.source, keys)

    def _promote(self, prefix, wanted):
        self._load(prefix, list)
        self._touch(prefix)
        left = len(wanted) - len(self.held["gpu"].keys() & wanted)
        return outcome_of("gpu", len(wanted) - left, left, self.layout_of(wanted))


class ServerModuleModel(LMCacheModel):
    """The same server with `kvttl.server` in it: what the module changes of LMCache's rules.

    It makes room before a store, by giving up what is worth least, and before a load, where that
    has another copy; writes nothing down before a request's end; keeps in gpu, of what a hit
    loads, what a claim wants there; copies in every direction. Above `watermark` gpu gives up, down
    to `watermark` x (1 - `ratio`): the settings ``high`` and ``low``.
    No time passes in between: no store meets another one.

    Attributes
    ----------
    wanted : callable
        Chunk keys -> the tier that a live claim wants each in, or None.
    """

    wanted: Callable[..., Sequence[str | None]] = staticmethod(lambda keys: [None] * len(keys))
    _written_through = ()

    def __init__(self, hot_chunks: int, chunk_size_tokens: int = 32, **rules: float) -> None:
        super().__init__(hot_chunks, chunk_size_tokens, **rules)
        self._worths: dict[str, tuple] = {}  # chunk -> (end or worth, -depth); without one: last
        self._epoch, self._in_force = 0, False

    def evict(self) -> None:
        """Relieve gpu where it is too full; what is wanted and nowhere else is written to disk."""
        held = len(self.held["gpu"])
        if held > self.watermark * self.hot_chunks:
            low = self.watermark * (1 - self.ratio) * self.hot_chunks
            self._give_up(math.ceil(held - low - 1e-6), writes_down=True)

    def note(self, record: Any, by_formula: bool) -> None:
        """Let gpu's order follow a decision, and write down what it wants in gpu."""
        keys = [key for key in record.chunk_keys if self._held(key)]
        hot = record.wanted_tier == "gpu" and bool(record.ttl_s)
        ends_s = record.time_s + (record.ttl_s if hot else 0.0)
        for depth, key in enumerate(keys):
            before = self._worths.get(key)
            if before is None or (by_formula and before[0] < ends_s):
                self._worths[key] = (ends_s if by_formula else (-1, ends_s)), -depth
        alone = [key for key in keys if self._held(key) == ("gpu",)]
        self.held["disk"].update(dict.fromkeys(alone if hot else ()))

    def valued(self, in_force: bool, keys: Sequence[str], answer: Any) -> None:
        """Let gpu's order follow what a policy says of chunks, and in which order it says so."""
        self._epoch += in_force != self._in_force
        self._in_force = in_force
        hot = (answer.tier == TIER_CODES["gpu"]) & (answer.ttl_s > 0)
        for depth, (key, value, is_hot) in enumerate(zip(keys, answer.value.tolist(), hot)):
            if self._held(key):
                self._worths[key] = (self._epoch, value if is_hot else -math.inf), -depth

    def reachable(self, tiers: Sequence[str], wanted: str | None) -> str | None:
        """Return what is wanted: every copy can be made."""
        return wanted

    def has_nothing_colder(self, tiers: Sequence[str], wanted: str | None) -> bool:
        """Say that no copy has to be waited for."""
        return False

    def _retained(self, keys):
        return [key for key, tier in zip(keys, self.wanted(keys)) if tier == "gpu"]

    def _make_room(self, new):
        for key in new:  # nothing is decided about what is stored anew
            self._worths.pop(key, None)
        self._give_up(len(new) - self._free())

    def _room_to_load(self, keys, chunks):
        alone = [key for key in self.held["gpu"] if self._held(key) == ("gpu",)]
        self._give_up(min(chunks, self.hot_chunks // 2) - self._free(), staying={*keys, *alone})

    def _give_up(self, chunks, writes_down=False, staying=frozenset()):
        """Give up what ends first, of one prompt the last chunk first; the undecided last."""
        leaving = [key for key in self.held["gpu"] if key not in staying]
        order = sorted(leaving, key=lambda k: (k not in self._worths, self._worths.get(k)))
        going = order[: max(0, chunks)]
        alone = [key for key in going if writes_down and self._held(key) == ("gpu",)]
        wanted = [key for key, tier in zip(alone, self.wanted(alone)) if tier is not None]
        self.held["disk"].update(dict.fromkeys(wanted))
        for key in going:
            self._delete(key, ("gpu",))

    def _delete(self, key, tiers):
        super()._delete(key, tiers)
        if not self._held(key):
            self._worths.pop(key, None)

    def _refusal(self, request):
        return InProcessController._refusal(self, request)

    def _move(self, request, layout, due):
        keys = [layout.keys[i] for i in due]
        missing = [k for k in keys if self._held(k) and request.target not in self._held(k)]
        cold = [key for key in missing if key not in self.held["gpu"]]
        for part in pages(cold, _COPY_CHUNKS):  # each part needs room in gpu on its way
            self._give_up(len(part) - self._free())
            if len(part) > self._free():
                missing = [key for key in missing if key not in part]
        self.held[request.target].update(dict.fromkeys(missing))
        return self._keep_from(request.target, "gpu", keys)
