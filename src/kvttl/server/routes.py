"""What the LMCache server's own HTTP port shows of this kit, and who may see and change it."""

from __future__ import annotations

import contextlib
import functools
import hmac
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.concurrency import run_in_threadpool

from caching_heuristics import check_number, unknown_name
from kvttl.decisions.keeper import RecentRecords
from kvttl.decisions.metrics import DecisionMetrics, is_loopback
from kvttl.decisions.record import DecisionRecord
from kvttl.lmcache.client import TOKEN_VARIABLE
from kvttl.server.compat import http_app, http_host

_MAX_RECORDS, _MAX_BYTES = 10_000, 64 * 2**20
_TICK_S = 1e-6  # between two records at least: of times since 1970 that a float tells apart
_STATUS = {  # what of the status is a metric -> its name, what it says, its label
    "chunks": ("kvttl_chunks", "Chunks that a tier holds.", "tier"),
    "open_requests": ("kvttl_open_requests", "Requests that run."),
    "unseen_requests": ("kvttl_unseen_requests_total", "Requests nothing was decided about."),
    "done": ("kvttl_chunks_done_total", "Chunks, by what was done with them.", "what"),
    "failures": ("kvttl_hook_failures_total", "Errors of this kit in LMCache, by hook.", "hook"),
    "seconds_since_pass": ("kvttl_pass_age_seconds", "Time since gpu's room was looked at."),
}


@functools.cache
def token() -> str:
    """Return the bearer token of all ``/kvttl`` routes of this process; empty = there is none.

    It is taken out of the environment, which LMCache shows to anybody at ``/env``.
    """
    return os.environ.pop(TOKEN_VARIABLE, "").strip()


def guarded(host: str) -> Callable[[Request], None]:
    """Return what lets only those into routes who may use them: a dependency for FastAPI.

    With a token, whoever sends it. Without one, this machine alone: a server that the network
    reaches answers nobody, and of a browser's requests only those to and from a page of this
    machine count, since any other page could send them too.

    Parameters
    ----------
    host : str
        What the HTTP server is bound to.
    """
    secret = token().encode()

    def allow(request: Request) -> None:
        if secret:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), secret)
            if not same or scheme.lower() != "bearer":
                problem = "the token is missing or wrong: send `Authorization: Bearer <token>`"
                raise HTTPException(401, problem, {"WWW-Authenticate": "Bearer"})
            return
        client = request.client.host if request.client else ""
        if not (is_loopback(host) and is_loopback(client)):
            problem = f"set {TOKEN_VARIABLE} where the server starts: the network can reach it"
            raise HTTPException(403, problem)
        named = "//" + request.headers.get("host", "")
        if not all(map(_is_of_this_machine, (named, request.headers.get("origin", named)))):
            raise HTTPException(403, "Host and Origin must be names of this machine's loopback")

    return allow


def _is_of_this_machine(url):
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


class Shown(DecisionMetrics):
    """The records and the metrics of all models of a module, as the server's HTTP port shows them.

    Attributes
    ----------
    records : RecentRecords
        The newest of all models, in the order in which they came.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.records = RecentRecords(_MAX_RECORDS, _MAX_BYTES)
        self._came_s: deque[float] = deque()  # of `records`; each later than the one before
        self._forgot_s = time.time()  # when the newest came that is not there, or no longer
        self._keeping, self._watched = threading.Lock(), {}
        self._status = module.status
        self.collect = module.guard(lambda: list(self._collect()), "metrics", [])
        REGISTRY.register(self)  # what LMCache's ``/metrics`` shows

    def observe(self, record: DecisionRecord) -> None:
        """Keep one more record, and count it."""
        with self._keeping:
            before_s = self._came_s[-1] if self._came_s else 0.0
            self._came_s.append(max(time.time(), before_s + _TICK_S))
            self.records.append(record)
            while len(self._came_s) > len(self.records):
                self._forgot_s = self._came_s.popleft()
        super().observe(record)

    def watch(self, name: str, function: Callable[[], float]) -> None:
        """Show a gauge of one more model; tiers are those of the server, and fail for all."""
        functions = self._watched.setdefault(name, [])
        functions.append(function)
        of_all = max if name == "failing_tiers" else sum
        super().watch(name, lambda: of_all([each() for each in functions]))

    def describe(self) -> list[Metric]:
        """Return nothing, so that a module that is not ready is not asked for its metrics."""
        return []

    def _collect(self):
        yield from self.registry.collect()
        status = self._status()
        for key, (name, text, *labels) in _STATUS.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, text, labels=labels)
            for label, number in status[key].items() if labels else [("", status[key])]:
                family.add_metric([label] if labels else [], number)
            yield family

    def page(self, since_s: float, limit: int) -> str:
        """Return as JSON at most `limit` records that came after a time, the oldest first.

        ``next`` is where to go on; not ``complete`` is what lacks records that are forgotten.
        """
        with self._keeping:
            pairs = zip(self._came_s, self.records, strict=True)
            page = [pair for pair in pairs if pair[0] > since_s]
            complete = since_s >= self._forgot_s
        more, page = len(page) > limit, page[:limit]
        facts = {"next": page[-1][0] if page else since_s, "more": more, "complete": complete}
        lines = ",".join(record.to_json() for _, record in page)
        return f'{json.dumps(facts)[:-1]}, "records": [{lines}]}}'


def mount(module: Any) -> None:
    """Add all routes of a module to its server, before that is started."""
    allowed = Depends(guarded(http_host()))
    for router in (routes(module), module.handover.router()):
        http_app().include_router(router, prefix="/kvttl", dependencies=[allowed])


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes; of a mapping's names only those that are changed.

    Examples
    --------
    >>> merged({"high": 0.9, "budgets": {"a": 0.5}}, {"budgets": {"b": 0.25}})
    {'high': 0.9, 'budgets': {'a': 0.5, 'b': 0.25}}
    """
    parts = {n: each for n, each in changes.items() if isinstance(each, dict)}
    both = {n: {**settings[n], **parts[n]} for n in parts if isinstance(settings.get(n), dict)}
    return {**settings, **changes, **both}


def check_names(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError that names the first unknown one of some names."""
    for name in given:
        if name not in known:
            raise ValueError(unknown_name(kind, name, known))


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Answer a ValueError as a 400 with its sentence."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text  # which the check then names


async def json_object(request: Request) -> Mapping[str, Any]:
    """Return a request's body, which must be a JSON object; anything else is a 400 or a 413."""
    size = request.headers.get("content-length", "")
    if not size.isdigit() or int(size) > _MAX_BYTES:
        raise HTTPException(413, f"content-length must be 0..{_MAX_BYTES}, got {size!r:.80}")
    try:
        body = await request.json()
        json.dumps(body, allow_nan=False)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return body


def routes(module: Any) -> APIRouter:
    """Return the routes of a module: its status, its decisions and its settings."""
    router = APIRouter()

    @router.get("/status")
    def status() -> dict[str, Any]:
        return module.status()

    @router.get("/decisions")
    def decisions(since: str = "0", limit: str = "100") -> Response:
        with refusing():
            count = int(check_number("limit", _number(limit), 1, 1_000))
            page = module.shown.page(check_number("since", _number(since), 0.0, 1e12), count)
        return Response(page, media_type="application/json")

    @router.patch("/config")
    async def config(request: Request, trial: bool = False) -> dict[str, Any]:
        changes = await json_object(request)
        with refusing():
            return await run_in_threadpool(module.change, changes, trial)

    return router
