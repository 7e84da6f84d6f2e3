"""LMCache 0.5.6's own rules without LMCache: the manager's real code on a model of the server.

`kvttl.replay.engine` answers fast what a policy would hit. This answers slowly (a few
thousand requests) what this kit's manager *on LMCache* would: its real claims,
ladder and moves, on a memory tier that evicts in batches above a watermark,
does not take in what it loads from below, and refuses what does not fit.
"""

import itertools
from collections.abc import Sequence

from caching_heuristics import TIERS
from kvttl.lmcache.layout import InProcessController, outcome_of

EVICTION_WATERMARK, EVICTION_RATIO = 0.8, 0.2  # defaults of `lmcache server` 0.5.6


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
        # Of gpu the order matters: least recently used first.
        self.held: dict[str, dict[str, None]] = {tier: {} for tier in TIERS}
        self.backends = self.held

    # ---- what the engine sees ----------------------------------------------------

    def serve(self, tokens: Sequence[int]) -> dict[str, int]:
        """Look a prompt up, load, compute and store the rest; returns hit tokens by tier."""
        keys = [key for key, _ in self._chunks(tokens)]
        sources = self._load(keys, keep=self.retain)
        new = [key for key in keys[len(sources) :] if key not in self.held["gpu"]]
        if len(new) <= self._free():  # one allocation for all: all of them or none
            self._create(new)
            for tier in TIERS[1:]:  # written through
                self.held[tier].update(dict.fromkeys(new))
        self._touch(keys)
        return {t: n * self.chunk_size_tokens for t in TIERS if (n := sources.count(t))}

    def evict(self) -> None:
        """Do what LMCache's eviction loop does once a second, until it has nothing to do."""
        hot = self.held["gpu"]
        while len(hot) >= self.watermark * self.hot_chunks:
            for key in list(hot)[: max(1, int(len(hot) * self.ratio))]:
                del hot[key]

    def _load(self, keys, keep):
        """Return the tier of each chunk of the longest prefix that can be loaded."""
        sources = [tiers[0] for tiers in itertools.takewhile(bool, map(self._held, keys))]
        free = self._free()
        for tier in TIERS[1:]:  # one allocation an adapter: all of its chunks or none
            wanted = sources.count(tier)
            if wanted > free:
                sources = sources[: sources.index(tier)]
                break
            free -= wanted
        if keep:
            self._create([key for key, tier in zip(keys, sources) if tier != "gpu"])
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
        self._load(prefix, keep=True)
        self._touch(prefix)
        left = len(wanted) - len(self.held["gpu"].keys() & wanted)
        return outcome_of("gpu", len(wanted) - left, left, self.layout_of(wanted))
