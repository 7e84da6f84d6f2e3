"""HTTP to LMCache's coordinator and servers: time limits, retries, a circuit breaker.

Nothing here decides; it only speaks. A service that does not answer costs one
full time limit; after that the breaker fails calls at once, and a thread beside
them looks every `retry_after_s`, so that managing resumes by itself.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests
from urllib3.exceptions import ReadTimeoutError

from kvttl.lmcache.tiers import LMCACHE_TIERS, addresses, pages

# uvicorn closes connections idle for 5 s, so a first try may meet a dead one.
_CONNECTION_RETRIES = 2
_MAX_DELETE_KEYS = 10_000  # the server's own limit (object_service.MAX_DELETE_BATCH)
TOKEN_VARIABLE = "KVTTL_TOKEN"  # noqa: S105 - a name: what lets into a server's /kvttl routes
_MODULE_S = 60.0  # a decision there waits for its moves
TIERS_PATH = "/kvttl/tiers"  # of a server that this kit starts: why tiers take no writes
_PAGE_KEYS = 10_000  # the directory's own limit of a listing


class LMCacheError(RuntimeError):
    """LMCache answered, and said no, or nothing that makes sense."""

    status, text = 0, ""  # of the HTTP answer


class LMCacheUnavailable(LMCacheError, ConnectionError):
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


@dataclass(eq=False)
class CircuitBreaker:
    """Remembers that a service is away, and when to try it again.

    Parameters
    ----------
    retry_after_s : float or None
        Seconds between trials while open; None: it never opens.
    timer : callable
        Monotonic clock, seconds.

    Examples
    --------
    >>> now, trials = [0.0], []
    >>> breaker = CircuitBreaker(retry_after_s=1.0, timer=lambda: now[0])
    >>> asked = "Redis", ConnectionError, lambda: trials.append(now[0])
    >>> breaker.check(*asked)  # closed: an ordinary call
    >>> breaker.failed("refused"); now[0] = 1.5
    >>> breaker.check(*asked)
    Traceback (most recent call last):
    ConnectionError: Redis is away: refused
    >>> breaker.succeeded(); breaker.check(*asked); trials  # one a second
    [1.5]
    """

    retry_after_s: float | None = 1.0
    timer: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.reason, self._lock = "", threading.Lock()
        self._retry_at_s: float | None = None

    def check(self, name: str, error: type[Exception], start_trial: Callable[[], Any]) -> None:
        """Raise `error` if the service `name` is away; start a trial, beside the caller, if due."""
        with self._lock:
            if self._retry_at_s is None:
                return
            if is_due := self.timer() >= self._retry_at_s:
                self._retry_at_s = self.timer() + self.retry_after_s
        if is_due:
            start_trial()
        raise error(f"{name} is away: {self.reason}")

    def failed(self, reason: str) -> None:
        """Open, or stay open."""
        with self._lock:
            self.reason = reason
            if self.retry_after_s is not None:
                self._retry_at_s = self.timer() + self.retry_after_s

    def succeeded(self) -> None:
        """Close."""
        with self._lock:
            self._retry_at_s = None


@dataclass(eq=False)
class Service:
    """One HTTP service that answers JSON objects.

    Parameters
    ----------
    url : str
        Such as ``http://localhost:9000``.
    connect_timeout_s, read_timeout_s : float
        Limits of one call, seconds.
    retry_after_s : float, optional
        Seconds between trials of a service that was away, beside the callers; None: each
        call tries for itself.
    """

    url: str
    connect_timeout_s: float = 0.5
    read_timeout_s: float = 2.0
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        self._breaker = CircuitBreaker(self.retry_after_s)
        self._session = _new_session()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def call(
        self, method: str, path: str, body: Any = None, read_timeout_s: float | None = None
    ) -> _Answer:
        """Return the answer to one call.

        Raises
        ------
        LMCacheUnavailable
            No answer, or the service is known to be away.
        LMCacheError
            A refusal (4xx, 5xx), with the service's own words; no JSON object.
        """
        response = self._answered(method, path, body, read_timeout_s)
        return _Answer(response, f"{method} {self.url}{path}")

    def text(self, path: str) -> str:
        """Return what a GET answers, such as ``/metrics``; raises as `call` does."""
        return self._answered("GET", path).text

    def _answered(self, method, path, body=None, read_timeout_s=None):
        self._breaker.check(self.url, LMCacheUnavailable, self._probe_beside)
        try:
            timeout_s = self.connect_timeout_s, read_timeout_s or self.read_timeout_s
            response = self._request(method, path, body, timeout_s)
        except requests.RequestException as error:
            reason = _plain_reason(error)
            self._breaker.failed(reason)
            raise LMCacheUnavailable(f"{self.url} is away: {reason}") from error
        self._breaker.succeeded()
        if not response.ok:
            status, text = response.status_code, response.text
            error = LMCacheError(f"{method} {self.url}{path} answered {status}: {text[:300]}")
            error.status, error.text = status, text
            raise error
        return response

    def _probe_beside(self):
        threading.Thread(target=self._probe, daemon=True).start()

    def _probe(self):
        """Ask a service that was away once more, with the ordinary limits; any answer counts."""
        try:
            with _new_session() as session:  # the other one is the callers'
                limits_s = self.connect_timeout_s, self.read_timeout_s
                session.get(f"{self.url}/healthcheck", timeout=limits_s)
        except requests.RequestException as error:
            self._breaker.failed(_plain_reason(error))
        else:
            self._breaker.succeeded()

    def _request(self, method, path, body, timeout_s):
        """Retry connection errors only (all calls here may safely be sent twice)."""
        for attempt in range(_CONNECTION_RETRIES + 1):
            try:
                url = self.url + path
                headers = _bearer() if path.startswith("/kvttl/") else {}
                options = {"json": body, "headers": headers, "timeout": timeout_s}
                return self._session.request(method, url, **options)
            except requests.ConnectionError as error:
                if attempt == _CONNECTION_RETRIES or _is_timeout(error):
                    raise


def _new_session():
    session = requests.Session()
    session.trust_env = False  # a proxy of the environment must not stand before loopback
    return session


def _bearer():
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def get_json(url: str, path: str) -> dict[str, Any]:
    """Return the JSON object at ``url`` + ``path``; an empty one if nothing sensible answers."""
    with contextlib.closing(Service(url, connect_timeout_s=2.0)) as service:
        try:
            return service.call("GET", path)
        except LMCacheError:
            return {}


def server_settings(url: str) -> dict[str, Any]:
    """Return what the LMCache server at `url` was started with; empty if none is healthy."""
    if get_json(url, "/healthcheck").get("status") != "healthy":
        return {}
    answer = get_json(url, "/config")
    if "mp" not in answer:
        return {}
    places = addresses(answer["storage_manager"]["l2_adapter_config"]["adapters"])
    return {
        "instance_id": answer["mp"]["instance_id"],
        "server_port": answer["mp"]["port"],
        "chunk_size_tokens": answer["mp"]["chunk_size"],
        "coordinator": answer["coordinator"]["url"],
        "inside": any(m["module_path"] == "kvttl.server" for m in answer["mp"]["server_modules"]),
        **{LMCACHE_TIERS[tier].setting: place for tier, place in places.items()},
    }


class LMCacheHTTP:
    """The calls that this kit makes, with their time limits.

    Parameters
    ----------
    coordinator_url : str
        Such as ``http://localhost:9000``.
    limits
        Of one ordinary call, as `Service` has them; ``retry_after_s``, 1 by default, is also
        how long a server counts as there after an answer.

    Raises
    ------
    LMCacheUnavailable
        From every call: no answer, or a service known to be away.
    LMCacheError
        From every call: a refusal (4xx, 5xx), with the service's own words.
    """

    def __init__(self, coordinator_url: str, **limits: float) -> None:
        self._limits = {"retry_after_s": 1.0, **limits}
        self._coordinator = Service(coordinator_url, **self._limits)
        self._services: dict[str, Service] = {}  # by URL: a breaker outlives a lost server
        self._servers: dict[str, Service] = {}  # by instance id
        self._answered_s: dict[str, float] = {}  # instance id -> when its server last did
        self._registered_s: dict[str, float | None] = {}  # its first sign-up
        self._tier_errors: dict[str, tuple[float, dict[str, str]]] = {}  # with when it was asked
        self._has_module: dict[str, bool] = {}  # instance id -> whether its server decides

    def close(self) -> None:
        """Close the connections."""
        for service in (self._coordinator, *self._services.values()):
            service.close()

    def lookup(self, query: dict[str, Any]) -> list[dict]:
        """Return the directory's entries for ``token_ids`` or ``keys`` (these in pages)."""
        queries = [query]
        if "keys" in query:  # an answer of 100,000 keys would take longer than the time limit
            queries = [{"keys": page} for page in pages(query["keys"], _PAGE_KEYS)]
        answers = (self._coordinator.call("POST", "/directory/lookup", part) for part in queries)
        return [entry for answer in answers for entry in answer["results"]]

    def instances(self) -> list[str]:
        """Return the ids of the servers that have signed up at the coordinator."""
        return [entry["instance_id"] for entry in self._instances()]

    def count_keys(self, instance_id: str, tier: str) -> int:
        """Return how many objects the directory shows in one tier."""
        return int(self._keys_page(instance_id, tier, "limit=1")["total"])

    def list_keys(self, instance_id: str, tier: str) -> list[dict]:
        """Return the object keys that the directory shows in one tier, of all models."""
        keys: list[dict] = []
        while True:
            page = self._keys_page(instance_id, tier, f"limit={_PAGE_KEYS}&offset={len(keys)}")
            keys += [entry["key"] for entry in page["keys"]]
            if not page["keys"] or len(keys) >= page["total"]:
                return keys

    def correct(self, event: dict[str, Any]) -> None:
        """Send the directory an event of a server that does not run."""
        self._coordinator.call("POST", "/events", {"batches": [event]})

    def delete(self, instance_id: str, tiers: Sequence[str], keys: list[dict]) -> int:
        """Delete objects from some tiers of one server; returns how many were locked and stay."""
        locked = 0
        adapters = [adapter for tier in tiers if (adapter := LMCACHE_TIERS[tier].adapter)]
        level = "l2" if "gpu" not in tiers else "all" if adapters else "l1"
        for adapter in adapters or [None]:  # one a call; the first takes level 1 along
            for page in pages(keys, _MAX_DELETE_KEYS):
                body = {"keys": page, "tier": level, "adapter": adapter}
                answer = self._call_server(instance_id, "DELETE", "/cache/objects", body)
                if not answer["ok"]:
                    raise LMCacheError(f"delete from {level} failed: {answer.get('error')}")
                locked += answer["skipped"]
            level = "l2"
        return locked

    def prefetch(self, instance_id: str, prompt: dict[str, Any]) -> None:
        """Let a server begin to load a prompt from L2 into L1."""
        self._call_server(instance_id, "POST", "/cache/prefetches", prompt)

    def ping(self, instance_id: str) -> None:
        """Return if the instance's server answers, or did within the last `retry_after_s`."""
        now_s = time.monotonic()
        if now_s - self._answered_s.get(instance_id, -math.inf) > self._limits["retry_after_s"]:
            self._call_server(instance_id, "GET", "/healthcheck")
            self._answered_s[instance_id] = now_s

    def tier_errors(self, instance_id: str) -> dict[str, str]:
        """Return why tiers take no writes, as of the last `retry_after_s`; empty if none says."""
        now_s, (asked_s, found) = time.monotonic(), self._tier_errors.get(instance_id, (0.0, {}))
        if not asked_s or now_s - asked_s > self._limits["retry_after_s"]:
            try:
                found = dict(self._call_server(instance_id, "GET", TIERS_PATH))
            except LMCacheError:  # away, which is said elsewhere; or a plain `lmcache server`
                found = {}
            self._tier_errors[instance_id] = now_s, found
        return found

    def has_module(self, instance_id: str) -> bool:
        """Return whether a server decides by itself; asked again after it was away."""
        has_module = self._has_module.get(instance_id)  # once: another thread may forget it
        if has_module is None:
            try:
                self.ask_module(instance_id, "/kvttl/status")
                has_module = True
            except LMCacheError as error:
                if error.status != 404:  # away, or it does not let this process in
                    raise
                has_module = False
            self._has_module[instance_id] = has_module
        return has_module

    def ask_module(self, instance_id: str, path: str, body: Any = None) -> dict[str, Any]:
        """Return the answer of a server's own decider; a GET without a body."""
        self.ping(instance_id)  # its limit is shorter
        method = "GET" if body is None else "POST"
        return self._call_server(instance_id, method, path, body, _MODULE_S)

    def memory_bytes(self, instance_id: str) -> int:
        """Return the size of a server's memory tier."""
        status = self._call_server(instance_id, "GET", "/status")
        return int(status["storage_manager"]["l1_manager"]["memory_configured_bytes"])

    def work_left(self, instance_id: str) -> int:
        """Return how much a server has still to write, load or decide; 0: it is at rest."""
        return work_in(self._call_server(instance_id, "GET", "/status"))

    def signed_up_again(self, instance_id: str) -> bool:
        """Return whether a server's sign-up is not the first one seen here.

        It, or the coordinator, was restarted: the directory may not know all that it holds.
        """
        if instance_id not in self._registered_s:
            self._find_server(instance_id)
        times = {each["instance_id"]: each.get("registration_time") for each in self._instances()}
        return times.get(instance_id) != self._registered_s[instance_id]

    def chunk_size_tokens(self, instance_id: str) -> int:
        """Return the server's chunk size, in tokens."""
        return int(self._call_server(instance_id, "GET", "/status")["chunk_size"])

    def _keys_page(self, instance_id, tier, part):
        level, adapter = LMCACHE_TIERS[tier][:2]
        query = f"tier={level}&instance_id={instance_id}&{part}"
        query += f"&backend={adapter}" if adapter else ""
        return self._coordinator.call("GET", f"/directory/keys?{query}")

    def _instances(self):
        return self._coordinator.call("GET", "/instances")["instances"]

    def _call_server(self, instance_id, method, path, body=None, read_timeout_s=None):
        server = self._servers.get(instance_id) or self._find_server(instance_id)
        try:
            return server.call(method, path, body, read_timeout_s)
        except LMCacheUnavailable:
            self._has_module.pop(instance_id, None)
            self._servers.pop(instance_id, None)  # it may come back at another port
            self._answered_s.pop(instance_id, None)
            raise

    def _find_server(self, instance_id):
        for entry in self._instances():
            url = f"http://{entry['ip']}:{entry['http_port']}"
            if url not in self._services:
                self._services[url] = Service(url, **self._limits)
            self._servers[entry["instance_id"]] = self._services[url]
            self._registered_s.setdefault(entry["instance_id"], entry.get("registration_time"))
        if instance_id not in self._servers:
            known = ", ".join(sorted(self._servers)) or "none"
            where = f"at {self._coordinator.url} (known: {known})"
            raise LMCacheUnavailable(f"no LMCache server {instance_id!r} {where}")
        return self._servers[instance_id]


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


def work_in(status: Mapping[str, Any]) -> int:
    """Return how much is still to write, load or decide, as a server's ``/status`` says it."""
    storage, module = status["storage_manager"], status.get("kvttl", {})
    l1, store = storage["l1_manager"], storage["store_controller"]
    work = store["pending_keys_count"] + store["in_flight_task_count"]
    work += l1["write_locked_count"] + l1["temporary_count"]
    work += storage["prefetch_controller"]["in_flight_request_count"]
    return work + module.get("open_requests", 0) + module.get("waiting_decisions", 0)
