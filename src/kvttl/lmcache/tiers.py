"""What LMCache calls this kit's tiers, and where it stores what is in them.

Another L2 adapter of LMCache, such as ``s3``, is another row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class LMCacheTier(NamedTuple):
    """LMCache's names of a tier: its level, and on level 2 the adapter's type."""

    level: str  # "l1" or "l2"
    adapter: str | None = None  # "adapter" in deletes, "backend" in the directory


LMCACHE_TIERS = {
    "gpu": LMCacheTier("l1"),
    "disk": LMCacheTier("l2", "fs"),
    "remote": LMCacheTier("l2", "resp"),
}
_TIER_OF_ADAPTER = {names.adapter: tier for tier, names in LMCACHE_TIERS.items() if names.adapter}


def tier_of(placement: Mapping[str, Any]) -> str | None:
    """Return this kit's name of a directory placement's tier (None: not one of ours).

    Examples
    --------
    >>> tier_of({"tier": "l1", "backend": "dram"}), tier_of({"tier": "l2", "backend": "fs"})
    ('gpu', 'disk')
    """
    return "gpu" if placement["tier"] == "l1" else _TIER_OF_ADAPTER.get(placement["backend"])
