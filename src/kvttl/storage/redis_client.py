"""The one place that makes a connection to Redis."""

from __future__ import annotations

from typing import Any

import redis

MAX_REDIS_TTL_MS = 2**53  # 285,000 years; Redis refuses what overflows its 64-bit clock


def _connect(url: str | None, timeout_s: float, options: dict[str, Any]) -> redis.Redis:
    if url is None:
        import fakeredis  # here, since a deployment with a real Redis need not have it

        return fakeredis.FakeRedis(server=fakeredis.FakeServer())
    defaults = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    try:
        return redis.Redis.from_url(url, **(defaults | options))
    except (ValueError, AttributeError):  # not chained: redis-py shows parts of the password
        raise ValueError("url must look like redis[s]://[user:password@]host:port/db") from None


def _address(client: redis.Redis) -> str:
    # Not cut out of the url, where a strange password could slip through.
    pool = client.connection_pool
    options = pool.connection_kwargs
    scheme = "rediss" if issubclass(pool.connection_class, redis.SSLConnection) else "redis"
    login = "***@" if options.get("password") else ""
    host = options.get("path") or f"{options.get('host')}:{options.get('port', 6379)}"
    return f"{scheme}://{login}{host}/{options.get('db', 0)}"
