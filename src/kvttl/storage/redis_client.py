"""The one place that makes a connection to Redis."""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

MAX_REDIS_TTL_MS = 2**53  # 285,000 years; Redis refuses what overflows its 64-bit clock
_VARIABLES = ("KV_REDIS_CONNECT_TIMEOUT_S", "KV_REDIS_TIMEOUT_S", "KV_REDIS_RETRIES")


class RedisLimits(NamedTuple):
    """How long a call of Redis may take: ``redis_...`` in config.yaml.

    Parameters
    ----------
    connect_timeout_s, timeout_s : float
        Longest wait for a connection, and for an answer, seconds.
    retries : int
        New connections where one was closed or refused; a time-out is never tried again.
    """

    connect_timeout_s: float = 2.0
    timeout_s: float = 2.0
    retries: int = 1


DEFAULT_LIMITS = RedisLimits()


def connect(url: str | None, limits: RedisLimits = DEFAULT_LIMITS, **options: Any) -> redis.Redis:
    """Return a client of the Redis at `url`; None = a private fakeredis in this process.

    Parameters
    ----------
    options
        Passed on to ``redis.Redis.from_url``, such as ``ssl_ca_certs``; they win.

    Raises
    ------
    ValueError
        The URL is none of Redis; its password is not shown.
    """
    if url is None:
        import fakeredis  # here, since a deployment with a real Redis need not have it

        return fakeredis.FakeRedis(server=fakeredis.FakeServer())
    defaults = {
        "socket_connect_timeout": limits.connect_timeout_s,
        "socket_timeout": limits.timeout_s,
        "retry": Retry(NoBackoff(), limits.retries, supported_errors=(redis.ConnectionError,)),
    }
    try:
        return redis.Redis.from_url(url, **(defaults | options))
    except (ValueError, AttributeError):  # not chained: redis-py shows parts of the password
        raise ValueError("url must look like redis[s]://[user:password@]host:port/db") from None


def address_of(client: redis.Redis) -> str:
    """Return where a client connects to, without its password."""
    # Not cut out of the url, where a strange password could slip through.
    pool = client.connection_pool
    options = pool.connection_kwargs
    scheme = "rediss" if issubclass(pool.connection_class, redis.SSLConnection) else "redis"
    login = "***@" if options.get("password") else ""
    host = options.get("path") or f"{options.get('host')}:{options.get('port', 6379)}"
    return f"{scheme}://{login}{host}/{options.get('db', 0)}"


def environment_of(url: str | None, limits: RedisLimits) -> dict[str, str]:
    """Return the variables from which `connect_as_server` and LMCache itself know Redis.

    The password is not in the argument list, which every user of the machine can read.
    """
    variables = {name: f"{value:g}" for name, value in zip(_VARIABLES, limits)}
    if url:
        parts = urlsplit(url)
        variables |= {
            "KV_REDIS_URL": url,
            "LMCACHE_RESP_USERNAME": unquote(parts.username or ""),
            "LMCACHE_RESP_PASSWORD": unquote(parts.password or ""),
        }
    return variables


def connect_as_server(host: str, port: int, **options: Any) -> redis.Redis:
    """Return a client of an LMCache server's Redis: ``$KV_REDIS_URL``, else LMCache's login."""
    names = ("LMCACHE_RESP_USERNAME", "LMCACHE_RESP_PASSWORD")
    user, password = (quote(os.environ.get(name, ""), safe="") for name in names)
    login = f"{user}:{password}@" if password else ""
    url = os.environ.get("KV_REDIS_URL") or f"redis://{login}{host}:{port}"
    given = zip(map(os.environ.get, _VARIABLES), DEFAULT_LIMITS)
    limits = (type(default)(value or default) for value, default in given)
    return connect(url, RedisLimits(*limits), **options)
