"""What a running server says of itself: the module inside LMCache, or a manager's metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from caching_heuristics import TIERS
from kvttl.decisions.metrics import METRICS
from kvttl.lmcache.client import LMCacheError, LMCacheUnavailable, Service

OWN = "this server"
_RECORDS, _PAGE, _BEFORE_S = 500, 200, 600.0


class Seen(NamedTuple):
    """What was read at one moment; ratios are shares of prompt tokens since the server's start.

    Parameters
    ----------
    time_s : float
        Unix time.
    samples : mapping of str to dict
        Metrics of this kit: name -> label value ("" where there is none) -> number.
    status : mapping
        Of ``/kvttl/status``; empty of a manager outside.
    records : tuple of dict
        The last decisions, the newest first.
    """

    time_s: float
    samples: Mapping[str, Mapping[str, float]]
    status: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]

    def of(self, name: str) -> Mapping[str, float]:
        """Return a metric by label value, its name without the prefix."""
        return self.samples.get(f"kvttl_{name}", {})

    def hits(self) -> dict[str, float]:
        """Return the share of prompt tokens that each tier served."""
        asked = max(self.of("prompt_tokens_total").get("", 0.0), 1.0)
        return {tier: self.of("hit_tokens_total").get(tier, 0.0) / asked for tier in TIERS}

    def regret(self) -> dict[str, float]:
        """Return the shares that gpu hit here, and that other policies would have hit."""
        asked, hit = (self.of(f"shadow_{n}_tokens_total") for n in ("prompt", "hit"))
        others = {name: hit.get(name, 0.0) / n for name, n in asked.items() if n}
        return {OWN: self.hits()["gpu"]} | others if others else {}

    def prices(self) -> dict[str, float]:
        """Return the newest price of each tier in the records; a policy that learns has them."""
        found = (part for record in self.records for part in record.get("decided", ()))
        prices = {}
        for part in found:
            prices.setdefault(part.get("tier"), part.get("price"))
        return {tier: prices[tier] for tier in TIERS if prices.get(tier) is not None}


class LiveSource:
    """Reads a server at an address, again and again.

    Parameters
    ----------
    url : str
        Of an LMCache server's HTTP port, or of a manager's metrics.
    """

    def __init__(self, url: str) -> None:
        url = url.strip().rstrip("/").removesuffix("/metrics")
        self.url = url if "://" in url else f"http://{url}"
        self._service = Service(self.url)
        self._since_s = max(0.0, time.time() - _BEFORE_S)
        self._records: deque[Mapping[str, Any]] = deque(maxlen=_RECORDS)

    def read(self) -> Seen:
        """Return what is there now.

        Raises
        ------
        LMCacheError
            Nothing answers, or something that is not of this kit; says so in one sentence.
        """
        samples = _samples(self._service.text("/metrics"))
        if not samples:
            raise LMCacheError(f"{self.url} answers, but serves no metrics of this kit")
        status = self._status()
        while status:
            path = f"/kvttl/decisions?since={self._since_s!r}&limit={_PAGE}"
            page = self._service.call("GET", path)
            self._records.extendleft(page["records"])
            self._since_s = page["next"]
            if not page["more"]:
                break
        return Seen(time.time(), samples, status, tuple(self._records))

    def _status(self):
        try:
            return self._service.call("GET", "/kvttl/status")
        except LMCacheUnavailable:
            raise
        except LMCacheError as error:
            if error.status in (401, 403):
                raise
            return {}  # a manager outside, which serves metrics at every path


def _samples(text):
    found: dict[str, dict[str, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for name, labels, number, *_ in family.samples:
                if name in METRICS or name.startswith("kvttl_chunks"):
                    of = found.setdefault(name, {})
                    label = "/".join(labels.values())
                    of[label] = of.get(label, 0.0) + number
    except ValueError as error:
        raise LMCacheError(f"what /metrics answers are no metrics: {error}") from error
    return found
