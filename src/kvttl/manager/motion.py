"""Which chunks are moving, and where chunks were last seen: what keeps moves apart.

Several threads move chunks: decisions, and a sweep. One lock guards the bookkeeping of all
of them and is never held over a call to the controller, so nobody waits for another's
moves. What holds all the same:

1. One move at a time for each chunk. A move begins under the lock: chunks that another
   move is about are left out, and so are those that the claims, looked at again, do not
   want there any more. The rest counts as *moving* until the move has ended.
2. Who looks up where chunks are *watches* from before the look-up on, and so knows which
   of them others have moved since: for those the answer may be old, nothing is moved.
3. A claim is made under the same lock. So a wish is either seen by a move that begins
   later, or its maker knows of the move. Then the claim becomes *unsettled*, with the
   prompt's tokens, and a sweep carries the wish out once the other move has ended: a
   hotter wish that is made during a move down ends up hotter.
4. A copy is deleted only by the controller, after it has seen a colder one; the last ones
   only if no claim wanted the chunk when the delete began.
5. Where a chunk was last seen is remembered only if nobody else moved it since the
   look-up: an old answer must not hide a new hot copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from threading import Lock
from typing import Any

from caching_heuristics import TIER_CODES
from kvttl.lmcache.layout import BaseController
from kvttl.manager.tables import BoundedTable

_MAX_REMEMBERED = 200_000  # chunks; about 150 bytes each


class Motion:
    """Moves chunks for several threads at once, and knows which ones are moving.

    Parameters
    ----------
    controller : BaseController
        Says where KV is, and moves it.

    Attributes
    ----------
    lock : threading.Lock
        Guards this and whatever must be decided together with it.
    """

    def __init__(self, controller: BaseController) -> None:
        self.controller = controller
        self.lock = Lock()
        self._moving: set[str] = set()
        self._watchers: list[set[str]] = []
        # Chunk key -> its tier, below gpu.
        self._last_tier = BoundedTable(_MAX_REMEMBERED, _MAX_REMEMBERED, lambda _tier: 1)

    def move(
        self, source: str, target: str, timeout_s: float | None = None, **what: Any
    ) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
        """Return what a move did, for a record, and where its chunks were seen last."""
        here = self.controller.instance_id
        done = self.controller.move([here, source], [here, target], timeout_s=timeout_s, **what)
        layout = done.pop("layout")
        return done, {} if layout is None else dict(zip(layout.keys, layout.of(here)))

    def tiers_of(self, keys: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return where chunks are, as the directory shows it and `as_last_seen` corrects it."""
        layout = self.controller.layout_of(keys)
        held = self.as_last_seen(layout.keys, layout.of(self.controller.instance_id))
        return dict(zip(layout.keys, held))

    @contextmanager
    def watch(self) -> Iterator[set[str]]:
        """Collect, while the block runs, the keys of chunks that others move or are moving."""
        with self.lock:
            others = set(self._moving)
            self._watchers.append(others)
        try:
            yield others
        finally:
            with self.lock:
                self._watchers = [each for each in self._watchers if each is not others]

    def begin(
        self, keys: Collection[str], others: Set[str], promoted: Collection[str] = ()
    ) -> None:
        """Count chunks as moving, `promoted` as those that get hotter; under the lock.

        `others` is what the mover's own `watch` collects.
        """
        self._moving.update(keys)
        for watcher in self._watchers:
            if watcher is not others:
                watcher.update(keys)
        self._forget(promoted)

    def end(self, keys: Collection[str], promoted: Collection[str] = ()) -> None:
        """Say that a move has ended, whatever became of it; takes the lock."""
        with self.lock:
            self._moving.difference_update(keys)
            self._forget(promoted)

    def _forget(self, keys):
        for key in keys:
            self._last_tier.pop(key)

    def as_last_seen(
        self, keys: Sequence[str], held: Sequence[tuple[str, ...]]
    ) -> tuple[tuple[str, ...], ...]:
        """Return the tiers of chunks without those hotter than where they were last seen.

        The directory shows the L1 copy that a load from L2 makes for an instant, until
        the delete that follows the load; a chunk that was colder and has been a hit
        since cannot have become hot by itself.
        """
        with self.lock:
            codes = [TIER_CODES[self._last_tier.get(key, "gpu")] for key in keys]
        return tuple(
            tuple(tier for tier in tiers if TIER_CODES[tier] >= code) or tiers
            for tiers, code in zip(held, codes)
        )

    def remember(
        self, keys: Sequence[str], held: Sequence[tuple[str, ...]], doubtful: Set[str]
    ) -> None:
        """Keep where chunks were just seen, for the next look (bounded); not the doubtful ones."""
        with self.lock:
            for key, tiers in zip(keys, held):
                self._last_tier.pop(key)
                if key not in doubtful and tiers and tiers[0] != "gpu":
                    self._last_tier.put(key, tiers[0])
