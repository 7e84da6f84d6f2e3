"""What LMCache calls this kit's tiers, where it stores what is in them, and under which names.

Another L2 adapter of LMCache, such as ``s3``, is another row of `LMCACHE_TIERS`, and its address
comes from `kvttl.stack.config.StackConfig.storage`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class LMCacheTier(NamedTuple):
    """LMCache's names of a tier: its level, and on level 2 the adapter."""

    level: str  # "l1" or "l2"
    adapter: str | None = None  # its type: "adapter" in deletes, "backend" in the directory
    address: tuple[str, ...] = ()  # the adapter's settings that say where it stores
    setting: str = ""  # where it stores, in this kit's words


LMCACHE_TIERS = {
    "gpu": LMCacheTier("l1"),
    "disk": LMCacheTier("l2", "fs", ("base_path",), "disk_path"),
    "remote": LMCacheTier("l2", "resp", ("host", "port"), "redis"),
}
_TIER_OF_ADAPTER = {names.adapter: tier for tier, names in LMCACHE_TIERS.items() if names.adapter}


class ChunkKey(NamedTuple):
    """LMCache's key of one object, in the directory's words: a chunk on one rank."""

    model_name: str
    kv_rank: int
    object_group_id: int
    chunk_hash_hex: str
    cache_salt: str


def tier_of(placement: Mapping[str, Any]) -> str | None:
    """Return this kit's name of a directory placement's tier (None: not one of ours).

    Examples
    --------
    >>> tier_of({"tier": "l1", "backend": "dram"}), tier_of({"tier": "l2", "backend": "fs"})
    ('gpu', 'disk')
    """
    return "gpu" if placement["tier"] == "l1" else _TIER_OF_ADAPTER.get(placement["backend"])


def adapter_settings(tier: str, address: tuple) -> dict[str, Any]:
    """Return the adapter that an LMCache server needs for a tier that is stored at `address`.

    Examples
    --------
    >>> adapter_settings("remote", ("127.0.0.1", 6379))
    {'type': 'resp', 'host': '127.0.0.1', 'port': 6379}
    """
    names = LMCACHE_TIERS[tier]
    return {"type": names.adapter, **dict(zip(names.address, address, strict=True))}


def addresses(adapters: Iterable[Mapping[str, Any]]) -> dict[str, tuple]:
    """Return where each tier is stored, by a server's adapters: `adapter_settings` read back.

    A running server shows its adapters without their type.
    """
    return {
        tier: tuple(adapter[name] for name in names.address)
        for adapter in adapters
        for tier, names in LMCACHE_TIERS.items()
        if names.address and set(names.address) <= adapter.keys()
    }


def parse_key(text: str) -> ChunkKey | None:
    """Return the key in a file or Redis name of LMCache, or None if it is something else.

    Examples
    --------
    >>> tuple(parse_key("org-SEP-model@0x01000100@0@00ff"))
    ('org/model', 16777472, 0, '00ff', '')
    >>> parse_key("session:42") is None
    True
    """
    parts = text.split("@")
    if len(parts) not in (4, 5):
        return None
    try:
        rank, group = int(parts[1], 16), int(parts[2], 16)
        bytes.fromhex(parts[3])
    except ValueError:
        return None
    return ChunkKey(parts[0].replace("-SEP-", "/"), rank, group, parts[3], "".join(parts[4:]))


def pages(items: Sequence, size: int) -> list[Sequence]:
    """Return the items in parts of at most `size`.

    Examples
    --------
    >>> pages([1, 2, 3], 2)
    [[1, 2], [3]]
    """
    return [items[at : at + size] for at in range(0, len(items), size)]
