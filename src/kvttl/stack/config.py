"""The settings of the LMCache stack, checked by name and range, and what vLLM needs of them."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, urlsplit

import yaml

from kvttl import PROJECT

LOOPBACK_HOST = "127.0.0.1"
# IsolatedLRU is left out: it admits nothing until per-salt quotas are set over HTTP.
EVICTION_POLICIES = ("LRU", "ARC", "noop")
PREFETCH_POLICIES = ("default", "retain")
REDIS_CLIENTS = ("kit", "lmcache")
# read by vLLM itself, so they cannot travel as engine arguments
ENGINE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "DO_NOT_TRACK": "1",
}
PORT_FIELDS = ("coordinator_port", "server_port", "server_http_port", "redis_port")

# field -> (type, lowest, highest), both ends allowed
RANGES = {
    "coordinator_port": (int, 1, 65535),
    "server_port": (int, 1, 65535),
    "server_http_port": (int, 1, 65535),
    "redis_port": (int, 1, 65535),
    "chunk_size_tokens": (int, 1, 8192),
    "block_size_tokens": (int, 1, 1024),
    "l1_size_gb": (float, 0.001, 4096.0),
    "start_timeout_s": (float, 1.0, 600.0),
    "stop_timeout_s": (float, 0.1, 120.0),
    "mq_timeout_s": (float, 0.5, 300.0),
    "engine_heartbeat_s": (float, 0.5, 40.0),
    "registration_heartbeat_s": (float, 0.1, 10.0),
    "event_flush_interval_s": (float, 1e-6, 10.0),
    "directory_checkpoint_s": (float, 0.0, 3600.0),
}


@dataclass(frozen=True)
class StackConfig:
    """Settings of coordinator, LMCache server and Redis (ports, sizes, timeouts).

    Parameters
    ----------
    host : str
        Loopback address that every service binds.
    coordinator_port, server_port, server_http_port, redis_port : int
        TCP ports; `server_port` carries KV data (ZMQ), the others HTTP and RESP.
    redis_url : str or None
        ``redis://[user:password@]host[:port]`` to attach to, ``rediss://`` with TLS
        (``?ssl_ca_certs=<file>`` for a CA of your own); None = embedded.
    chunk_size_tokens, block_size_tokens : int
        LMCache chunk and vLLM block, tokens; chunk must be a multiple of block.
    l1_size_gb : float
        Memory tier, gigabytes.
    mq_timeout_s, engine_heartbeat_s : float
        How fast vLLM gives up on a dead LMCache server, seconds.
    registration_heartbeat_s, event_flush_interval_s : float
        How fast the coordinator sees a server and its chunks, seconds.
    redis_client : str
        ``"kit"``: `redis_adapter`, which survives what Redis answers; ``"lmcache"``: the
        client that comes with LMCache, without TLS.
    prefetch_policy : str
        ``"retain"`` keeps what a hit loads from disk or Redis in the memory tier;
        ``"default"`` drops it again after the load.
    directory_checkpoint_s : float
        How often the coordinator saves its directory for a restart, seconds; 0 = never.

    Raises
    ------
    ValueError
        Names the field, its value and what is allowed.
    """

    host: str = "127.0.0.1"
    coordinator_port: int = 9000
    server_port: int = 5555
    server_http_port: int = 8081
    redis_url: str | None = field(default=None, repr=False)  # may hold a password
    redis_port: int = 6390  # not 6379, where a system Redis would sit
    redis_client: str = "kit"
    instance_id: str = "lmcache_default_instance"
    chunk_size_tokens: int = 32
    block_size_tokens: int = 32
    l1_size_gb: float = 0.5
    eviction_policy: str = "LRU"
    prefetch_policy: str = "default"
    disk_path: str = "./cache_lmcache"
    run_dir: str = "./run_lmcache"
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
    mq_timeout_s: float = 5.0
    engine_heartbeat_s: float = 2.0
    registration_heartbeat_s: float = 1.0
    event_flush_interval_s: float = 1e-5
    directory_checkpoint_s: float = 1.0

    def __post_init__(self) -> None:
        for name, (kind, low, high) in RANGES.items():
            _check_number(name, getattr(self, name), kind, low, high)
        _check_texts(self)
        _check_redis_url(self.redis_url)
        _check_ports_differ(self)
        _check_chunk(self.chunk_size_tokens, self.block_size_tokens)

    @property
    def redis_address(self) -> tuple[str, int]:
        """Host and port of the Redis in use, without credentials."""
        if self.redis_url is None:
            return self.host, self.redis_port
        parts = urlsplit(self.redis_url)
        return parts.hostname, parts.port or 6379


def kv_transfer_config(config: StackConfig):
    """The `KVTransferConfig` that connects a vLLM engine to the LMCache server."""
    from vllm.config import KVTransferConfig  # seconds, and not needed to run the stack

    return KVTransferConfig(
        kv_connector="LMCacheMPConnector",
        # LMCache's own ends the engine at an aborted request; see there.
        kv_connector_module_path="kvttl.stack.engine_connector",
        kv_role="kv_both",
        # A chunk that vanishes between lookup and load costs a recompute, not the request.
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "lmcache.mp.host": f"tcp://{config.host}",
            "lmcache.mp.port": config.server_port,
            "lmcache.mp.mq_timeout": config.mq_timeout_s,
            "lmcache.mp.heartbeat_interval": config.engine_heartbeat_s,
        },
    )


def engine_kwargs(config: StackConfig, model: str, **overrides) -> dict:
    """Arguments for ``vllm.LLM(**...)`` on CPU; also sets `ENGINE_ENV` where unset.

    Its ``kv_transfer_config`` names `kvttl.stack.engine_connector` as the connector's module.
    Who starts vLLM without these arguments adds ``"kv_connector_module_path":
    "kvttl.stack.engine_connector"`` to its KV transfer settings, or the first unlucky abort
    ends the engine.

    Parameters
    ----------
    model : str
        Folder or name of the model.
    overrides
        Engine arguments that win over these.
    """
    for name, value in ENGINE_ENV.items():
        os.environ.setdefault(name, value)
    return {
        "model": model,
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "enforce_eager": True,
        "block_size": config.block_size_tokens,
        "enable_prefix_caching": False,  # else its hits hide the tiers
        "disable_hybrid_kv_cache_manager": True,  # one KV group; CPU transfer needs it
        "kv_transfer_config": kv_transfer_config(config),
        **overrides,
    }


def load_config(path: str | Path = "config.yaml", **overrides) -> StackConfig:
    """Read the `stack:` section of a YAML file; `overrides` win over the file.

    Parameters
    ----------
    path : str or Path
        A bare name is looked for here and then beside `src/`, so notebooks find it too.

    Raises
    ------
    ValueError
        No such file, an unknown key, a wrong type or a value out of range.
    """
    file = _find_file(Path(path))
    section = _read_section(file)
    values = {**section, **overrides}
    known = [f.name for f in fields(StackConfig)]
    for name in values:
        if name not in known:
            raise ValueError(
                f"unknown setting {name!r} in stack: of {file}; known: {', '.join(known)}"
            )
    config = StackConfig(**values)
    # A relative folder means "beside config.yaml", whatever the caller's directory is.
    base = file.parent.resolve()
    return replace(
        config, disk_path=str(base / config.disk_path), run_dir=str(base / config.run_dir)
    )


def _find_file(path: Path) -> Path:
    for candidate in (path, PROJECT / path):
        if candidate.is_file():
            return candidate
    raise ValueError(f"config file {str(path)!r} not found here ({Path.cwd()}) nor beside src/")


def _read_section(file: Path) -> dict:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    section = document.get("stack") if isinstance(document, dict) else None
    if section is None and (document is None or isinstance(document, dict)):
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"{file} must hold a mapping under stack:, got {type(section).__name__}")
    return section


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ValueError(f"{name} = {value!r} is not allowed: {allowed}")


def _check_number(name, value, kind, low, high) -> None:
    allowed = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
    is_kind = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not is_kind:
        _refuse(name, value, allowed)
    if not (math.isfinite(value) and low <= value <= high):
        _refuse(name, value, allowed)


def _check_texts(config: StackConfig) -> None:
    for name in ("host", "instance_id", "disk_path", "run_dir"):
        value = getattr(config, name)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            _refuse(name, value, "a non-empty text")
    if config.redis_client == "lmcache" and str(config.redis_url).startswith("rediss:"):
        _refuse("redis_client", "lmcache", "kit with rediss://; LMCache's own client has no TLS")
    if config.host != LOOPBACK_HOST:
        _refuse(
            "host",
            config.host,
            f"only {LOOPBACK_HOST}; the services have no login, so on any "
            "other address the network could read and delete the cache",
        )
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", config.instance_id):
        _refuse("instance_id", config.instance_id, "1 to 64 letters, digits, '_', '.' or '-'")
    for name, known in (
        ("eviction_policy", EVICTION_POLICIES),
        ("prefetch_policy", PREFETCH_POLICIES),
        ("redis_client", REDIS_CLIENTS),
    ):
        if getattr(config, name) not in known:
            _refuse(name, getattr(config, name), f"one of {', '.join(known)}")


def _check_redis_url(url: object) -> None:
    """Refuse what the remote tier cannot do; never echo the URL (password)."""
    if url is None:
        return
    if not isinstance(url, str):
        _refuse(
            "redis_url", f"a {type(url).__name__}", "null or redis[s]://[user:password@]host[:port]"
        )
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading it validates it
    except ValueError:
        raise ValueError(
            "redis_url is not a valid URL: the port must be 0 to 65535 "
            "(special characters in a password must be percent-encoded)"
        ) from None
    problem = _redis_url_problem(parts)
    if problem:
        raise ValueError(f"redis_url for host {parts.hostname!r} is not allowed: {problem}")


def _redis_url_problem(parts: SplitResult) -> str | None:
    if parts.scheme not in ("redis", "rediss"):
        return f"scheme {parts.scheme!r}; only redis[s]://[user:password@]host[:port] works"
    if not parts.hostname:
        return "the host is missing; write redis[s]://[user:password@]host[:port]"
    if parts.path not in ("", "/", "/0"):
        return "only database 0 works; leave the database out"
    options = parse_qsl(parts.query, keep_blank_values=True)
    allowed = parts.scheme == "rediss" and all(name.startswith("ssl_") for name, _ in options)
    if parts.fragment or (parts.query and not (options and allowed)):
        return "options after '?' or '#' but rediss://'s ssl_..., such as ?ssl_ca_certs=<file>"
    return None


def _check_ports_differ(config: StackConfig) -> None:
    names = [n for n in PORT_FIELDS if n != "redis_port" or config.redis_url is None]
    seen: dict[int, str] = {}
    for name in names:
        port = getattr(config, name)
        if port in seen:
            _refuse(name, port, f"a port of its own, but {seen[port]} has the same")
        seen[port] = name


def _check_chunk(chunk: int, block: int) -> None:
    if chunk % block:
        _refuse("chunk_size_tokens", chunk, f"a multiple of block_size_tokens = {block}")
