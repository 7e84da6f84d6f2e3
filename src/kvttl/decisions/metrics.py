"""Decisions as Prometheus metrics, served on loopback for a scraper beside the process."""

import ipaddress
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from caching_heuristics import TIERS
from kvttl.decisions.log import DecisionRecord

logger = logging.getLogger(__name__)

_PREFIX = "kvttl_"
_PATH = ("source", "target")
_METRICS = {  # name -> what it says, its labels
    "decisions_total": ("Decisions made, by wanted tier.", "tier"),
    "salted_decisions_total": ("Decisions about KV under a cache salt: tenants, adapters.",),
    "not_managed_total": ("Generations whose KV cache was not managed, by exception.", "reason"),
    "shed_total": ("Decisions given up because the queue was full.",),
    "prompt_tokens_total": ("Prompt tokens of the generations decided about.",),
    "hit_tokens_total": ("Prompt tokens not computed, by the tier that served them.", "tier"),
    "moves_total": ("Moves between tiers asked for, by status.", *_PATH, "status"),
    "moved_chunks_total": ("Chunks that moves brought to another tier.", *_PATH),
    "expiries_total": ("Claims whose TTL passed; below the last: dropped.", "from_tier", "to_tier"),
    "wanted_again_tokens_total": ("Prompt tokens computed again, by why they were gone.", "reason"),
    "byte_seconds_total": ("Bytes of KV cache times seconds that a tier held them.", "tier"),
    "shadow_hit_tokens_total": ("Prompt tokens that a policy would hit in gpu's room.", "policy"),
    "shadow_prompt_tokens_total": ("Prompt tokens that its cache was asked for.", "policy"),
    "shadow_byte_seconds_total": ("Bytes times seconds that its cache held them.", "policy"),
    "meter_failures_total": ("Times that the shadow caches failed, and began anew.",),
    "ttl_seconds": ("TTL decided, seconds.",),
    "generate_seconds": ("Time of a generation in the engine, seconds.",),
    "manage_seconds": ("Time spent on a decision and its moves, seconds.",),
    "move_seconds": ("Time of a move, seconds.", *_PATH),
    "live_claims": ("Claims whose TTL has not passed.",),
    "queue_depth": ("Decisions that wait to be made.",),
    "tracked_patterns": ("Prompt patterns whose history is kept.",),
    "failing_tiers": ("Tiers that take no writes now.",),
}
METRICS = {_PREFIX + name: text for name, (text, *_) in _METRICS.items()}
_GAUGES = ("live_claims", "queue_depth", "tracked_patterns", "failing_tiers")
_TTL_S = (1, 4, 15, 60, 240, 900, 3_600, 14_400, 57_600, 172_800, 604_800)  # .. 7 days
_LATENCY_S = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class DecisionMetrics:
    """Counts and times decision records.

    Parameters
    ----------
    registry : prometheus_client.CollectorRegistry, optional
        Where the metrics are registered; a registry takes one `DecisionMetrics`.
        None = a registry of its own.

    Examples
    --------
    >>> metrics = DecisionMetrics()
    >>> metrics.observe(DecisionRecord(0.0, "a", wanted_tier="disk", ttl_s=60.0))
    >>> metrics.registry.get_sample_value("kvttl_decisions_total", {"tier": "disk"})
    1.0
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._metrics = {}
        self._gauges: dict[str, Gauge] = {}
        for name, (text, *labels) in _METRICS.items():
            what = (_PREFIX + name, text, labels)
            if name.endswith("_total"):
                self._metrics[name] = Counter(*what, registry=self.registry)
            elif name not in _GAUGES:
                bounds = _TTL_S if name == "ttl_seconds" else _LATENCY_S
                self._metrics[name] = Histogram(*what, registry=self.registry, buckets=bounds)
        for tier in TIERS:  # from the start, so that a rate sees the first one
            self._of("decisions_total", tier)
            self._of("hit_tokens_total", tier)
        for reason in ("ttl", "room", "tier_error"):
            self._of("wanted_again_tokens_total", reason)

    def observe(self, record: DecisionRecord) -> None:
        """Add one record; a write-ahead claim counts as part of its generation's record."""
        if record.kind == "claim":
            return
        if record.kind == "shed":
            self.add("shed_total", 1)
        elif record.kind == "expiry":
            to_tier = record.wanted_tier or "dropped"
            self.add("expiries_total", 1, record.from_tier or "unknown", to_tier)
        elif record.kind == "generation":
            self._observe_generation(record)
        for move in record.moves:
            self._observe_move(move)

    def watch(self, name: str, function: Callable[[], float]) -> None:
        """Show what `function` returns, at each scrape, as a gauge.

        Parameters
        ----------
        name : str
            ``live_claims``, ``queue_depth``, ``tracked_patterns`` or ``failing_tiers``; a
            gauge that nobody watches is not shown.
        function : callable
            Returns a number; NaN is shown where it fails. It takes the place
            of an earlier one.

        Raises
        ------
        ValueError
            For another name.

        Examples
        --------
        >>> metrics = DecisionMetrics()
        >>> metrics.watch("live_claims", lambda: 3)
        >>> metrics.registry.get_sample_value("kvttl_live_claims")
        3.0
        """
        if name not in _GAUGES:
            raise ValueError(f"name must be one of {', '.join(_GAUGES)}, got {name!r}")
        if name not in self._gauges:
            self._gauges[name] = Gauge(_PREFIX + name, *_METRICS[name], registry=self.registry)
        self._gauges[name].set_function(lambda: _value(name, function))

    def serve(self, port: int, host: str = "127.0.0.1") -> "MetricsServer":
        """Serve the metrics over HTTP, to this machine only, until `MetricsServer.close`.

        Parameters
        ----------
        port : int
            0 = any free port.
        host : str
            A loopback address, or ``localhost``.

        Raises
        ------
        ValueError
            If `host` is not loopback, or `port` not in 0..65535.
        RuntimeError
            If the port cannot be had.
        """
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65_535:
            raise ValueError(f"port must be a whole number in 0..65535, got {port!r}")
        if not is_loopback(host):
            raise ValueError(f"host must be a loopback address (127.0.0.1, ::1), got {host!r}")
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            reason = f"{error.strerror or error}; choose another port, or 0 for any free one"
            place = f"{host} port {port}"
            raise RuntimeError(f"the metrics cannot be served on {place}: {reason}") from error
        return MetricsServer(server, thread)

    def _observe_generation(self, record):
        if record.error:
            self.add("not_managed_total", 1, _reason(record.error))
        elif record.wanted_tier is not None:
            self.add("decisions_total", 1, record.wanted_tier)
            self.add("salted_decisions_total", int(bool(record.cache_salt)))
        self.add("prompt_tokens_total", record.prompt_tokens)
        for tier, tokens in record.hit_tokens.items():
            self.add("hit_tokens_total", tokens, tier)
        for reason, tokens in record.wanted_again.items():
            self.add("wanted_again_tokens_total", tokens, reason)
        if record.ttl_s is not None:
            self._time("ttl_seconds", record.ttl_s)
        self._time("generate_seconds", record.generate_s)
        self._time("manage_seconds", record.manage_s)

    def _observe_move(self, move):
        path = [str(move.get(end, "unknown")) for end in ("from", "to")]
        self.add("moves_total", 1, *path, str(move.get("status", "unknown")))
        self.add("moved_chunks_total", move.get("moved_chunks"), *path)
        if move.get("latency_s") is not None:
            self._time("move_seconds", move["latency_s"], *path)

    def _of(self, name, *labels):
        metric = self._metrics[name]
        return metric.labels(*labels) if labels else metric

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter, named without its prefix; what is no amount is left out."""
        if _counts(amount):
            self._of(name, *labels).inc(amount)

    def _time(self, name, seconds, *labels):
        if _counts(seconds):
            self._of(name, *labels).observe(seconds)


class MetricsServer(ExitStack):
    """A running metrics server: its `port`, and `close`, which may be called twice."""

    def __init__(self, server, thread) -> None:
        super().__init__()
        self.port: int = server.server_port
        for step in (thread.join, server.server_close, server.shutdown):  # the last one first
            self.callback(step)


def _counts(amount):
    """Say whether a metric can take this number; one NaN would spoil a sum for good."""
    try:
        return 0 <= amount < math.inf
    except TypeError:
        return False


def _reason(error):
    """Return the exception's class name, the only part of an error with few values."""
    name, colon, _ = error.partition(":")
    return name if colon and name.isidentifier() else "other"


def _value(name, function):
    """Return what a gauge shows now; a failing callback must not break the scrape."""
    try:
        return float(function())
    except Exception as error:
        logger.warning("the gauge %s%s cannot be read: %s", _PREFIX, name, error)
        return math.nan


def is_loopback(host: str) -> bool:
    """Say whether a host's name or address is this machine's own, which no network reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
