"""What one decision hands on from step to step: the draft of its record, and its wish."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.salts import salt_of
from kvttl.manager.claims import Part


class Wish(NamedTuple):
    """Where a prompt's KV cache is wanted, counted from an access.

    Parameters
    ----------
    tier : str
        ``"gpu"``, ``"disk"`` or ``"remote"``.
    accessed_s : float
        The access that it is about, seconds; of two wishes about one prompt the
        one with the later access counts.
    ttl_s : float
        How long from then on, seconds.
    """

    tier: str
    accessed_s: float
    ttl_s: float


class Draft(SimpleNamespace):
    """A `DecisionRecord` while it is being made: each step sets the record's fields that it knows.

    A step that fails leaves in it what was known before.

    Parameters
    ----------
    time_s, generate_s : float
        As the record has them, seconds.
    """

    claimed = False  # made, or waiting for LMCache; no record has this
    parts: Sequence[Part] = ()  # of a policy that decides as it goes; nor this
    error = ""  # of one that was handed over
    asked_for = False  # by the request itself: a policy that decides as it goes changes nothing

    def __init__(self, time_s: float, generate_s: float = 0.0) -> None:
        known = {"prompt_digest": "", "prompt_tokens": 0, "metadata": {}, "moves": []}
        known |= {"cache_salt": "", "finish_reason": None, "output_tokens": 0}
        super().__init__(time_s=time_s, generate_s=generate_s, **known)

    @property
    def wish(self) -> Wish:
        """What was decided."""
        return Wish(self.wanted_tier, self.time_s, self.ttl_s)

    def record(self, kind: str, error: str) -> DecisionRecord:
        """Return the record of what is known so far."""
        known = {**vars(self), "moves": tuple(self.moves)}
        for name in ("claimed", "parts", "error", "asked_for"):
            known.pop(name, None)
        return DecisionRecord(kind=kind, error=error or self.error, **known)


def claim_record(owner: str, keys: tuple[str, ...], wish: Wish) -> DecisionRecord:
    """Return the record that is written ahead: a claim from which a restart can go on."""
    chunks = {"chunks": len(keys), "chunk_keys": keys, "cache_salt": salt_of("".join(keys[:1]))}
    wanted = {"wanted_tier": wish.tier, "ttl_s": wish.ttl_s}
    return DecisionRecord(wish.accessed_s, owner, kind="claim", **chunks, **wanted)
