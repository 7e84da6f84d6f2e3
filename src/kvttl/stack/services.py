"""What the three services are: their command lines, and how to recognise each when it runs."""

import contextlib
import json
import logging
import os
import socket
from pathlib import Path

import psutil
import redis

from caching_heuristics import HeuristicConfig
from kvttl.lmcache.client import get_json, server_settings
from kvttl.lmcache.tiers import LMCACHE_TIERS, adapter_settings
from kvttl.settings import load_settings
from kvttl.stack.config import StackConfig
from kvttl.stack.process import StackError
from kvttl.storage.probes import TierError, hold_folder, probe_folder, probe_redis
from kvttl.storage.redis_client import connect, environment_of

logger = logging.getLogger(__name__)

PORTS_OF = {"redis": ("redis_port",), "coordinator": ("coordinator_port",)}
PORTS_OF["server"] = ("server_port", "server_http_port")
SERVICES = tuple(PORTS_OF)  # in start order; stopped in reverse, so that the server can still
# sign off at the coordinator
_OPEN_TIMEOUT_S = 2.0


class PortTakenError(StackError):
    """A port that the stack needs belongs to another program."""


# ---- command lines ----------------------------------------------------------


def arguments_of(name: str, config: StackConfig) -> list[str]:
    """Command line of one service, without the program and without any password."""
    if name == "redis":
        return [config.host, str(config.redis_port)]
    if name == "coordinator":
        # Not shorter: a server that is merely busy would lose its memory tier
        # in the directory, and LMCache never reports those chunks again.
        timeout_s = max(30.0, 10 * config.registration_heartbeat_s)
        arguments = _COORDINATOR.format(config, timeout_s).split()
        if config.directory_checkpoint_s > 0:
            arguments += ["--checkpoint-path", str(checkpoint_path(config))]
            arguments += ["--checkpoint-interval", str(config.directory_checkpoint_s)]
        return arguments
    rules = _module_arguments(config) if config.inside else _RULES.format(config).split()
    first = f"{_ADDRESS} {_SERVER} {_AT_COORDINATOR}".format(config).split()
    return [*first, *rules, *_adapters(config.storage)]


def standalone_arguments(config: StackConfig) -> list[str]:
    """Arguments of a server that decides by itself, without coordinator and embedded Redis.

    Where it listens for engines is left out.
    """
    if str(config.redis_url).startswith("rediss:"):
        raise ValueError(
            "redis_url: LMCache's own client has no TLS; `make up INSIDE=1` starts ours"
        )
    own = {tier: at for tier, at in config.storage.items() if tier == "disk" or config.redis_url}
    return [*_SERVER.format(config).split(), *_module_arguments(config), *_adapters(own)]


def _adapters(storage):
    adapters = map(adapter_settings, storage.keys(), storage.values())
    return [part for adapter in adapters for part in ("--l2-adapter", json.dumps(adapter))]


def _module_arguments(config):
    """Return what lets a server decide by itself, with the saved settings of `load_settings`."""
    saved, default = load_settings().to_dict(), HeuristicConfig().to_dict()
    high = config.trigger_watermark
    low = max(1e-3, round(high * (1 - config.eviction_ratio), 4))
    settings = {"high": high, "low": min(low, high)}
    if own := {name: value for name, value in saved.items() if value != default[name]}:
        settings["heuristics"] = own
    if not config.meter:
        settings["meter"] = False
    if isinstance(config.inside, str):
        settings["policy"] = config.inside
    module = {"module_path": "kvttl.server", "config": settings}
    # By default the module says what a hit leaves in the memory tier.
    keeps = ["--l2-prefetch-policy", "retain"] if config.prefetch_policy == "retain" else []
    return [*_RULES_INSIDE.split(), *keeps, "--server-module", json.dumps(module)]


