"""Moves chunks between the tiers of the LMCache server that this runs in, and makes room in gpu.

No LMCache call is made with a lock of this kit's held. Deletes go in batches: LMCache holds
gpu's lock for some 15 us a key.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lmcache.v1.distributed.api import PrefetchLockMode, PrefetchTaskSpec
from lmcache.v1.distributed.internal_api import L2AdapterListener

from kvttl.lmcache.tiers import LMCACHE_TIERS, ChunkKey, pages
from kvttl.server.compat import offer
from kvttl.server.guard import Guard
from kvttl.server.places import BIT_OF, HOT, Chunk, Places
from kvttl.stack.reconcile import CONTENTS_OF
from kvttl.stack.tier_watch import FAILING

logger = logging.getLogger(__name__)

_BATCH_KEYS = 500  # LMCache objects a call: gpu's lock is held for 8 ms
_COPY_CHUNKS = 64  # through gpu at once
_WRITE_S = 10.0  # without any copy done, after which a tier counts as failing
_STALLED_S = 1.0  # the same while it does
_FAILING_S = 20.0  # that it does after that, if nothing is written there
_ROOM_S = 0.25  # that a store waits at most for what is being copied


class _Orders(dict):
    """Copies that LMCache's store loop is to make: object -> (adapter, tier, chunk)."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()


