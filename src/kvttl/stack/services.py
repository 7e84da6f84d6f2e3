"""What the three services are: their command lines, and how to recognise each when it runs."""

from __future__ import annotations

import http.client
import json
import os
import socket
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvttl.stack.config import StackConfig
from kvttl.stack.process import StackError

SERVICES = ("redis", "coordinator", "server")  # start order; stopped in reverse, so that
# the server can still sign off at the coordinator
PORTS_OF = {
    "redis": ("redis_port",),
    "coordinator": ("coordinator_port",),
    "server": ("server_port", "server_http_port"),
}
HTTP_TIMEOUT_S = 2.0
# A proxy from the environment must not stand between us and loopback.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PortTakenError(StackError):
    """A port that the stack needs belongs to another program."""


# ---- command lines ----------------------------------------------------------


def arguments_of(name: str, config: StackConfig) -> list[str]:
    """Command line of one service, without the program and without any password."""
    build = {
        "redis": _redis_arguments,
        "coordinator": _coordinator_arguments,
        "server": _server_arguments,
    }
    return [str(part) for part in build[name](config)]


def _redis_arguments(config: StackConfig) -> list:
    return [config.host, config.redis_port]


def _coordinator_arguments(config: StackConfig) -> list:
    arguments = [
        "--host",
        config.host,
        "--port",
        config.coordinator_port,
        "--chunk-size",
        config.chunk_size_tokens,
        # Not shorter: a server that is merely busy would lose its memory tier
        # in the directory, and LMCache never reports those chunks again.
        "--instance-timeout",
        max(30.0, 10 * config.registration_heartbeat_s),
        "--health-check-interval",
        config.registration_heartbeat_s,
        "--timeout-keep-alive",
        60,
    ]
    if config.directory_checkpoint_s > 0:
        arguments += [
            "--checkpoint-path",
            checkpoint_path(config),
            "--checkpoint-interval",
            config.directory_checkpoint_s,
        ]
    return arguments


def _server_arguments(config: StackConfig) -> list:
    redis_host, redis_port = config.redis_address
    disk = {"type": "fs", "base_path": config.disk_path}
    remote = {"type": "resp", "host": redis_host, "port": redis_port}
    return [
        "--host",
        config.host,
        "--port",
        config.server_port,
        "--http-host",
        config.host,
        "--http-port",
        config.server_http_port,
        "--instance-id",
        config.instance_id,
        "--chunk-size",
        config.chunk_size_tokens,
        "--l1-size-gb",
        config.l1_size_gb,
        "--eviction-policy",
        config.eviction_policy,
        "--l2-prefetch-policy",
        config.prefetch_policy,
        "--l2-adapter",
        json.dumps(disk),
        "--l2-adapter",
        json.dumps(remote),
        "--coordinator-url",
        f"http://{config.host}:{config.coordinator_port}",
        "--coordinator-advertise-ip",
        config.host,
        "--coordinator-heartbeat-interval",
        config.registration_heartbeat_s,
        "--coordinator-event-reporting",
        "--coordinator-event-flush-interval",
        config.event_flush_interval_s,
        # CPU engines copy KV themselves, GPU engines let the server do it.
        "--supported-transfer-mode",
        "auto",
        "--no-run-script-api-enabled",
    ]


def child_env(config: StackConfig) -> dict[str, str]:
    """Environment of the services: nothing reported outside, Redis credentials for LMCache."""
    kept = {
        name: value
        for name, value in os.environ.items()  # others override our arguments
        if name == "LMCACHE_LOG_LEVEL" or not name.startswith(("LMCACHE_", "OTEL_"))
    }
    no_proxy = ",".join(filter(None, [kept.get("NO_PROXY"), config.host]))
    kept.update(
        KV_REDIS_CLIENT=config.redis_client,
        LMCACHE_TRACK_USAGE="false",
        DO_NOT_TRACK="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        LMCACHE_DISABLE_BANNER="1",
        NO_PROXY=no_proxy,
        no_proxy=no_proxy,
        PYTHONUNBUFFERED="1",
        PYTHONWARNINGS="ignore::FutureWarning",
    )
    kept.pop("KV_REDIS_URL", None)
    if config.redis_url:
        parts = urlsplit(config.redis_url)
        # Not in the argument list, which every user of the machine can read.
        kept.update(
            KV_REDIS_URL=config.redis_url,
            LMCACHE_RESP_USERNAME=unquote(parts.username or ""),
            LMCACHE_RESP_PASSWORD=unquote(parts.password or ""),
        )
    return kept


def checkpoint_path(config: StackConfig) -> Path:
    """File in which the coordinator keeps its directory for a restart."""
    return Path(config.run_dir) / "directory.checkpoint"


# ---- ports ------------------------------------------------------------------


