"""The one place that makes a connection to Redis."""

import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from caching_heuristics import unknown_name
from kvttl import user_path

URL_FORM = "redis[s]://[user:password@]host[:port]"
_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
_FILE_AT_HOME = re.compile(rf"\b({'|'.join(_FILES)})=(~[^&#]*)")
_TEXTS = (*_FILES, "ssl_ca_data", "ssl_password", "ssl_ciphers")
_TEXTS += ("ssl_include_verify_flags", "ssl_exclude_verify_flags")
# A URL's option -> what it may be, as a pattern and in words. The others of redis-py (OCSP)
# are left out: as the text of a URL they have no effect.
TLS_OPTIONS = dict.fromkeys(_TEXTS, (".+", "not empty")) | {
    "ssl_check_hostname": ("(?i)true|yes|1|false|no|0", "true or false"),
    "ssl_cert_reqs": ("none|optional|required", "none, optional or required"),
    "ssl_min_version": ("771|772", "771 (TLS 1.2) or 772 (TLS 1.3)"),
}
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
        url = checked_url(url, _CONNECTION_OPTIONS)
    except ValueError as error:
        raise ValueError(f"url is not allowed: {error}") from None
    options |= {name: str(user_path(options[name])) for name in _FILES if options.get(name)}
    for name, value in (dict(parse_qsl(urlsplit(url).query)) | options).items():
        if name not in _CONNECTION_OPTIONS:
            raise ValueError(unknown_name("option", name, _CONNECTION_OPTIONS))
        if value and name in _FILES and not os.access(value, os.R_OK):
            problem = "cannot be read" if Path(value).exists() else "does not exist"
            raise ValueError(f"{name} = {str(value)!r}: this file {problem}")
    try:
        return redis.Redis.from_url(url, **(defaults | options))
    except (ValueError, AttributeError) as error:  # not chained: it shows parts of the password
        named = re.search(r"Invalid value for '(\w+)'", str(error))
        wrong = f"its option {named[1]} has a wrong value; " if named else ""
        raise ValueError(f"url: {wrong}it must look like {URL_FORM}/db") from None


_CLASSES = (redis.connection.AbstractConnection, redis.Connection, redis.SSLConnection)
_PARAMETERS = (name for kind in _CLASSES for name in inspect.signature(kind.__init__).parameters)
_CONNECTION_OPTIONS = sorted({"max_connections", *_PARAMETERS})


def checked_url(url: object, known_options: Iterable[str] | None = None) -> str:
    """Return a URL as redis-py reads it: no space around it, scheme in small letters, ``~`` a home.

    Parameters
    ----------
    known_options : iterable of str, optional
        What may follow its ``?``; None = anything.

    Raises
    ------
    ValueError
        It is none of one Redis; says why, and how to write it, without user and password.

    Examples
    --------
    >>> checked_url(" REDISS://h?ssl_cert_reqs=CERT_NONE")
    'rediss://h?ssl_cert_reqs=none'
    >>> checked_url("redis://s1:26379,s2:26379/mymaster")
    Traceback (most recent call last):
    ValueError: a list of hosts: Sentinel and Cluster are not supported; write redis[s]://[user:password@]host[:port]
    """
    if not isinstance(url, str):
        raise ValueError(f"got a {type(url).__name__}; write null or {URL_FORM}")
    url = re.sub(r"(ssl_cert_reqs=)(?:CERT_)?(\w+)", lambda m: m[1] + m[2].lower(), url.strip())
    _check_scheme(url)  # CERT_NONE is how other clients write none
    url = _FILE_AT_HOME.sub(lambda m: f"{m[1]}={quote(str(user_path(unquote(m[2]))))}", url)
    try:
        parts = urlsplit(url)
        odd = parts.port == 0 or "@" in parts.query + parts.fragment
    except ValueError:
        odd = True
    if odd:
        hint = "special characters in a password must be percent-encoded"
        raise ValueError(f"it is no valid URL: the port must be 1 to 65535 ({hint})")
    if not (parts.hostname or parts.scheme == "unix" and parts.path):
        raise ValueError(f"the host is missing; write {URL_FORM}")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if known_options is not None and name not in known_options:
            raise ValueError(unknown_name("option", name, known_options))
        pattern, allowed = TLS_OPTIONS.get(name, (".+", "not empty"))
        if not re.fullmatch(pattern, value):
            shown = "" if name == "ssl_password" else f" = {value!r}"
            raise ValueError(f"its option {name}{shown} is not allowed: {allowed}")
    return parts.geturl()


def _check_scheme(url):
    scheme, _, rest = url.partition("://")
    hosts = re.split("[/?#]", rest)[0].rpartition("@")[2]
    kinds = re.search("sentinel|cluster", scheme.lower())
    if kinds or "," in hosts:
        what = f"{kinds[0].title()} is" if kinds else "a list of hosts: Sentinel and Cluster are"
        raise ValueError(f"{what} not supported; write {URL_FORM}")
    if scheme.lower() not in ("redis", "rediss", "unix"):
        shown = f"scheme {scheme!r}" if rest and scheme.isalnum() else "no scheme"
        raise ValueError(f"{shown}; only {URL_FORM} works")
    if re.search(r"\s", url):
        raise ValueError(f"there is a space in it (in a password: %20); write {URL_FORM}")


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