class Hands:
    """What can be done with chunks; each method waits until it is done.

    Parameters
    ----------
    storage_manager : StorageManager
        LMCache's.
    places : Places
        Says where chunks are, and hears of what is done.
    adapters : mapping
        Tier below gpu -> type of the L2 adapter that is it.
    guard : Guard
        Around what LMCache calls.
    can_copy : bool
        Whether LMCache's store loop takes orders.

    Attributes
    ----------
    done : Counter
        Chunks, by what was done with them.
    gave_up : callable
        Gets the chunks that had to leave gpu for want of room, what was worth least first.
    """

    def __init__(
        self,
        storage_manager: Any,
        places: Places,
        adapters: Mapping[str, str],
        guard: Guard,
        can_copy: bool,
    ) -> None:
        self._sm, self._places = storage_manager, places
        self._tier_of = {name: tier for tier, name in adapters.items()}
        self.can_copy = can_copy
        self._orders = _Orders()
        self._errors: dict[str, tuple[float, str]] = {}  # tier -> when a write failed, and how
        self.done: Counter[str] = Counter()
        self.gave_up: Callable[[list[Chunk]], Any] = lambda _chunks: None
        self._storing, self._moving = 0, 0
        self._promising, self._guard = threading.Lock(), guard
        self.room_to_load = guard(self._room_to_load, "room to load")
        for tier, (_, adapter) in self._adapters().items():
            adapter.register_listener(_Listener(places, tier, guard))

    @property
    def tiers(self) -> tuple[str, ...]:
        """Tiers below gpu that this server has."""
        return tuple(tier for tier in BIT_OF if tier in self._adapters())

    def hot_bytes(self) -> int:
        """Return how large gpu is."""
        return self._sm.get_l1_usage()[1]

    def _adapters(self):
        """Return the L2 adapters by tier; LMCache may change them at any time."""
        found = ((self._tier_of.get(d.type_name), d.index, a) for d, a in self._sm.l2_adapters())
        return {tier: (index, adapter) for tier, index, adapter in found if tier}

    def address(self, tier: str) -> list[Any]:
        """Return where a tier is stored; None for what it has not got."""
        found = {self._tier_of.get(d.type_name): d.config for d, _ in self._sm.l2_adapters()}
        return [getattr(found.get(tier), name, None) for name in LMCACHE_TIERS[tier].address]

    def contents(self) -> Iterator[tuple[str, Callable[[], Iterable[ChunkKey]]]]:
        """Yield what lists the objects of each tier below gpu, of those where that is possible."""
        for tier, contents_of in CONTENTS_OF.items():
            if None not in (address := self.address(tier)):
                yield tier, functools.partial(contents_of, *address)

    # ---- copies ------------------------------------------------------------------------------

    def copy(self, chunks: Sequence[Chunk], target: str, wait_s: float) -> None:
        """Make copies in a tier of chunks that have none there.

        Chunks that are nowhere yet, since their store is under way, have `wait_s` to come.
        """
        chunks = [chunk for chunk in chunks if chunk.space.size_bytes]  # else no engine came yet
        coming = [chunk for chunk in chunks if not chunk.bits]
        hot = [chunk for chunk in chunks if chunk.bits & HOT]
        cold = [chunk for chunk in chunks if chunk.is_cold]
        self._mark(chunks, True)
        try:
            if target == "gpu":
                for part in _parts(cold, _COPY_CHUNKS):
                    self._load(part, PrefetchLockMode.NO_LOCK)
            elif self.can_copy and target in self._adapters():
                for _, part in _batches(hot):
                    if not self._write_down(part, target, self._patience_s(target)):
                        break
                for part in _parts(cold, _COPY_CHUNKS):
                    self._copy_below(part, target)
                self._write_down(coming, target, wait_s, may_fail=True)
        finally:
            self._mark(chunks, False)

    def _mark(self, chunks, moving):
        with self._promising:
            self._moving += len(chunks) if moving else -len(chunks)
        for chunk in chunks:
            chunk.moving = moving

    def failing(self) -> dict[str, str]:
        """Return why tiers take no copies: what a look at them says before what writes have met."""
        since_s = time.monotonic() - _FAILING_S
        met = {tier: how for tier, (at_s, how) in list(self._errors.items()) if at_s > since_s}
        return {**met, **FAILING}

    def _patience_s(self, tier):
        return _STALLED_S if tier in self.failing() else _WRITE_S

    def _write_down(self, chunks, tier, patience_s, may_fail=False):
        """Have LMCache's store loop copy chunks from gpu; returns whether all are there.

        LMCache tells nobody of a copy that failed, so this waits for `patience_s` at most
        since the last copy.
        """
        if not chunks:
            return True
        index, orders = self._adapters()[tier][0], self._orders
        objects = {
            key: chunk
            for space, some in by_space(chunks)
            for key, chunk in space.objects(some).items()
        }
        with orders.changed:  # two writes of one file at the same time would fail
            mine = [key for key in objects if orders.get(key, ())[:1] != (index,)]
            orders.update({key: (index, tier, objects[key]) for key in mine})
        if mine:
            offer(self._sm, mine)
        with orders.changed:
            waiting = objects.keys() & orders.keys()
            while waiting and orders.changed.wait(patience_s):
                waiting = objects.keys() & orders.keys()
            for key in waiting.intersection(mine):
                orders.pop(key, None)
        if not waiting:
            self._errors.pop(tier, None)
        elif not may_fail:
            self._failed([objects[key] for key in waiting], tier)
        return not waiting

    def _failed(self, chunks, tier):
        """Copies were not made: are the chunks still in gpu, or does the tier take none?"""
        there = self.in_gpu(chunks)
        gone = [chunk for chunk in chunks if chunk not in there]
        self._places.went(gone, "gpu")
        if len(gone) < len(chunks):
            how = f"{len(chunks) - len(gone)} copies were not made in time"
            self._errors[tier] = time.monotonic(), how
            self.done[f"not copied to {tier}"] += len(chunks) - len(gone)

    def _copy_below(self, chunks, tier):
        """Copy from one tier below gpu to another, through locked buffers in gpu."""
        loaded = self._load(chunks, PrefetchLockMode.LOCK)
        try:
            self._write_down(list(loaded.values()), tier, self._patience_s(tier))
        finally:
            if loaded:  # with the lock the buffers go
                self._sm.finish_read_prefetched(list(loaded))

    def _load(self, chunks, lock):
        """Load chunks into gpu; returns the objects that are there now, locked if asked for."""
        loaded = {}
        for space, some in by_space(chunks):
            with self.room_for(space.all_bytes * len(some), space.tenant):
                rows = space.rows(some)
                found = self._prefetch(rows, lock, _WRITE_S)
            for row, hits in zip(rows, found):
                loaded |= {row.keys[at]: some[at] for at in hits}
        if lock is PrefetchLockMode.NO_LOCK:
            self._places.came(set(loaded.values()), "gpu")
            self.done["promoted"] += len(loaded)
        return loaded

    def _prefetch(self, rows, lock, wait_s, skip_l2=False):
        spec = PrefetchTaskSpec(rows, fetching_policy="full", lock_mode=lock)
        handle = self._sm.submit_prefetch_task(spec, "kvttl", skip_l2=skip_l2)
        self._sm.wait_prefetch_status(handle, wait_s)
        result = self._sm.query_prefetch_status(handle)
        if result is None:
            return [[] for _ in rows]
        return [cells.gather(list(range(len(r.keys)))) for cells, r in zip(result.hit_cells, rows)]

    def in_gpu(self, chunks: Iterable[Chunk]) -> set[Chunk]:
        """Ask LMCache which chunks have any object in gpu."""
        found = set()
        for space, part in _batches(chunks):
            for hits in self._prefetch(space.rows(part), PrefetchLockMode.NO_LOCK, 1.0, True):
                found.update(part[at] for at in hits)
        return found

    # ---- deletes ------------------------------------------------------------------------------

    def delete(self, chunks: Sequence[Chunk], tier: str) -> list[Chunk]:
        """Delete copies from one tier; returns those that are in use, and stay in gpu."""
        if tier == "gpu":
            return self._delete_hot(chunks)
        if tier in self._adapters():
            adapter = self._adapters()[tier][1]
            for space, part in _batches(chunks):
                adapter.delete(list(space.objects(part)))
        return []

    def _delete_hot(self, chunks):
        """Delete from gpu; returns those that stay, since they are in use."""
        locked = []
        for space, part in _batches(chunks):
            at_s = time.time()  # what is stored after that stays
            _, skipped = self._sm.delete_l1_keys(list(space.objects(part)))
            left = self.in_gpu(part) if skipped else ()  # it is not said which
            locked += left
            self._places.went([chunk for chunk in part if chunk not in left], "gpu", at_s)
        return locked

    # ---- room in gpu -------------------------------------------------------------------------

    def room_for(self, size_bytes: int, tenant: str) -> _Room:
        """Make room for what is stored or loaded in a ``with`` block, and keep it until its end."""
        return _Room(self, size_bytes, tenant)

    def promise(self, size_bytes: int, tenant: str, stores: int) -> int:
        """Count a store and the bytes that it will take; returns all that are promised."""
        with self._promising:
            self._places.coming[tenant] += size_bytes
            self._storing += stores
            if not self._places.coming[tenant]:
                del self._places.coming[tenant]
            return self._places.coming.total()

    def make_room(self, size_bytes: int) -> bool:
        """Give up what goes first until so many bytes fit into gpu; False: they do not.

        Without any other copy of what goes: who wants it kept writes it down before. What is
        being copied or stored is in use, but not for long: that is waited for, for a moment.
        """
        until_s = time.monotonic() + _ROOM_S
        while not (is_there := self.give_up(self._delete_hot, size_bytes)):
            if not (self._moving or self._storing > 1) or time.monotonic() > until_s:
                break
            time.sleep(_ROOM_S / 50)
        nothing_known = not self._places.hot_chunks and self._guard.failures
        return is_there or bool(nothing_known) and self.clear()

    def _room_to_load(self, key, chunks):
        """Make room for a hit's chunks below gpu, of which `key` is one's: else it would be cut.

        What goes has another copy, and goes at once: LMCache's loads wait meanwhile.
        """
        _, total = self._sm.get_l1_usage()
        for chunk in self._places.of_objects([key]):
            size_bytes = min(int(chunks * chunk.space.all_bytes), total // 2)
            self.give_up(self._delete_saved, size_bytes)

    def _delete_saved(self, chunks):
        unsaved = [chunk for chunk in chunks if chunk.bits == HOT]
        return unsaved + self._delete_hot([chunk for chunk in chunks if chunk.bits != HOT])

    def clear(self) -> bool:
        """Empty gpu where nothing is known of what is there: nobody else makes room."""
        self._sm.clear()  # not what is in use
        self.done["cleared"] += 1
        return True

    def give_up(
        self,
        delete: Callable[[list[Chunk]], list[Chunk]],
        size_bytes: int,
        share: float = 1.0,
        before_s: float = math.inf,
    ) -> bool:
        """Have what goes first deleted until so many bytes fit; `delete` returns what stays."""
        staying: list[Chunk] = []
        try:
            while True:
                used, total = self._sm.get_l1_usage()
                lacking = int(used + size_bytes - share * total)
                if lacking <= 0:
                    return True
                chunks = self._places.first_to_go(lacking, before_s, total)
                if not chunks:
                    return False
                staying += delete(chunks)
                self.done["given up"] += len(chunks)
                self.gave_up(chunks)
        finally:
            self._places.stay(staying)

    # ---- LMCache's store loop asks ------------------------------------------------------------

    def targets(self, keys: Sequence, birth: Sequence[int]) -> dict[int, list]:
        """Return by adapter what LMCache is to write down; `birth` gets what nobody ordered."""
        if self._guard.failures["store"]:  # nobody else may have heard of what came
            self._places.came(list(self._places.of_objects(keys, new=True)), "gpu")
        plan: dict[int, list] = {index: [] for index in birth}
        orders = self._orders
        if not orders:
            return {index: list(keys) for index in birth}
        with orders.changed:
            for key in keys:
                order = orders.get(key)
                for index in birth if order is None else order[:1]:
                    plan.setdefault(index, []).append(key)
        return plan

    def written(self, keys: Sequence) -> None:
        """Take note of copies that LMCache has made."""
        orders = self._orders
        with orders.changed:
            made = [orders.pop(key) for key in keys if key in orders]
            orders.changed.notify_all()
        for tier in {tier for _, tier, _ in made}:
            chunks = [chunk for _, to, chunk in made if to == tier]
            self._places.came(chunks, tier)
            self.done[f"copied to {tier}"] += len(chunks)


class _Room:
    def __init__(self, hands, size_bytes, tenant):
        self._hands, self._size_bytes, self._tenant = hands, size_bytes, tenant
        self.refused = lambda: None  # called if there is not enough

    def __enter__(self):
        promised = self._hands.promise(self._size_bytes, self._tenant, 1)
        try:
            if not self._hands.make_room(promised):
                self.refused()
        except Exception:
            self._hands.clear()
            logger.exception("no room could be made: gpu is emptied")
        return self

    def __exit__(self, *_exc_info):
        self._hands.promise(-self._size_bytes, self._tenant, -1)


class _Listener(L2AdapterListener):
    """Hears what is in one tier below gpu, whoever put it there or deleted it."""

    def __init__(self, places, tier, guard):
        self._places, self._tier = places, tier
        self._came = guard(self._note_came, f"{tier}: copies came")
        self._went = guard(self._note_went, f"{tier}: copies went")

    def on_l2_keys_stored(self, keys, sizes):
        self._came(keys)

    def on_l2_keys_accessed(self, keys):
        self._came(keys)

    def on_l2_keys_deleted(self, keys):
        self._went(keys)

    def _note_came(self, keys):
        self._places.came(list(self._places.of_objects(keys, new=True)), self._tier)

    def _note_went(self, keys):
        self._places.went(list(self._places.of_objects(keys)), self._tier)


def by_space(chunks: Iterable[Chunk]) -> Iterator[tuple[Any, list[Chunk]]]:
    """Yield chunks by model and salt."""
    groups: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(id(chunk.space), []).append(chunk)
    for some in groups.values():
        yield some[0].space, some


def _batches(chunks):
    """Yield chunks by model and salt, as many at once as `_BATCH_KEYS` allows."""
    for space, some in by_space(chunks):
        objects = space.model.world_size * (len(space.layouts) or 1)
        for part in pages(some, max(1, _BATCH_KEYS // objects)):
            yield space, part


def _parts(chunks, size):
    return [part for _, some in by_space(chunks) for part in pages(some, size)]