def pick_ports(host: str, count: int) -> list[int]:
    """`count` different TCP ports that are free now (another program may still be faster)."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((host, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def check_ports_free(config: StackConfig, name: str) -> None:
    """Raise `PortTakenError` if a port of this service cannot be bound."""
    for field in PORTS_OF[name]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host, getattr(config, field)))
            except OSError as error:
                raise PortTakenError(
                    f"{name} cannot start: {port_advice(config, field)} ({error})"
                ) from None


def port_advice(config: StackConfig, field: str) -> str:
    """One sentence on who holds a port and what to do about it."""
    port = getattr(config, field)
    return (
        f"port {port} ({field}) on {config.host} is in use by {_holder(port)}; run `make down` "
        f"if it is an old stack, set stack.{field} in config.yaml, or ask for free ports"
    )


def _holder(port: int) -> str:
    import psutil

    try:
        pids = {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN
        }
        names = [f"{psutil.Process(pid).name()} (pid {pid})" for pid in pids if pid]
    except psutil.Error:
        names = []
    return ", ".join(names) or "another program"


def _is_open(config: StackConfig, port: int) -> bool:
    try:
        with socket.create_connection((config.host, port), timeout=HTTP_TIMEOUT_S):
            return True
    except OSError:
        return False


# ---- recognising what runs --------------------------------------------------


def get_json(url: str):
    """The JSON at `url`, or None if nothing sensible answers."""
    try:
        with _DIRECT.open(url, timeout=HTTP_TIMEOUT_S) as response:
            return json.load(response)
    except (OSError, ValueError, http.client.HTTPException):  # URLError is an OSError
        return None


def is_coordinator(config: StackConfig) -> bool:
    """Whether an LMCache coordinator answers on its port."""
    answer = get_json(f"http://{config.host}:{config.coordinator_port}/openapi.json")
    return (
        isinstance(answer, dict) and answer.get("info", {}).get("title") == "LMCache MP Coordinator"
    )


def server_settings(config: StackConfig) -> dict | None:
    """What the LMCache server on our HTTP port was started with, or None."""
    return settings_at(f"http://{config.host}:{config.server_http_port}")


def settings_at(base: str) -> dict | None:
    """What the LMCache server at a base URL was started with, or None."""
    if (get_json(f"{base}/healthcheck") or {}).get("status") != "healthy":
        return None
    answer = get_json(f"{base}/config")
    if not isinstance(answer, dict) or "mp" not in answer:
        return None
    adapters = answer["storage_manager"]["l2_adapter_config"]["adapters"]
    disk = [a["base_path"] for a in adapters if "base_path" in a]
    redis = [(a["host"], a["port"]) for a in adapters if "host" in a]
    return {
        "instance_id": answer["mp"]["instance_id"],
        "server_port": answer["mp"]["port"],
        "chunk_size_tokens": answer["mp"]["chunk_size"],
        "coordinator": answer["coordinator"]["url"],
        "disk_path": disk[0] if disk else None,
        "redis": redis[0] if redis else None,
    }


def check_shares_nothing(config: StackConfig) -> None:
    """Raise `StackError` if a running server of our coordinator has our name, folder or Redis.

    Equal prompts have equal keys: what the one deletes would be gone for the other, whose
    directory entries would stay.
    """
    url = f"http://{config.host}:{config.coordinator_port}/instances"
    ours = {
        "instance_id": config.instance_id,
        "disk_path": config.disk_path,
        "redis": config.redis_address,
    }
    for entry in (get_json(url) or {}).get("instances", []):
        base = f"http://{entry['ip']}:{entry['http_port']}"
        other = settings_at(base) or {}  # one that is dead is listed for a while
        for field, value in ours.items():
            if other.get(field) == value:
                raise StackError(
                    f"the LMCache server at {base} has {field} = {value!r} too: each server "
                    "under one coordinator needs an instance_id, a disk_path and a Redis of its own"
                )


def running_services(config: StackConfig) -> list[str]:
    """Services that already run on the configured ports.

    Raises
    ------
    StackError
        A port answers, but not as the service that belongs there.
    """
    found = []
    for name, field, check in (
        ("redis", "redis_port", redis_answers),
        ("coordinator", "coordinator_port", is_coordinator),
        ("server", "server_http_port", _is_our_server),
    ):
        if name == "redis" and config.redis_url:
            continue
        if _is_open(config, getattr(config, field)):
            if not check(config):
                raise PortTakenError(
                    f"no LMCache {name} answers there: {port_advice(config, field)}"
                )
            found.append(name)
    return found


def _is_our_server(config: StackConfig) -> bool:
    settings = server_settings(config)
    if settings is None:
        return False
    wanted = {
        "instance_id": config.instance_id,
        "server_port": config.server_port,
        "chunk_size_tokens": config.chunk_size_tokens,
        "disk_path": config.disk_path,
        "coordinator": f"http://{config.host}:{config.coordinator_port}",
        "redis": config.redis_address,
    }
    for field, value in wanted.items():
        if settings[field] != value:
            raise StackError(
                f"the LMCache server on port {config.server_http_port} runs with {field} = "
                f"{settings[field]!r}, but {value!r} is asked for: `make down` first, "
                "or use the same settings, or ask for free ports"
            )
    return True


def redis_answers(config: StackConfig) -> bool:
    """Whether Redis answers a PING with the configured credentials."""
    try:
        ping_redis(config)
    except StackError:
        return False
    return True


def ping_redis(config: StackConfig) -> None:
    """PING the Redis in use; raise `StackError`, without credentials, if it does not answer."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    host, port = config.redis_address
    client = redis.Redis.from_url(
        config.redis_url or f"redis://{host}:{port}",
        socket_timeout=HTTP_TIMEOUT_S,
        socket_connect_timeout=HTTP_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )  # its default tries for half a minute
    try:
        client.ping()
    except redis.AuthenticationError:
        raise StackError(
            f"Redis at {host}:{port} refused the user or password of redis_url"
        ) from None
    except (redis.RedisError, OSError, ValueError) as error:
        raise StackError(
            f"no Redis answers at {host}:{port} ({type(error).__name__}); "
            "start it or correct redis_url"
        ) from None
    finally:
        client.close()
