"""The settings of the LMCache stack, checked by name and range, and what vLLM needs of them."""

import itertools
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from caching_heuristics import unknown_name
from kvttl import PROJECT, parse_yaml, user_path
from kvttl.storage.redis_client import TLS_OPTIONS, URL_FORM, RedisLimits, checked_url

# read by vLLM itself, so they cannot travel as engine arguments
ENGINE_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
ENGINE_ENV |= {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
POLICIES_INSIDE = ("adaptive", "recency", "fixed")  # that learn; else the heuristics decide
_SWITCH = {"0": False, "1": True}
PORT_FIELDS = ("coordinator_port", "server_port", "server_http_port", "redis_port")

Port = Annotated[int, Field(ge=1, le=65535)]
_NAME_FORM = "1 to 64 letters, digits, '_', '.' or '-'"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description=_NAME_FORM)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$", description="a non-empty text")]
_LOOPBACK_ONLY = (
    "only 127.0.0.1; the services have no login, so on any other address the network could "
    "read and delete the cache"
)


class StackConfig(BaseModel):
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
    redis_connect_timeout_s, redis_timeout_s, redis_retries : float, float, int
        See `RedisLimits`.
    redis_verify_s : float
        How often Redis, and the disk, are asked whether they still have all chunks, seconds.
    trigger_watermark, eviction_ratio : float
        From which used share on LMCache evicts, once a second, and which share goes then.
        Its own defaults, 0.8 and 0.2, cost more hits than most policies win.
    prefetch_policy : str
        ``"retain"`` keeps what a hit loads from disk or Redis in the memory tier;
        ``"default"`` drops it again after the load.
    directory_checkpoint_s : float
        How often the coordinator saves its directory for a restart, seconds; 0 = never.
    meter : bool
        Whether a manager with metrics counts what other policies would have hit.
    inside : bool or str
        Whether `kvttl.server` decides inside the server, by the heuristics or by the policy of
        this name. Then its TTLs say what leaves the memory tier, between the same watermark and
        ratio.

    Raises
    ------
    ValueError
        Names the field, its value and what is allowed.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    host: Literal["127.0.0.1"] = Field("127.0.0.1", description=_LOOPBACK_ONLY)
    coordinator_port: Port = 9000
    server_port: Port = 5555
    server_http_port: Port = 8081
    redis_url: str | None = Field(None, repr=False)  # may hold a password
    redis_port: Port = 6390  # not 6379, where a system Redis would sit
    redis_client: Literal["kit", "lmcache"] = "kit"
    redis_connect_timeout_s: float = Field(2.0, ge=0.01, le=60)
    redis_timeout_s: float = Field(2.0, ge=0.01, le=60)
    redis_retries: int = Field(1, ge=0, le=10)
    redis_verify_s: float = Field(10.0, ge=0.1, le=3600)
    instance_id: Name = "lmcache_default_instance"
    chunk_size_tokens: int = Field(32, ge=1, le=8192)
    block_size_tokens: int = Field(32, ge=1, le=1024)
    l1_size_gb: float = Field(0.5, ge=0.001, le=4096)
    # IsolatedLRU is left out: it admits nothing until per-salt quotas are set over HTTP.
    eviction_policy: Literal["LRU", "ARC", "noop"] = "LRU"
    trigger_watermark: float = Field(0.95, ge=0.01, le=1)
    eviction_ratio: float = Field(0.05, ge=0.001, le=1)
    prefetch_policy: Literal["default", "retain"] = "default"
    disk_path: Text = "./cache_lmcache"
    run_dir: Text = "./run_lmcache"
    start_timeout_s: float = Field(60.0, ge=1, le=600)
    stop_timeout_s: float = Field(10.0, ge=0.1, le=120)
    mq_timeout_s: float = Field(5.0, ge=0.5, le=300)
    engine_heartbeat_s: float = Field(2.0, ge=0.5, le=40)
    registration_heartbeat_s: float = Field(1.0, ge=0.1, le=10)
    event_flush_interval_s: float = Field(1e-5, ge=1e-6, le=10)
    directory_checkpoint_s: float = Field(1.0, ge=0, le=3600)
    meter: bool = Field(True, description="true or false")
    inside: bool | Literal[POLICIES_INSIDE] = Field(
        True, description=f"true, false or one of {', '.join(POLICIES_INSIDE)}"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:  # not chained: it shows the password
            raise _in_plain_words(error) from None

    @field_validator("redis_url", mode="before")
    @classmethod
    def _check_redis_url(cls, url: Any) -> Any:
        """Refuse what the remote tier cannot do; never echo the URL (password)."""
        try:
            return url if url is None else _lmcache_url(checked_url(url))
        except ValueError as error:
            raise ValueError(f"redis_url is not allowed: {error}") from None

    @model_validator(mode="after")
    def _check_together(self) -> "StackConfig":
        names = [n for n in PORT_FIELDS if n != "redis_port" or self.redis_url is None]
        for first, name in itertools.combinations(names, 2):
            if (port := getattr(self, name)) == getattr(self, first):
                raise _refusal(name, port, f"a port of its own, but {first} has the same")
        if self.chunk_size_tokens % self.block_size_tokens:
            allowed = f"a multiple of block_size_tokens = {self.block_size_tokens}"
            raise _refusal("chunk_size_tokens", self.chunk_size_tokens, allowed)
        if self.redis_client == "lmcache" and str(self.redis_url).startswith("rediss:"):
            allowed = "kit with rediss://; LMCache's own client has no TLS"
            raise _refusal("redis_client", "lmcache", allowed)
        if self.inside and self.eviction_policy == "ARC":
            allowed = "LRU or noop with inside, whose TTLs evict (false: LMCache's policy)"
            raise _refusal("eviction_policy", "ARC", allowed)
        return self

    def replaced(self, **changes: Any) -> "StackConfig":
        """Return these settings with some changed, checked like new ones."""
        return StackConfig(**{**vars(self), **changes})

    @property
    def redis_address(self) -> tuple[str, int]:
        """Host and port of the Redis in use, without credentials."""
        if self.redis_url is None:
            return self.host, self.redis_port
        parts = urlsplit(self.redis_url)
        return parts.hostname, parts.port or 6379

    @property
    def redis_limits(self) -> RedisLimits:
        """Limits of every connection to Redis."""
        return RedisLimits(self.redis_connect_timeout_s, self.redis_timeout_s, self.redis_retries)

    @property
    def storage(self) -> dict[str, tuple]:
        """Address of each tier that an adapter of LMCache stores, as `LMCACHE_TIERS` names it."""
        return {"disk": (self.disk_path,), "remote": self.redis_address}

    @property
    def coordinator_url(self) -> str:
        """Base URL of the coordinator."""
        return f"http://{self.host}:{self.coordinator_port}"

    @property
    def server_http_url(self) -> str:
        """Base URL of the LMCache server's control interface."""
        return f"http://{self.host}:{self.server_http_port}"


def kv_transfer_config(config: StackConfig):
    """The `KVTransferConfig` that connects a vLLM engine to the LMCache server."""
    from vllm.config import KVTransferConfig  # seconds, and not needed to run the stack

    return KVTransferConfig(**kv_transfer_settings(config))


def kv_transfer_settings(config: StackConfig) -> dict[str, Any]:
    """The same as vLLM's ``--kv-transfer-config`` takes it."""
    extra = {"lmcache.mp.host": f"tcp://{config.host}", "lmcache.mp.port": config.server_port}
    extra["lmcache.mp.mq_timeout"] = config.mq_timeout_s
    extra["lmcache.mp.heartbeat_interval"] = config.engine_heartbeat_s
    return {
        "kv_connector": "LMCacheMPConnector",
        # LMCache's own ends the engine at an aborted request; see there.
        "kv_connector_module_path": "kvttl.stack.engine_connector",
        "kv_role": "kv_both",
        # A chunk that vanishes between lookup and load costs a recompute, not the request.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def engine_kwargs(config: StackConfig, model: str, **overrides) -> dict:
    """Arguments for ``vllm.LLM(**...)`` on CPU; also sets `ENGINE_ENV` where unset.

    Who starts vLLM without these arguments must add two of them, or an unlucky abort ends the
    engine, and a killed owner leaves it running: ``kv_connector_module_path`` of its KV transfer
    settings, and ``worker_extension_cls``. See docs/serving.md.

    Parameters
    ----------
    model : str
        Folder or name of the model.
    overrides
        Engine arguments that win over these.
    """
    for name, value in ENGINE_ENV.items():
        os.environ.setdefault(name, value)
    small = {"model": model, "dtype": "bfloat16", "max_model_len": 2048, "enforce_eager": True}
    return {
        **small,
        "block_size": config.block_size_tokens,
        "enable_prefix_caching": False,  # else its hits hide the tiers
        "disable_hybrid_kv_cache_manager": True,  # one KV group; CPU transfer needs it
        "kv_transfer_config": kv_transfer_config(config),
        "worker_extension_cls": "kvttl.stack.engine_watch.EndsWithOwner",
        **overrides,
    }


def add_inside_option(parser: Any) -> None:
    """Let a command be told where the decisions are made."""
    choices, help = ("0", "1", *POLICIES_INSIDE), "1 or a policy: in LMCache's server; 0: outside"
    parser.add_argument("--inside", choices=choices, help=help)


def overrides_of(
    path: str | Path, inside: str | None, redis_url: str | None = None, policy: str = "formula"
) -> dict[str, Any]:
    """Return overrides for `load_config`: of a command's options those that were used.

    A policy is the server's wherever the server decides and the file names none.
    """
    options = {"redis_url": redis_url} if redis_url else {}
    if policy != "formula":
        by_file = inside is None and load_config(path).inside is True
        inside = policy if by_file or inside == "1" else inside
    return options if inside is None else {**options, "inside": _SWITCH.get(inside, inside)}


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
    path = user_path(path)
    file = next((file for file in (path, PROJECT / path) if file.is_file()), None)
    if file is None:
        raise ValueError(f"config file {str(path)!r} not found here ({Path.cwd()}) nor beside src/")
    config = StackConfig(**{**_read_section(file), **overrides})
    # A relative folder means "beside config.yaml", whatever the caller's directory is.
    base = file.parent.resolve()
    folders = {"disk_path": config.disk_path, "run_dir": config.run_dir}
    return config.replaced(**{name: str(base / user_path(f)) for name, f in folders.items()})


def _read_section(file: Path) -> dict:
    try:
        document = parse_yaml(file) or {}
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    sections = document if isinstance(document, dict) else {"stack": document}
    if unknown := [name for name in sections if name != "stack"]:
        raise ValueError(f"{file}: {unknown_name('section', unknown[0], ['stack'])}")
    section = sections.get("stack") or {}
    if not isinstance(section, dict):
        raise ValueError(f"{file} must hold a mapping under stack:, got {type(section).__name__}")
    if odd := [name for name in section if not isinstance(name, str)]:
        raise ValueError(f"{file}: {unknown_name('setting', odd[0], StackConfig.model_fields)}")
    return section


def _in_plain_words(error: ValidationError) -> ValueError:
    """Return the error of the first bad setting: its name, its value, what is allowed."""
    first = error.errors()[0]
    if first["type"] == "value_error":  # one of the checks of `StackConfig`
        return first["ctx"]["error"]
    name, known = str(first["loc"][0]), StackConfig.model_fields
    if name not in known:
        return ValueError(unknown_name("setting in stack:", name, known))
    return _refusal(name, first["input"], _allowed(known[name]))


def _allowed(field: Any) -> str:
    if field.description:
        return field.description
    if choices := get_args(field.annotation):
        return f"one of {', '.join(choices)}"
    kind = "an integer" if field.annotation is int else "a number"
    low, high = field.metadata
    return f"{kind} from {low.ge} to {high.le}"


def _refusal(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name} = {value!r:.200} is not allowed: {allowed}")


def _lmcache_url(url):
    """Return a URL that LMCache's adapter can use too; it knows a host and a port."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        raise ValueError(f"scheme 'unix'; only {URL_FORM} works")
    if parts.path not in ("", "/", "/0"):
        raise ValueError(f"host {parts.hostname!r}: only database 0 works; leave the database out")
    if parts.fragment or (parts.query and parts.scheme == "redis"):
        allowed = "options after '?' or '#' but rediss://'s ssl_..., such as ?ssl_ca_certs=<file>"
        raise ValueError(allowed)
    return checked_url(url, TLS_OPTIONS)