# No value in them has a space in it.
_COORDINATOR = (
    "--host {0.host} --port {0.coordinator_port} --chunk-size {0.chunk_size_tokens} "
    "--instance-timeout {1} --health-check-interval {0.registration_heartbeat_s} "
    "--timeout-keep-alive 60"
)
_ADDRESS = "--host {0.host} --port {0.server_port} --http-host {0.host}"
_SERVER = (
    "--http-port {0.server_http_port} --instance-id {0.instance_id} "
    "--chunk-size {0.chunk_size_tokens} --l1-size-gb {0.l1_size_gb} "
    # CPU engines copy KV themselves, GPU engines let the server do it.
    "--supported-transfer-mode auto --no-run-script-api-enabled"
)
_AT_COORDINATOR = (
    "--coordinator-url {0.coordinator_url} --coordinator-advertise-ip {0.host} "
    "--coordinator-heartbeat-interval {0.registration_heartbeat_s} --coordinator-event-reporting "
    "--coordinator-event-flush-interval {0.event_flush_interval_s}"
)
_RULES = (
    "--eviction-policy {0.eviction_policy} --l2-prefetch-policy {0.prefetch_policy} "
    "--eviction-trigger-watermark {0.trigger_watermark} --eviction-ratio {0.eviction_ratio}"
)
_RULES_INSIDE = "--eviction-policy noop --eviction-trigger-watermark 1.0"


def child_env(config: StackConfig) -> dict[str, str]:
    """Environment of the services: nothing reported outside, Redis credentials for LMCache."""
    kept = {
        name: value
        for name, value in os.environ.items()  # others override our arguments
        if name == "LMCACHE_LOG_LEVEL" or not name.startswith(("LMCACHE_", "OTEL_", "KV_REDIS_"))
    }
    no_proxy = ",".join(filter(None, [kept.get("NO_PROXY"), config.host]))
    on = "DO_NOT_TRACK HF_HUB_DISABLE_TELEMETRY LMCACHE_DISABLE_BANNER PYTHONUNBUFFERED".split()
    kept |= dict.fromkeys(on, "1") | dict.fromkeys(("NO_PROXY", "no_proxy"), no_proxy)
    kept |= {"LMCACHE_TRACK_USAGE": "false", "PYTHONWARNINGS": "ignore::FutureWarning"}
    kept["KV_REDIS_CLIENT"] = config.redis_client
    kept["KV_REDIS_VERIFY_S"] = f"{config.redis_verify_s:g}"
    return kept | environment_of(config.redis_url, config.redis_limits)


def checkpoint_path(config: StackConfig) -> Path:
    """File in which the coordinator keeps its directory for a restart."""
    return Path(config.run_dir) / "directory.checkpoint"


# ---- ports ------------------------------------------------------------------


