"""LMCache's key directory, read and changed for one model and one tenant."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from caching_heuristics import TIERS
from kvttl.lmcache.client import LMCacheError, LMCacheHTTP
from kvttl.lmcache.layout import KVLayout, Outcome, check_tokens, outcome_of
from kvttl.lmcache.salts import chunk_key, kept_under, salt_of
from kvttl.lmcache.tiers import tier_of

_VERIFY_S = 0.5  # a delete shows in the directory within an event flush (0.2 s by default)


@dataclass
class Directory:
    """Where LMCache's servers hold the KV of one model, and how to change it.

    Other models' chunks of equal tokens have equal hashes: what the coordinator lists of them
    is left out of every answer. Tenants' chunks are told apart by their keys.

    Parameters
    ----------
    http : LMCacheHTTP
        The calls.
    model : str
        The model name that the engine stores KV under.
    world_size : int
        The engine's tensor-parallel size.
    cache_salt : str
        The only tenant whose chunks are shown, by their plain hashes; empty = all.
    """

    http: LMCacheHTTP
    model: str
    world_size: int = 1
    cache_salt: str = ""
    _shapes: list[dict] = field(default_factory=list, init=False)  # the object keys of one chunk

    # ---- reading -----------------------------------------------------------------

    def layout(self, tokens: Sequence[int], cache_salt: str = "") -> KVLayout:
        """Return where each complete chunk of a prompt is, under a salt."""
        tokens, salt = check_tokens(tokens), kept_under(cache_salt)
        return self._look_up(self._prompt(tokens, salt)) if tokens else KVLayout((), {})

    def layout_of(self, keys: Sequence[str], instance_id: str) -> KVLayout:
        """Return where chunks are, by their keys; `instance_id` holds some chunk of this model."""
        if keys and not self._shapes:  # a new process that looks at KV of an earlier one
            self.listed(instance_id)
        handles = ({**shape, **self._named(key)} for key in keys for shape in self._shapes)
        return self._look_up_keys(handles)

    def listed(self, instance_id: str, tiers: Iterable[str] = TIERS) -> KVLayout:
        """Return where all chunks are that some tiers of an instance hold."""
        keys = (key for tier in tiers for key in self.http.list_keys(instance_id, tier))
        return self._look_up_keys({str(key): key for key in keys if self._is_ours(key)}.values())

    def again(self, layout: KVLayout) -> KVLayout:
        """Return where the same chunks are now."""
        return self._look_up_keys(handle for key in layout.keys for handle in layout.handles[key])

    def _look_up_keys(self, handles):
        handles = list(handles)
        return self._look_up({"keys": handles}) if handles else KVLayout((), {})

    def _look_up(self, query):
        entries = [entry for entry in self.http.lookup(query) if self._is_ours(entry["key"])]
        layout = read_layout(entries, self._key_of)
        if layout.keys and not self._shapes:
            self._shapes = list(layout.handles[layout.keys[0]])
        return layout

    def _prompt(self, tokens, salt):
        tenant = {"model_name": self.model, "cache_salt": salt or self.cache_salt}
        return {**tenant, "world_size": self.world_size, "token_ids": tokens}

    def _is_ours(self, key):
        ours = not self.cache_salt or key["cache_salt"] == self.cache_salt
        return ours and key["model_name"] == self.model

    def _key_of(self, key):
        """Return the key of a chunk whose object key is given; `_named` is the way back."""
        return chunk_key(key["chunk_hash_hex"], "" if self.cache_salt else key["cache_salt"])

    def _named(self, key):
        chunk_hash = key.partition("@")[0]
        return {"chunk_hash_hex": chunk_hash, "cache_salt": salt_of(key) or self.cache_salt}

    # ---- changing ----------------------------------------------------------------

    def demote(self, layout: KVLayout, instance_id: str, tier: str, timeout_s: float) -> Outcome:
        """Delete the hotter copies of each chunk once the directory shows one in `tier`."""
        total = len(layout.keys)
        layout, waiting, shown = self._clear(layout, instance_id, tier, timeout_s)
        outcome = outcome_of(tier, total - len(waiting) - len(shown), len(waiting), layout)
        outcome.skip("hotter copy still shown (in use?)", len(shown))
        return outcome

    def discard(self, layout: KVLayout, instance_id: str) -> int:
        """Delete every copy of some chunks on one instance; returns how many keep one.

        Those that the directory does not show too: it may have forgotten them, or Redis may have
        come back with what was deleted.
        """
        shown: dict[bool, list] = {False: [], True: []}
        for key, held in zip(layout.keys, layout.of(instance_id)):
            shown[bool(held)] += layout.handles[key]
        self.http.delete(instance_id, TIERS, shown[False])
        left = len(self._clear(layout, instance_id, None, 0.0)[2])
        with suppress(LMCacheError):  # a tier that is away, or that this server does not have
            self.http.delete(instance_id, TIERS, shown[True])
        return left

    def promote(
        self, layout: KVLayout, instance_id: str, tokens: Sequence[int], timeout_s: float
    ) -> Outcome:
        """Prefetch a prefix of a prompt into gpu; wait until the chunks of `layout` are there."""
        deadline_s = time.monotonic() + timeout_s
        prompt = self._prompt(check_tokens(tokens), salt_of(layout.keys[0]))
        self.http.prefetch(instance_id, prompt)
        for pause_s in _pauses_s():
            time.sleep(pause_s)
            layout = self.again(layout)
            left = sum("gpu" not in tiers for tiers in layout.of(instance_id))
            if not left or time.monotonic() >= deadline_s:
                break
        return outcome_of("gpu", len(layout.keys) - left, left, layout)

    def _clear(self, layout, instance_id, tier, timeout_s):
        """Delete the copies hotter than `tier` (None: all) of chunks that have one there.

        Returns the last layout, the chunks still without a copy in `tier`, and the copies
        still shown that were to be deleted.
        """
        sent_at_s: dict = {}
        deadline_s = time.monotonic() + timeout_s
        for pause_s in _pauses_s():
            held = dict(zip(layout.keys, layout.of(instance_id)))
            waiting = [key for key in held if tier is not None and tier not in held[key]]
            due = {key: gone for key in held if (gone := _may_go(held[key], tier))}
            self._delete(instance_id, layout, due, sent_at_s)
            late_s = time.monotonic() - deadline_s
            # Deletes that were sent are seen through even when nothing is waited for.
            if not (waiting or due) or late_s > (_VERIFY_S if due else 0):
                break
            time.sleep(pause_s)
            layout = self.again(layout)
        return layout, waiting, due

    def _delete(self, instance_id, layout, due, sent_at_s):
        """Send deletes; again at once for locked copies (still being written to L2)."""
        now_s, groups = time.monotonic(), {}
        for key, held in due.items():
            again_s = (sent_at_s.get((key, tier), -math.inf) + _VERIFY_S for tier in held)
            tiers = tuple(tier for tier, at_s in zip(held, again_s) if now_s >= at_s)
            groups.setdefault(tiers, []).append(key)
        groups.pop((), None)
        for tiers, keys in groups.items():
            handles = [handle for key in keys for handle in layout.handles[key]]
            if not self.http.delete(instance_id, tiers, handles):
                sent_at_s.update({(key, tier): now_s for key in keys for tier in tiers})


def _pauses_s():
    """Yield the pauses between look-ups (about 5 ms each): longer the longer it has taken."""
    pause_s = 0.005  # a delete mostly shows by then; a store or load takes tens of ms
    while True:
        yield pause_s
        pause_s = min(1.25 * pause_s, 0.05)


def _may_go(held, target):
    """Return the tiers whose copies of a chunk may go: all (None), or those hotter than target."""
    if target is None:
        return held
    return held[: held.index(target)] if target in held else ()


def read_layout(entries: Iterable[dict], key_of: Callable[[dict], str]) -> KVLayout:
    """Turn directory entries of one model (one per object key) into a layout."""
    handles: dict[str, list] = {}
    placements: dict[str, list] = {}
    for entry in entries:
        key = key_of(entry["key"])
        handles.setdefault(key, []).append(entry["key"])
        held = {(place["instance_id"], tier_of(place)) for place in entry["placements"]}
        placements.setdefault(key, []).append(held)
    # With several ranks a chunk is in a tier only if every rank's object is.
    common = {key: set.intersection(*sets) for key, sets in placements.items()}
    instances = sorted({name for held in common.values() for name, tier in held if tier})
    tiers = {
        name: tuple(tuple(t for t in TIERS if (name, t) in held) for held in common.values())
        for name in instances
    }
    return KVLayout(tuple(common), tiers, {key: tuple(h) for key, h in handles.items()})
