"""Tells the coordinator what the disk and Redis tiers really hold, before a server starts.

LMCache 0.5.6 reports a chunk to the coordinator once, when it stores or deletes it. Files
of an earlier run, chunks stored while the coordinator was away and keys that an emptied
Redis no longer has are never reported again, so its directory would stay wrong for good.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

PAGE_KEYS = 5000  # per request; LMCache allows 10,000
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Contents = dict[tuple, int]  # (model, rank, group, chunk hash, salt) -> size, bytes


def parse_key(text: str) -> tuple | None:
    """The key in a file or Redis name of LMCache, or None if it is something else.

    Examples
    --------
    >>> parse_key("org-SEP-model@0x01000100@0@00ff")
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
    return parts[0].replace("-SEP-", "/"), rank, group, parts[3], "".join(parts[4:])


def disk_contents(folder: Path) -> Contents:
    """Keys and sizes (bytes) of the chunk files in `folder`."""
    if not folder.is_dir():
        return {}
    rows = [
        (parse_key(f.name.removesuffix(".data")), f.stat().st_size)
        for f in os.scandir(folder)
        if f.name.endswith(".data")
    ]
    return {key: size for key, size in rows if key}


def redis_url_of(host: str, port: int) -> str:
    """URL of the Redis of an LMCache server: $KV_REDIS_URL (TLS), else with LMCache's login."""
    names = ("LMCACHE_RESP_USERNAME", "LMCACHE_RESP_PASSWORD")
    user, password = (quote(os.environ.get(name, ""), safe="") for name in names)
    login = f"{user}:{password}@" if password else ""
    return os.environ.get("KV_REDIS_URL") or f"redis://{login}{host}:{port}"


def redis_contents(url: str) -> Contents:
    """Keys and sizes (bytes) of the chunks in a Redis."""
    import redis

    client = redis.Redis.from_url(url, socket_timeout=10.0, socket_connect_timeout=3.0)
    with client:
        names = [n for n in client.scan_iter(match="*@*@*@*", count=1000) if parse_key(_text(n))]
        sizes: list[int] = []
        for start in range(0, len(names), PAGE_KEYS):
            pipe = client.pipeline(transaction=False)
            for name in names[start : start + PAGE_KEYS]:
                pipe.strlen(name)
            sizes += pipe.execute()
    return {parse_key(_text(name)): size for name, size in zip(names, sizes, strict=True)}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def known_contents(url: str, instance_id: str, backend: str) -> set[tuple]:
    """Keys that the coordinator at `url` believes to be in one L2 backend."""
    known: set[tuple] = set()
    offset = 0
    while True:
        page = _request(
            f"{url}/directory/keys?tier=l2&instance_id={instance_id}"
            f"&backend={backend}&offset={offset}&limit={PAGE_KEYS}"
        )
        keys = [row["key"] for row in page["keys"]]
        known |= {
            (
                k["model_name"],
                k["kv_rank"],
                k["object_group_id"],
                k["chunk_hash_hex"],
                k["cache_salt"],
            )
            for k in keys
        }
        offset += len(keys)
        if not keys or offset >= page["total"]:
            return known


def corrections(known: set[tuple], real: Contents) -> list[tuple[str, list[dict]]]:
    """Event type and entries that turn what is `known` into what is `real`."""
    stored = [_entry(key, size) for key, size in real.items() if key not in known]
    deleted = [_entry(key, 0) for key in known if key not in real]
    return [
        (kind, entries[i : i + PAGE_KEYS])
        for kind, entries in (("store", stored), ("delete", deleted))
        for i in range(0, len(entries), PAGE_KEYS)
    ]


def _entry(key: tuple, size_bytes: int) -> dict:
    names = ("model_name", "kv_rank", "object_group_id", "chunk_hash_hex", "cache_salt")
    return {"key": dict(zip(names, key, strict=True)), "size_bytes": size_bytes}


def reconcile(url: str, instance_id: str, real: dict[str, Contents]) -> dict[str, int]:
    """Correct the directory at `url`; the server `instance_id` must not run yet.

    Parameters
    ----------
    real : dict
        Per backend (``fs``, ``resp``) what it holds.

    Returns
    -------
    dict
        Number of corrected entries per backend.
    """
    # Sent in the server's name, one incarnation before its own (its start time, seconds):
    # newer than its last life, which also clears the memory tier that died with it.
    incarnation = int(time.time()) - 1
    batches = [("store", "fs", [])]
    for backend, contents in real.items():
        known = known_contents(url, instance_id, backend)
        batches += [(kind, backend, rows) for kind, rows in corrections(known, contents)]
    for seq, (kind, backend, entries) in enumerate(batches, start=1):
        batch = {
            "instance_id": instance_id,
            "incarnation": incarnation,
            "seq": seq,
            "event_type": kind,
            "tier": "l2",
            "backend": backend,
            "entries": entries,
        }
        _request(f"{url}/events", {"batches": [batch]})
    return {backend: sum(len(rows) for _, b, rows in batches if b == backend) for backend in real}


def reconcile_for(server_arguments: list[str], wait_s: float = 30.0) -> None:
    """Reconcile on behalf of ``lmcache server <arguments>``; trouble is printed, never fatal."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--coordinator-url", "--instance-id"):
        parser.add_argument(name)
    parser.add_argument("--l2-adapter", action="append", type=json.loads, default=[])
    options, _ = parser.parse_known_args(server_arguments)
    try:
        _wait_for(options.coordinator_url, wait_s)
        real = dict(_contents_of(adapter) for adapter in options.l2_adapter)
        done = reconcile(options.coordinator_url, options.instance_id, real)
        print(f"directory corrected: {done}", flush=True)
    except Exception as error:  # noqa: BLE001 - a wrong directory is better than no server
        print(f"directory not corrected: {type(error).__name__}: {error}", flush=True)


def _contents_of(adapter: dict) -> tuple[str, Contents]:
    if adapter["type"] == "fs":
        return "fs", disk_contents(Path(adapter["base_path"]))
    return "resp", redis_contents(redis_url_of(adapter["host"], adapter["port"]))


def _wait_for(url: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            _request(f"{url}/healthz")
            return
        except (OSError, urllib.error.URLError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _request(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with _DIRECT.open(request, timeout=30.0) as response:
        return json.load(response)