def pick_ports(host: str, count: int) -> list[int]:
    """`count` different TCP ports that are free now (another program may still be faster)."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((host, 0))
        return [one.getsockname()[1] for one in sockets]


def check_ports_free(config: StackConfig, name: str) -> None:
    """Raise `PortTakenError` if a port of this service cannot be bound."""
    for field in PORTS_OF[name]:
        try:
            socket.create_server((config.host, getattr(config, field))).close()
        except OSError as error:
            advice = port_advice(config, field)
            raise PortTakenError(f"{name} cannot start: {advice} ({error})") from None


def port_advice(config: StackConfig, field: str) -> str:
    """One sentence on who holds a port and what to do about it."""
    port = getattr(config, field)
    return (
        f"port {port} ({field}) on {config.host} is in use by {_holder(port)}; run `make down` "
        f"if it is an old stack, attach (`make serve ATTACH=1`), set stack.{field} in config.yaml, "
        "or ask for free ports"
    )


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid:
                return f"{psutil.Process(c.pid).name()} (pid {c.pid})"
    return "another program"


def _is_open(config: StackConfig, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(_OPEN_TIMEOUT_S)
        return probe.connect_ex((config.host, port)) == 0


# ---- recognising what runs --------------------------------------------------


def is_coordinator(config: StackConfig) -> bool:
    """Whether an LMCache coordinator answers on its port."""
    info = get_json(config.coordinator_url, "/openapi.json").get("info", {})
    return info.get("title") == "LMCache MP Coordinator"


def check_shares_nothing(config: StackConfig) -> None:
    """Raise `StackError` if a server has our folder, or one of our coordinator our name or Redis.

    Equal prompts have equal keys: what the one deletes would be gone for the other, whose
    directory entries would stay.
    """
    ours = {"instance_id": config.instance_id, **_storage(config)}
    for entry in get_json(config.coordinator_url, "/instances").get("instances", []):
        base = f"http://{entry['ip']}:{entry['http_port']}"
        other = server_settings(base)  # one that is dead is listed for a while
        for field, value in ours.items():
            if other.get(field) == value:
                need = "each server under one coordinator needs an instance_id, a disk_path and"
                same = f"the LMCache server at {base} has {field} = {value!r} too"
                raise StackError(f"{same}: {need} a Redis of its own")
    try:
        os.close(hold_folder(config.disk_path))
    except TierError as error:
        raise StackError(f"disk_path = {config.disk_path!r}: {error}") from None


def _storage(config):
    return {LMCACHE_TIERS[tier].setting: place for tier, place in config.storage.items()}


def running_services(config: StackConfig) -> list[str]:
    """Services that already run on the configured ports.

    Raises
    ------
    StackError
        A port answers, but not as the service that belongs there.
    """
    checks = {"coordinator": is_coordinator, "server": _is_our_server}
    if not config.redis_url:
        checks = {"redis": redis_answers, **checks}
    fields = {name: PORTS_OF[name][-1] for name in checks}  # of the server the one of HTTP
    found = [name for name, field in fields.items() if _is_open(config, getattr(config, field))]
    for name in found:
        if not checks[name](config):
            advice = port_advice(config, fields[name])
            raise PortTakenError(f"no LMCache {name} answers there: {advice}")
    return found


def _is_our_server(config: StackConfig) -> bool:
    settings = server_settings(config.server_http_url)
    if not settings:
        return False
    same = ("instance_id", "server_port", "chunk_size_tokens")
    wanted = {field: getattr(config, field) for field in same}
    wanted["inside"] = bool(config.inside)  # its policy is compared where a manager says hello
    wanted |= {"coordinator": config.coordinator_url, **_storage(config)}
    for field, value in wanted.items():
        if settings.get(field) != value:
            runs = f"the LMCache server on port {config.server_http_port} runs with {field} ="
            advice = "`make down` first, or use the same settings, or ask for free ports"
            asked = f"{settings.get(field)!r}, but {value!r} is asked for"
            raise StackError(f"{runs} {asked}: {advice}")
    return True


def redis_answers(config: StackConfig) -> bool:
    """Whether Redis answers a PING with the configured credentials."""
    with contextlib.suppress(OSError, redis.RedisError, ValueError), _redis(config) as client:
        return client.ping()
    return False


def check_folders(config: StackConfig) -> None:
    """Write, read, list and delete a file in each folder; StackError with setting and cause."""
    for field in ("disk_path", "run_dir"):
        try:
            probe_folder(getattr(config, field))
        except TierError as error:
            raise StackError(f"{field} = {getattr(config, field)!r}: {error}") from None


def check_redis(config: StackConfig) -> None:
    """Write, read, list and delete a value in Redis; StackError with the cause, no password."""
    where = "{}:{}".format(*config.redis_address)
    try:
        with _redis(config) as client:
            risk = probe_redis(client)
    except (TierError, ValueError) as error:
        setting = "redis_url" if config.redis_url else "redis_port"
        raise StackError(f"Redis at {where} cannot be used: {error}; see {setting}") from None
    if risk:
        logger.warning("Redis at %s: %s", where, risk)


def _redis(config):
    url = config.redis_url or "redis://{}:{}".format(*config.redis_address)
    return connect(url, config.redis_limits)
