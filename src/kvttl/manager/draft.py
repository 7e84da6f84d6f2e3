"""What one decision hands on from step to step: the draft of its record, and its wish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvttl.decisions.record import DecisionRecord


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


@dataclass
class Draft:
    """A `DecisionRecord` while it is being made; the fields are filled in this order.

    A step that fails leaves in it what was known before.
    """

    time_s: float
    generate_s: float = 0.0
    prompt_digest: str = ""
    prompt: str | None = None
    prompt_tokens: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    metadata_sources: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float | None = None
    wanted_tier: str | None = None
    chunks: int = 0
    chunk_keys: tuple[str, ...] = ()
    tier_before: Mapping[str, int] = field(default_factory=dict)
    hit_tokens: Mapping[str, int] = field(default_factory=dict)
    moves: list[dict[str, Any]] = field(default_factory=list)
    tier_after: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    manage_s: float = 0.0
    claimed: bool = False  # made, or waiting for LMCache; the one field that no record has

    @property
    def wish(self) -> Wish:
        """What was decided."""
        return Wish(self.wanted_tier, self.time_s, self.ttl_s)

    def record(self, kind: str = "generation") -> DecisionRecord:
        """Return the record of what is known so far."""
        known = {**vars(self), "moves": tuple(self.moves)}
        del known["claimed"]
        return DecisionRecord(kind=kind, **known)


def claim_record(owner: str, keys: tuple[str, ...], wish: Wish) -> DecisionRecord:
    """Return the record that is written ahead: a claim from which a restart can go on."""
    return DecisionRecord(
        wish.accessed_s,
        owner,
        kind="claim",
        chunks=len(keys),
        chunk_keys=keys,
        wanted_tier=wish.tier,
        ttl_s=wish.ttl_s,
    )
