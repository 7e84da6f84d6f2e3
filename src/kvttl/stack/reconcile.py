"""Tells the coordinator what the disk and Redis tiers really hold, before a server starts.

LMCache 0.5.6 reports a chunk to the coordinator once, when it stores or deletes it. Files
of an earlier run, chunks stored while the coordinator was away and keys that an emptied
Redis no longer has are never reported again, so its directory would stay wrong for good.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable

import redis

from kvttl.lmcache.client import LMCacheHTTP, LMCacheUnavailable, get_json
from kvttl.lmcache.tiers import LMCACHE_TIERS, ChunkKey, addresses, pages, parse_key
from kvttl.stack.process import comes_true
from kvttl.storage.checksum import CHECKSUM_BYTES, has_checksum
from kvttl.storage.redis_client import connect_as_server

PAGE_KEYS = 5000  # per request; LMCache allows 10,000

Contents = dict[ChunkKey, int]  # -> size, bytes


def disk_contents(folder: str | os.PathLike) -> Contents:
    """Return keys and sizes (bytes) of the chunk files in `folder`."""
    if not os.path.isdir(folder):
        return {}
    files = [file for file in os.scandir(folder) if file.name.endswith(".data")]
    keys = [parse_key(file.name.removesuffix(".data")) for file in files]
    return {key: file.stat().st_size for key, file in zip(keys, files) if key}


def redis_contents(host: str, port: int) -> Contents:
    """Return keys and sizes (bytes) of the chunks in an LMCache server's Redis."""
    with connect_as_server(host, port) as client:
        names = chunk_names(client)
        if os.environ.get("KV_REDIS_CLIENT") == "lmcache":
            names = _without_checked(client, names)
        sizes = [size for page in pages(names, PAGE_KEYS) for size in sizes_of(client, page)]
    return dict(zip(map(parse_key, names), sizes))


def _without_checked(client, names):
    """Delete what this kit's client wrote: after one of them LMCache's own confuses chunks."""
    left = []
    for page in pages(names, PAGE_KEYS):
        with client.pipeline(transaction=False) as pipe:
            for name in page:
                pipe.getrange(name, -CHECKSUM_BYTES, -1)
            checked = {name for name, end in zip(page, pipe.execute()) if has_checksum(end)}
        if checked:
            print(f"redis: {client.delete(*checked)} values with checksums are deleted", flush=True)
        left += [name for name in page if name not in checked]
    return left


def chunk_names(client: redis.Redis) -> list[str]:
    """Return the names of all chunks in a Redis."""
    found = (name.decode() for name in client.scan_iter(match="*@*@*@*", count=1000))
    return [name for name in found if parse_key(name)]


def sizes_of(client: redis.Redis, names: Iterable[str]) -> list[int]:
    """Return each value's bytes, 0 where there is none."""
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.strlen(name)
        return pipe.execute()


# What lists a tier's objects, by the tier's address. A tier without one is not corrected.
CONTENTS_OF: dict[str, Callable[..., Contents]] = {"disk": disk_contents, "remote": redis_contents}


def corrections(known: set[ChunkKey], real: Contents) -> list[tuple[str, list[dict]]]:
    """Event type and entries that turn what is `known` into what is `real`."""
    stored = [(key, size) for key, size in real.items() if key not in known]
    deleted = [(key, 0) for key in known if key not in real]
    return [
        (kind, [{"key": key._asdict(), "size_bytes": size} for key, size in page])
        for kind, changed in (("store", stored), ("delete", deleted))
        for page in pages(changed, PAGE_KEYS)
    ]


def reconcile(url: str, instance_id: str, real: dict[str, Contents]) -> dict[str, int]:
    """Correct the directory at `url`; the server `instance_id` must not run yet.

    Parameters
    ----------
    real : dict
        Per tier what it holds.

    Returns
    -------
    dict
        Number of corrected entries per tier.
    """
    # Sent in the server's name, one incarnation before its own (its start time, seconds):
    # newer than its last life, which also clears the memory tier that died with it.
    sender = {"instance_id": instance_id, "incarnation": int(time.time()) - 1}
    directory = LMCacheHTTP(url, read_timeout_s=30.0)
    batches: list[tuple] = [("store", "disk", [])]
    for tier, contents in real.items():
        known = {ChunkKey(**key) for key in directory.list_keys(instance_id, tier)}
        batches += [(kind, tier, rows) for kind, rows in corrections(known, contents)]
    for seq, (kind, tier, entries) in enumerate(batches, start=1):
        level, adapter = LMCACHE_TIERS[tier][:2]
        place = {"tier": level, "backend": adapter}
        directory.correct({**sender, "seq": seq, "event_type": kind, **place, "entries": entries})
    directory.close()
    return {tier: sum(len(rows) for _, t, rows in batches if t == tier) for tier in real}


def server_options(server_arguments: list[str]) -> argparse.Namespace:
    """Return what ``lmcache server <arguments>`` says of coordinator, name and tiers."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--coordinator-url", "--instance-id"):
        parser.add_argument(name)
    parser.add_argument("--l2-adapter", action="append", type=json.loads, default=[])
    return parser.parse_known_args(server_arguments)[0]


def reconcile_for(server_arguments: list[str], wait_s: float = 30.0) -> None:
    """Reconcile on behalf of ``lmcache server <arguments>``; trouble is printed, never fatal."""
    options = server_options(server_arguments)
    try:
        if not comes_true(lambda: get_json(options.coordinator_url, "/healthz"), wait_s):
            raise LMCacheUnavailable(f"no LMCache coordinator answers at {options.coordinator_url}")
        places = addresses(options.l2_adapter).items()
        real = {tier: CONTENTS_OF[tier](*place) for tier, place in places if tier in CONTENTS_OF}
        done = reconcile(options.coordinator_url, options.instance_id, real)
        print(f"directory corrected: {done}", flush=True)
    except Exception as error:  # noqa: BLE001 - a wrong directory is better than no server
        print(f"directory not corrected: {type(error).__name__}: {error}", flush=True)
