"""Where each chunk of an LMCache server is, kept up to date from inside of it; no calls, no I/O."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmcache.v1.distributed.api import GroupedObjectKeys, ObjectKey

from caching_heuristics import TIERS
from kvttl.lmcache.client import LMCacheUnavailable
from kvttl.lmcache.salts import chunk_key
from kvttl.lmcache.tiers import ChunkKey

BIT_OF = {tier: 1 << code for code, tier in enumerate(TIERS)}
HOT = BIT_OF["gpu"]
TIERS_OF = [tuple(t for t in TIERS if bits & BIT_OF[t]) for bits in range(1 << len(TIERS))]
UNDECIDED = math.inf
PINNED = math.inf  # of a policy's worths, (epoch, value): with the pin's end, Unix time
_FEW_ENTRIES = 1_000  # of the heap, below which stale ones are not worth rebuilding it


class Model(NamedTuple):
    """An engine's model on its ranks: chunks of one have nothing to do with another's."""

    name: str
    world_size: int


@dataclass(slots=True, eq=False)
class Chunk:
    """One chunk of one model under one salt: an LMCache object for each rank and object group."""

    space: Space
    digest: bytes
    depth: int = 0  # its number in the prompt
    bits: int = 0  # the tiers that hold it
    ends_s: Any = UNDECIDED  # until when some decision wants it in gpu, Unix time; or its worth
    since_s: float = 0.0  # when it came to gpu
    moving: bool = False  # some move is about it: not to be evicted

    @property
    def key(self) -> str:
        return chunk_key(self.digest.hex(), self.space.salt)

    @property
    def is_cold(self) -> bool:
        return bool(self.bits) and not self.bits & HOT


class _Order:
    """In which order gpu gives some chunks up.

    What ends first goes first, and of one prompt the last chunk first. Chunks that nothing is
    decided about, whose requests still run, go last, the oldest first.
    """

    def __init__(self, share: float = 1.0) -> None:
        self.share, self.hot_bytes = share, 0  # of gpu, that these chunks may have, and have
        self.decided: list[tuple] = []  # a heap of (ends_s, -depth, number, chunk); some are stale
        self.undecided: deque[Chunk] = deque()
        self._number = itertools.count()

    def enter(self, chunk: Chunk) -> None:
        if chunk.ends_s is UNDECIDED:
            self.undecided.append(chunk)
        else:
            entry = (chunk.ends_s, -chunk.depth, next(self._number), chunk)
            heapq.heappush(self.decided, entry)

    def take(self, left: int, before_s: float, taken: dict[Chunk, None]) -> int:
        """Move the first to go to `taken` until nothing is `left` of so many bytes; returns it."""
        moving, passed = [], []
        while left > 0 and self.decided:
            entry = heapq.heappop(self.decided)
            if not self._is_true(entry) or entry[-1] in taken:
                continue
            if entry[-1].moving:
                moving.append(entry)
                continue
            taken[entry[-1]] = None
            left -= entry[-1].space.all_bytes
        for entry in moving:
            heapq.heappush(self.decided, entry)
        while left > 0 and self.undecided and len(passed) < _FEW_ENTRIES:
            chunk = self.undecided.popleft()
            if not chunk.bits & HOT or chunk.ends_s is not UNDECIDED or chunk in taken:
                continue
            if chunk.moving or chunk.since_s >= before_s:
                passed.append(chunk)
                continue
            taken[chunk] = None
            left -= chunk.space.all_bytes
        self.undecided.extendleft(reversed(passed))
        return left

    def trim(self, most: int) -> None:
        """Forget what is stale, or there twice, where that may be much."""
        if len(self.decided) > most:
            true = {entry[-1]: entry for entry in self.decided if self._is_true(entry)}
            self.decided = list(true.values())
            heapq.heapify(self.decided)
        if len(self.undecided) > most:
            waiting = (c for c in self.undecided if c.ends_s is UNDECIDED and c.bits & HOT)
            self.undecided = deque(dict.fromkeys(waiting))

    def _is_true(self, entry):
        chunk = entry[-1]
        return bool(chunk.bits & HOT) and chunk.ends_s == entry[0]


@dataclass(slots=True, eq=False)
class Space:
    """All chunks of a model under one salt.

    `layouts` are LMCache's, by object group; they are kept, since LMCache forgets them with
    the engine. `size_bytes` is what gpu needs for a chunk's objects on one rank.
    """

    model: Model
    salt: str
    layouts: Mapping[int, Any]
    size_bytes: int
    chunks: dict[bytes, Chunk] = field(default_factory=dict)
    orders: Sequence[_Order] = ()  # that its chunks are in: everybody's, and the tenant's own

    @property
    def tenant(self) -> str:
        """Whose chunks these are: what is added to a salt makes no other tenant of it."""
        return self.salt.partition("~")[0]

    @property
    def all_bytes(self) -> int:
        """What gpu needs for a chunk's objects on all ranks."""
        return self.size_bytes * self.model.world_size

    def objects(self, chunks: Iterable[Chunk]) -> dict[ObjectKey, Chunk]:
        """Return LMCache's objects of chunks, on all ranks."""
        ranks = [self._rank(number) for number in range(self.model.world_size)]
        return {
            ObjectKey(chunk.digest, self.model.name, rank, group, self.salt): chunk
            for rank, group in itertools.product(ranks, self.layouts)
            for chunk in chunks
        }

    def rows(self, chunks: Sequence[Chunk]) -> list[GroupedObjectKeys]:
        """Return the rows of a prefetch of chunks, one a rank and group; each as the chunks."""
        keys, size = list(self.objects(chunks)), len(chunks)
        parts = [keys[at : at + size] for at in range(0, len(keys), size)]
        groups = (part[0].object_group_id for part in parts)
        return [GroupedObjectKeys(p, g, self.layouts[g]) for p, g in zip(parts, groups)]

    def _rank(self, number):
        return ObjectKey.ComputeKVRank(self.model.world_size, number, self.model.world_size, number)


