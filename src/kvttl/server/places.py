"""Where each chunk of an LMCache server is, kept up to date from inside of it; no calls, no I/O."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    What ends first goes first, and of one prompt the last chunk first. Chunks that nothing is
    decided about, whose requests still run, go last, the oldest first.

    Parameters
    ----------
    context : MPCacheServerContext
        Knows the layouts of models.
    """

    def __init__(self, context: Any) -> None:
        self._registry, sm = context.layout_desc_registry, context.storage_manager
        self._align = 4096 if sm.is_multi_l1 else sm.l1_memory_desc.align_bytes
        self._spaces: dict[tuple, Space] = {}
        self.lock = threading.Lock()
        self._order: list[tuple] = []  # a heap of (ends_s, -depth, number, chunk); some are stale
        self._undecided: deque[Chunk] = deque()
        self._number = itertools.count()
        self.hot_chunks = 0
        self.groups: dict[Model, set[int]] = {}  # object groups, of models from before the start
        self.changed: dict[Model, dict[Chunk, None]] = {}  # below gpu, for who writes it down

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
                found.layouts, found.size_bytes = dict(layouts), size_bytes
        return found

    def take_changed(self, model: Model) -> list[Chunk]:
        """Return of which chunks a copy below gpu has come or gone since the last call."""
        with self.lock:
            changed, self.changed[model] = self.changed.get(model, ()), {}
            return list(changed)

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
        chunks, now_s, come = space.chunks, time.time(), []
        with self.lock:
            for depth, digest in enumerate(digests, first):
                chunk = chunks.get(digest)
                if chunk is None:
                    chunk = chunks[digest] = Chunk(space, digest, depth)
                if not chunk.bits & HOT:
                    chunk.bits |= HOT
                    chunk.ends_s, chunk.since_s = UNDECIDED, now_s
                    come.append(chunk)
            self._undecided.extend(come)
            self.hot_chunks += len(come)

    def came(self, chunks: Iterable[Chunk], tier: str) -> None:
        """Take note of copies that are now in a tier; in gpu they keep the end they had."""
        bit, now_s = BIT_OF[tier], time.time()
        with self.lock:
            for chunk in chunks:
                if bit == HOT and not chunk.bits & HOT:
                    chunk.since_s, self.hot_chunks = now_s, self.hot_chunks + 1
                    self._enter(chunk)
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
                self.hot_chunks -= bit == HOT
                if not chunk.bits:
                    chunk.space.chunks.pop(chunk.digest, None)

    def found(self, keys: Iterable[ChunkKey], tier: str) -> None:
        """Take note of objects that a tier was found to hold, whoever put them there."""
        objects = []
        for name, rank, group, digest, salt in keys:
            model = Model(name, ObjectKey.WorldSizeFromKVRank(rank))
            self.groups.setdefault(model, set()).add(group)
            objects.append(ObjectKey(bytes.fromhex(digest), name, rank, group, salt))
        self.came(list(self.of_objects(objects, new=True)), tier)

    def of_objects(self, keys: Iterable[ObjectKey], new: bool = False) -> Iterator[Chunk]:
        """Yield the chunks of LMCache's objects; unknown ones only if they are `new`."""
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
        found = []
        space = None
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
            self._tidy()

    def valued(self, chunks: Sequence[Chunk], values: Sequence[Any]) -> None:
        """Take note of what a policy says now that a prompt's chunks are worth in gpu."""
        with self.lock:
            for depth, (chunk, value) in enumerate(zip(chunks, values)):
                if chunk.bits and chunk.ends_s != value and not is_pinned(chunk.ends_s):
                    chunk.depth, chunk.ends_s = depth, value
                    self._enter(chunk)
            self._tidy()

    def first_to_go(self, size_bytes: int, before_s: float = math.inf) -> list[Chunk]:
        """Take chunks out of the order that have at least so many bytes, if there are.

        Of those that nothing is decided about only what came before `before_s`. Whoever takes
        them tells `went` of those that are gone and `stay` of the others.
        """
        taken, left, moving, in_use = {}, size_bytes, [], []
        with self.lock:
            while left > 0 and self._order:
                entry = heapq.heappop(self._order)
                if not self._is_true(entry) or entry[-1] in taken:
                    continue
                if entry[-1].moving:
                    moving.append(entry)
                    continue
                taken[entry[-1]] = None
                left -= entry[-1].space.size_bytes
            for entry in moving:
                heapq.heappush(self._order, entry)
            while left > 0 and self._undecided and self._undecided[0].since_s < before_s:
                chunk = self._undecided.popleft()
                if not chunk.bits & HOT or chunk.ends_s is not UNDECIDED:
                    continue
                if chunk.moving:
                    in_use.append(chunk)
                    continue
                taken[chunk] = None
                left -= chunk.space.size_bytes
            self._undecided.extendleft(reversed(in_use))
        return list(taken)

    def stay(self, chunks: Iterable[Chunk]) -> None:
        """Put chunks back into the order."""
        with self.lock:
            for chunk in chunks:
                self._enter(chunk)

    def _tidy(self):
        most = 2 * self.hot_chunks + _FEW_ENTRIES
        if len(self._order) > most:
            self._order = [entry for entry in self._order if self._is_true(entry)]
            heapq.heapify(self._order)
        if len(self._undecided) > most:
            waiting = (c for c in self._undecided if c.ends_s is UNDECIDED and c.bits & HOT)
            self._undecided = deque(dict.fromkeys(waiting))

    def _note(self, chunk, cold_bits):
        changed = self.changed.get(chunk.space.model)
        if changed is not None and cold_bits & ~HOT:
            changed[chunk] = None

    def _enter(self, chunk):
        if chunk.ends_s is UNDECIDED:
            self._undecided.append(chunk)
        else:
            entry = (chunk.ends_s, -chunk.depth, next(self._number), chunk)
            heapq.heappush(self._order, entry)

    def _is_true(self, entry):
        chunk = entry[-1]
        return bool(chunk.bits & HOT) and chunk.ends_s == entry[0]


def is_pinned(worth: Any) -> bool:
    """Say whether a request has pinned what is worth that, and the pin has not ended."""
    return worth is not UNDECIDED and worth[0] == PINNED and worth[1] > time.time()
