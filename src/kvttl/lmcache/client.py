"""HTTP to LMCache's coordinator and servers: one session, time limits, a circuit breaker.

Nothing here decides; it only speaks. A service that does not answer costs one
full time limit; after that the breaker fails calls at once, and a thread beside
them looks every `retry_after_s`, so that managing resumes by itself.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import requests
from urllib3.exceptions import ReadTimeoutError

from kvttl.lmcache.tiers import LMCACHE_TIERS

# uvicorn closes connections idle for 5 s, so a first try may meet a dead one.
_CONNECTION_RETRIES = 2
_MAX_DELETE_KEYS = 10_000  # the server's own limit (object_service.MAX_DELETE_BATCH)
_PAGE_KEYS = 10_000  # the directory's own limit of a listing


class LMCacheError(RuntimeError):
    """LMCache answered, and said no, or nothing that makes sense."""


class LMCacheUnavailable(ConnectionError):
    """LMCache did not answer, or is known to be away."""


class _Answer(dict):
    """A JSON object; what it lacks is an LMCacheError that names the call."""

    def __init__(self, response: requests.Response, call: str) -> None:
        try:
            super().__init__(response.json())
        except (ValueError, TypeError) as error:
            raise LMCacheError(f"{call} answered no JSON object: {response.text[:300]}") from error
        self._call = call

    def __missing__(self, key):
        raise LMCacheError(f"{self._call} answered without {key!r}")


class CircuitBreaker:
    """Remembers that a service is away, and when to try it again.

    Parameters
    ----------
    retry_after_s : float
        Seconds between trials while open.
    timer : callable
        Monotonic clock, seconds.

    Examples
    --------
    >>> now = [0.0]
    >>> breaker = CircuitBreaker(retry_after_s=1.0, timer=lambda: now[0])
    >>> breaker.admit()  # closed: an ordinary call
    'call'
    >>> breaker.failed("refused"); breaker.admit() is None
    True
    >>> now[0] = 1.5; breaker.admit(), breaker.admit()  # one trial a second
    ('trial', None)
    >>> breaker.succeeded(); breaker.admit()
    'call'
    """

    def __init__(
        self, retry_after_s: float = 1.0, timer: Callable[[], float] = time.monotonic
    ) -> None:
        self.retry_after_s = retry_after_s
        self.reason = ""
        self._timer = timer
        self._retry_at_s: float | None = None
        self._lock = threading.Lock()

    def admit(self) -> str | None:
        """Return ``"call"``, ``"trial"`` (see if it is back), or None: do not even try."""
        with self._lock:
            if self._retry_at_s is None:
                return "call"
            if self._timer() < self._retry_at_s:
                return None
            self._retry_at_s = self._timer() + self.retry_after_s
            return "trial"

    def failed(self, reason: str) -> None:
        """Open, or stay open."""
        with self._lock:
            self.reason = reason
            self._retry_at_s = self._timer() + self.retry_after_s

    def succeeded(self) -> None:
        """Close."""
        with self._lock:
            self._retry_at_s = None


class LMCacheHTTP:
    """The calls that this kit makes, with their time limits.

    Parameters
    ----------
    coordinator_url : str
        Such as ``http://localhost:9000``.
    connect_timeout_s, read_timeout_s : float
        Limits of one ordinary call, seconds.
    retry_after_s : float
        Seconds between trials of a service that was away.

    Raises
    ------
    LMCacheUnavailable
        From every call: no answer, or a service known to be away.
    LMCacheError
        From every call: a refusal (4xx, 5xx), with the service's own words.
    """

    def __init__(
        self,
        coordinator_url: str,
        connect_timeout_s: float = 0.5,
        read_timeout_s: float = 2.0,
        retry_after_s: float = 1.0,
    ) -> None:
        self._coordinator = coordinator_url
        self._timeout_s = (connect_timeout_s, read_timeout_s)
        self._retry_after_s = retry_after_s
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between here and loopback
        self._breakers: dict[str, CircuitBreaker] = {}
        self._answered_s: dict[str, float] = {}  # instance id -> when its server last did
        self._servers: dict[str, str] = {}  # instance id -> its server's URL

    def close(self) -> None:
        """Close the session's connections."""
        self._session.close()

    def lookup(self, query: dict[str, Any]) -> list[dict]:
        """Return the directory's entries for ``token_ids`` or ``keys`` (these in pages)."""
        keys = query.get("keys")
        pages = (
            [query]
            if keys is None
            else [{"keys": keys[at : at + _PAGE_KEYS]} for at in range(0, len(keys), _PAGE_KEYS)]
        )
        found: list[dict] = []
        for page in pages:  # an answer of 100,000 keys would take longer than the time limit
            found += self._call(self._coordinator, "POST", "/directory/lookup", page)["results"]
        return found

    def instances(self) -> list[str]:
        """Return the ids of the servers that have signed up at the coordinator."""
        answer = self._call(self._coordinator, "GET", "/instances")
        return [entry["instance_id"] for entry in answer["instances"]]

    def count_keys(self, instance_id: str, tier: str) -> int:
        """Return how many objects the directory shows in one tier."""
        path = f"{_keys_path(instance_id, tier)}&limit=1"
        return int(self._call(self._coordinator, "GET", path)["total"])

    def list_keys(self, instance_id: str, tier: str) -> list[dict]:
        """Return the object keys that the directory shows in one tier, of all models."""
        path = f"{_keys_path(instance_id, tier)}&limit={_PAGE_KEYS}"
        keys: list[dict] = []
        while True:
            page = self._call(self._coordinator, "GET", f"{path}&offset={len(keys)}")
            keys += [entry["key"] for entry in page["keys"]]
            if not page["keys"] or len(keys) >= page["total"]:
                return keys

    def delete(self, instance_id: str, tier: str, keys: list[dict]) -> int:
        """Delete objects from one tier of one server; returns how many were locked and stay."""
        locked = 0
        level, adapter = LMCACHE_TIERS[tier]
        for start in range(0, len(keys), _MAX_DELETE_KEYS):
            body = {"keys": keys[start : start + _MAX_DELETE_KEYS], "tier": level}
            answer = self._call_server(
                instance_id, "DELETE", "/cache/objects", {**body, "adapter": adapter}
            )
            if not answer["ok"]:
                raise LMCacheError(f"delete from {tier} failed: {answer.get('error')}")
            locked += answer["skipped"]
        return locked

    def prefetch(self, instance_id: str, prompt: dict[str, Any], deadline_s: float) -> None:
        """Load a prompt from L2 into L1; returns when loaded, or at `deadline_s` (monotonic)."""
        answer = self._call_server(instance_id, "POST", "/cache/prefetches", prompt)
        request_id = answer.get("request_id")
        while request_id and time.monotonic() < deadline_s:
            path = f"/cache/prefetches/{request_id}"
            if self._call_server(instance_id, "GET", path)["status"] != "pending":
                return
            time.sleep(0.002)

    def ping(self, instance_id: str) -> None:
        """Return if the instance's server answers, or did within the last `retry_after_s`."""
        now_s = time.monotonic()
        if now_s - self._answered_s.get(instance_id, -math.inf) > self._retry_after_s:
            self._call_server(instance_id, "GET", "/healthcheck")
            self._answered_s[instance_id] = now_s

    def chunk_size_tokens(self, instance_id: str) -> int:
        """Return the server's chunk size, in tokens."""
        return int(self._call_server(instance_id, "GET", "/status")["chunk_size"])

    def _call_server(self, instance_id, method, path, body=None):
        url = self._servers.get(instance_id) or self._find_server(instance_id)
        try:
            return self._call(url, method, path, body)
        except LMCacheUnavailable:
            self._servers.pop(instance_id, None)  # it may come back at another port
            self._answered_s.pop(instance_id, None)
            raise

    def _find_server(self, instance_id):
        instances = self._call(self._coordinator, "GET", "/instances")["instances"]
        for entry in instances:
            self._servers[entry["instance_id"]] = f"http://{entry['ip']}:{entry['http_port']}"
        if instance_id not in self._servers:
            known = ", ".join(sorted(self._servers)) or "none"
            raise LMCacheUnavailable(
                f"no LMCache server {instance_id!r} at {self._coordinator} (known: {known})"
            )
        return self._servers[instance_id]

    def _call(self, base_url, method, path, body=None):
        """Make one call under the service's breaker; returns the JSON answer."""
        breaker = self._breakers.setdefault(base_url, CircuitBreaker(self._retry_after_s))
        admitted = breaker.admit()
        if admitted == "trial":  # beside the caller: no generation waits for it
            threading.Thread(target=self._probe, args=(base_url, breaker), daemon=True).start()
        if admitted != "call":
            raise LMCacheUnavailable(f"{base_url} is away: {breaker.reason}")
        try:
            response = self._request(base_url + path, method, body)
        except requests.RequestException as error:
            breaker.failed(_plain_reason(error))
            raise LMCacheUnavailable(f"{base_url} is away: {breaker.reason}") from error
        breaker.succeeded()
        call = f"{method} {base_url}{path}"
        if not response.ok:
            raise LMCacheError(f"{call} answered {response.status_code}: {response.text[:300]}")
        return _Answer(response, call)

    def _probe(self, base_url, breaker):
        """Ask a service that was away once more, with the ordinary limits; any answer counts."""
        try:
            with requests.Session() as session:  # the other one is the callers'
                session.trust_env = False
                session.get(f"{base_url}/healthcheck", timeout=self._timeout_s)
        except requests.RequestException as error:
            breaker.failed(_plain_reason(error))
        else:
            breaker.succeeded()

    def _request(self, url, method, body):
        """Retry connection errors only (all calls here may safely be sent twice)."""
        for attempt in range(_CONNECTION_RETRIES + 1):
            try:
                return self._session.request(method, url, json=body, timeout=self._timeout_s)
            except requests.ConnectionError as error:
                if attempt == _CONNECTION_RETRIES or _is_timeout(error):
                    raise


def _keys_path(instance_id, tier):
    level, adapter = LMCACHE_TIERS[tier]
    path = f"/directory/keys?tier={level}&instance_id={instance_id}"
    return path + (f"&backend={adapter}" if adapter else "")


def _is_timeout(error):
    """True too for an answer that stops half-way, which requests calls a ConnectionError."""
    stalled = bool(error.args) and isinstance(error.args[0], ReadTimeoutError)
    return stalled or isinstance(error, requests.Timeout)


def _plain_reason(error):
    """Return what happened in a few words; requests' own text nests three exceptions."""
    if isinstance(error, requests.ConnectTimeout):
        return "connecting took too long"
    if _is_timeout(error):
        return "no answer in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__
    return type(error).__name__