class Places:
    """Chunks by place, and the order in which gpu gives them up; safe for concurrent use.

    Parameters
    ----------
    context : MPCacheServerContext
        Knows the layouts of models.

    Attributes
    ----------
    coming : Counter
        Bytes that stores under way bring to gpu, by tenant.
    """

    def __init__(self, context: Any) -> None:
        self._registry, sm = context.layout_desc_registry, context.storage_manager
        self._align = 4096 if sm.is_multi_l1 else sm.l1_memory_desc.align_bytes
        self._spaces: dict[tuple, Space] = {}
        self.clock: Callable[[], float] = time.time  # of who decides
        self._lock = threading.Lock()
        self._stored: deque[tuple] = deque()  # by requests, and not entered yet
        self._everybody, self._own = _Order(), {}
        self.coming: Counter[str] = Counter()
        self.hot_chunks = 0
        self.groups: dict[Model, set[int]] = {}  # object groups, of models from before the start
        self.changed: dict[Model, dict[Chunk, None]] = {}  # below gpu, for who writes it down

    @property
    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Who takes it first enters what stores have left: these wait for nobody."""
        with self._lock:
            self._enter_stored()
            yield

    def space(self, name: str, world_size: int, salt: str) -> Space | None:
        """Return the chunks of a model under a salt; None while nobody knows such a model.

        Of one that no engine has come for since the start, only the objects' names are known:
        they can be deleted.
        """
        found = self._spaces.get((name, world_size, salt))
        if found is None or not found.size_bytes:
            model = Model(name, world_size)
            layouts = self._registry.find_group_layout_descs(name, world_size)
            size_bytes = sum(map(self._size_bytes, (layouts or {}).values()))
            layouts = layouts or dict.fromkeys(self.groups.get(model, ()))
            if not layouts:
                return None
            self.groups.setdefault(model, set()).update(layouts)
            with self.lock:
                new = Space(model, salt, {}, 0)
                found = self._spaces.setdefault((name, world_size, salt), new)
                self._sort_in(found)
                found.layouts, found.size_bytes = dict(layouts), size_bytes
        return found

    def take_changed(self, model: Model) -> list[Chunk]:
        """Return of which chunks a copy below gpu has come or gone since the last call."""
        with self.lock:
            changed, self.changed[model] = self.changed.get(model, ()), {}
            return list(changed)

    def set_budgets(self, budgets: Mapping[str, float]) -> None:
        """Set which share of gpu tenants have: over it, their own chunks go before others'."""
        with self.lock:
            self._own = {tenant: _Order(share) for tenant, share in budgets.items()}
            for space in self._spaces.values():
                self._sort_in(space)
                for order in space.orders[1:]:
                    for chunk in [chunk for chunk in space.chunks.values() if chunk.bits & HOT]:
                        order.hot_bytes += space.all_bytes
                        order.enter(chunk)

    def _sort_in(self, space):
        own = self._own.get(space.tenant)
        space.orders = [self._everybody] if own is None else [self._everybody, own]

    def chunks(self, model: Model | None = None) -> list[Chunk]:
        """Return what is somewhere, of one model or of all."""
        with self.lock:
            spaces = [each for each in self._spaces.values() if model in (None, each.model)]
            return [chunk for space in spaces for chunk in space.chunks.values()]

    def _size_bytes(self, layout):
        sizes = (s.numel() * d.itemsize for s, d in zip(layout.shapes, layout.dtypes))
        return sum(-(-size // self._align) * self._align for size in sizes)

    # ---- what has come and gone -----------------------------------------------------------

    def stored(self, space: Space, first: int, digests: Sequence[bytes]) -> None:
        """Take note of chunks that a request has stored; `first` is the first one's number."""
        self._stored.append((space, first, digests, time.time()))

    def _enter_stored(self):
        while self._stored:
            space, first, digests, now_s = self._stored.popleft()
            chunks, come = space.chunks, []
            for depth, digest in enumerate(digests, first):
                chunk = chunks.get(digest)
                if chunk is None:
                    chunk = chunks[digest] = Chunk(space, digest, depth)
                if not chunk.bits & HOT:
                    chunk.bits |= HOT
                    chunk.ends_s, chunk.since_s = UNDECIDED, now_s
                    come.append(chunk)
                else:  # deleted before that, perhaps, without a word until now
                    chunk.since_s = now_s
            self.hot_chunks += len(come)
            for order in space.orders:
                order.undecided.extend(come)
                order.hot_bytes += len(come) * space.all_bytes

    def came(self, chunks: Iterable[Chunk], tier: str) -> None:
        """Take note of copies that are now in a tier; in gpu they keep the end they had."""
        bit, now_s = BIT_OF[tier], time.time()
        with self.lock:
            for chunk in chunks:
                if bit == HOT and not chunk.bits & HOT:
                    chunk.since_s, self.hot_chunks = now_s, self.hot_chunks + 1
                    for order in chunk.space.orders:
                        order.hot_bytes += chunk.space.all_bytes
                        order.enter(chunk)
                self._note(chunk, bit & ~chunk.bits)
                chunk.bits |= bit
                chunk.space.chunks.setdefault(chunk.digest, chunk)

    def went(self, chunks: Iterable[Chunk], tier: str, at_s: float = math.inf) -> None:
        """Take note of copies that have left a tier; not of those that came back after `at_s`."""
        bit = BIT_OF[tier]
        with self.lock:
            for chunk in chunks:
                if not chunk.bits & bit or (bit == HOT and chunk.since_s > at_s):
                    continue
                chunk.bits &= ~bit
                self._note(chunk, bit)
                if bit == HOT:
                    self.hot_chunks -= 1
                    for order in chunk.space.orders:
                        order.hot_bytes -= chunk.space.all_bytes
                if not chunk.bits:
                    chunk.space.chunks.pop(chunk.digest, None)

    def look_through(self, tier: str, contents: Callable[[], Iterable[ChunkKey]]) -> None:
        """Take note of all objects that a tier holds, whoever put them there; the rest is gone."""
        known = {chunk for chunk in self.chunks() if chunk.bits & BIT_OF[tier]}
        objects = []
        for name, rank, group, digest, salt in contents():
            model = Model(name, ObjectKey.WorldSizeFromKVRank(rank))
            self.groups.setdefault(model, set()).add(group)
            objects.append(ObjectKey(bytes.fromhex(digest), name, rank, group, salt))
        there = list(self.of_objects(objects, new=True))
        self.came(there, tier)
        self.went(known.difference(there), tier)

    def of_objects(self, keys: Iterable[ObjectKey], new: bool = False) -> Iterator[Chunk]:
        """Yield the chunks of LMCache's objects; unknown ones only if they are `new`."""
        with self.lock:  # all that was stored is entered
            pass
        for key in keys:
            size = ObjectKey.WorldSizeFromKVRank(key.kv_rank)
            space = self.space(key.model_name, size, key.cache_salt)
            chunk = space and space.chunks.get(key.chunk_hash)
            if chunk is None and new and space:
                chunk = Chunk(space, key.chunk_hash)
            if chunk is not None:
                yield chunk

    def of_keys(self, model: Model, keys: Iterable[str]) -> list[Chunk]:
        """Return the chunks of a manager's keys; those that are nowhere are new ones.

        Raises
        ------
        LMCacheUnavailable
            No engine has said yet what the model's chunks look like.
        """
        found, space = [], None
        with self.lock:  # as above
            pass
        for key in keys:
            digest, _, salt = key.partition("@")
            if space is None or space.salt != salt:
                space = self.space(*model, salt)
            if space is None:
                raise LMCacheUnavailable(f"no engine of {model.name} has come to this server yet")
            digest = bytes.fromhex(digest)
            found.append(space.chunks.get(digest) or Chunk(space, digest))
        return found

    # ---- what goes first ---------------------------------------------------------------------

    def decided(self, chunks: Sequence[Chunk], ends_s: float) -> None:
        """Take note until when a decision wants a prompt's chunks in gpu; the longest counts."""
        with self.lock:
            for depth, chunk in enumerate(chunks):
                if chunk.ends_s is UNDECIDED or chunk.ends_s < ends_s:
                    chunk.depth, chunk.ends_s = depth, ends_s
                    self._enter(chunk)
            self._trim()

    def valued(self, chunks: Sequence[Chunk], values: Sequence[Any]) -> None:
        """Take note of what a policy says now that a prompt's chunks are worth in gpu."""
        now_s = self.clock()
        with self.lock:
            for depth, (chunk, value) in enumerate(zip(chunks, values)):
                before = chunk.ends_s
                is_longer = value[0] == PINNED and before is not UNDECIDED and value > before
                stays = is_pinned(before, now_s) and not is_longer
                if chunk.bits and before != value and not stays:
                    chunk.depth, chunk.ends_s = depth, value
                    self._enter(chunk)
            self._trim()

    def first_to_go(
        self, size_bytes: int, before_s: float = math.inf, hot_bytes: int = 0
    ) -> list[Chunk]:
        """Take chunks out of the order that have at least so many bytes, if there are.

        First of tenants that have more of gpu's `hot_bytes` than their budgets, with what is
        coming. Of those that nothing is decided about only what came before
        `before_s`. Whoever takes them tells `went` of those that are gone and `stay` of the others.
        """
        taken: dict[Chunk, None] = {}
        with self.lock:
            for tenant, order in self._own.items():
                over = order.hot_bytes + self.coming[tenant] - int(order.share * hot_bytes)
                own = min(size_bytes, over)
                if own > 0:
                    size_bytes -= own - order.take(own, before_s, taken)
            self._everybody.take(size_bytes, before_s, taken)
        return list(taken)

    def stay(self, chunks: Iterable[Chunk]) -> None:
        """Put chunks back into the order."""
        with self.lock:
            for chunk in chunks:
                self._enter(chunk)
            self._trim()

    def _note(self, chunk, cold_bits):
        changed = self.changed.get(chunk.space.model)
        if changed is not None and cold_bits & ~HOT:
            changed[chunk] = None

    def _enter(self, chunk):
        for order in chunk.space.orders:
            order.enter(chunk)

    def _trim(self):
        for order in (self._everybody, *self._own.values()):
            order.trim(2 * self.hot_chunks + _FEW_ENTRIES)


def is_pinned(worth: Any, now_s: float) -> bool:
    """Say whether a request has pinned what is worth that, and the pin has not ended."""
    return worth is not UNDECIDED and worth[0] == PINNED and worth[1] > now_s
