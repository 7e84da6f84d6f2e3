"""The metrics: what is observed is what a scraper reads over HTTP."""

from __future__ import annotations

import math
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from kvttl.decisions.log import DecisionRecord
from kvttl.decisions.metrics import METRICS, DecisionMetrics

MOVE = {"from": "gpu", "to": "disk", "status": "done", "moved_chunks": 2, "latency_s": 0.02}
MANAGED = DecisionRecord(
    1_760_000_000.0,
    "ab12",
    prompt_tokens=300,
    ttl_s=3_693.6,
    wanted_tier="disk",
    hit_tokens={"gpu": 64, "disk": 100},
    moves=(MOVE, {**MOVE, "to": "remote", "status": "noop", "moved_chunks": 0}),
    generate_s=0.5,
    manage_s=0.002,
)
GAUGES = ("live_claims", "queue_depth", "tracked_patterns", "failing_tiers")


@pytest.fixture
def metrics():
    return DecisionMetrics()


def scrape(metrics, **options):
    """Return every sample, by name and labels (sorted by theirs), as a scraper gets it."""
    with metrics.serve(0, **options) as server:
        host = options.get("host", "127.0.0.1")
        url = f"http://{f'[{host}]' if ':' in host else host}:{server.port}/metrics"
        reply = requests.get(url, timeout=10)
    reply.raise_for_status()
    families = list(text_string_to_metric_families(reply.text))
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_scraper_reads_what_was_observed(metrics):
    for record in (MANAGED, MANAGED, replace(MANAGED, wanted_tier="gpu", moves=())):
        metrics.observe(record)
    found = scrape(metrics)
    assert found["kvttl_decisions_total", "disk"] == 2
    assert found["kvttl_decisions_total", "gpu"] == 1
    assert found["kvttl_decisions_total", "remote"] == 0  # there from the start
    assert found["kvttl_prompt_tokens_total",] == 900
    assert found["kvttl_hit_tokens_total", "disk"] == 300
    assert found["kvttl_moves_total", "gpu", "done", "disk"] == 2
    assert found["kvttl_moves_total", "gpu", "noop", "remote"] == 2
    assert found["kvttl_moved_chunks_total", "gpu", "disk"] == 4
    assert found["kvttl_move_seconds_sum", "gpu", "disk"] == pytest.approx(0.04)
    assert found["kvttl_generate_seconds_sum",] == 1.5
    assert found["kvttl_manage_seconds_count",] == 3
    assert found["kvttl_ttl_seconds_bucket", "3600.0"] == 0
    assert found["kvttl_ttl_seconds_bucket", "14400.0"] == 3
    assert found["kvttl_ttl_seconds_bucket", "604800.0"] == 3  # a TTL is 7 days at most


def test_every_metric_is_described_and_no_other(metrics):
    for name in GAUGES:
        metrics.watch(name, lambda: 1)
    with metrics.serve(0) as server:
        text = requests.get(f"http://127.0.0.1:{server.port}/metrics", timeout=10).text
    described = {}
    for line in text.splitlines():
        if line.startswith("# HELP kvttl_") and "_created " not in line:
            name, help_text = line.removeprefix("# HELP ").split(" ", 1)
            described[name] = help_text
    assert described == METRICS


def test_failures_are_counted_by_exception_class(metrics):
    for error in ("LMCacheUnavailable: [Errno 111]", "LMCacheUnavailable: ", "two words: x", "no"):
        metrics.observe(DecisionRecord(0.0, "a", error=error, wanted_tier="disk"))
    found = scrape(metrics)
    assert found["kvttl_not_managed_total", "LMCacheUnavailable"] == 2
    assert found["kvttl_not_managed_total", "other"] == 2
    assert found["kvttl_decisions_total", "disk"] == 0


def test_expiries_sheds_and_claims(metrics):
    expiry = DecisionRecord(0.0, "a", kind="expiry", from_tier="gpu", wanted_tier="disk")
    for record in (
        replace(expiry, moves=(MOVE,)),
        replace(expiry, from_tier="remote", wanted_tier=None),
        DecisionRecord(0.0, "a", kind="shed", prompt_tokens=9, error="QueueFull: 100 wait"),
        replace(MANAGED, kind="claim"),
    ):
        metrics.observe(record)
    found = scrape(metrics)
    assert found["kvttl_expiries_total", "gpu", "disk"] == 1
    assert found["kvttl_expiries_total", "remote", "dropped"] == 1
    assert found["kvttl_moves_total", "gpu", "done", "disk"] == 1
    assert found["kvttl_shed_total",] == 1
    assert found["kvttl_prompt_tokens_total",] == found["kvttl_generate_seconds_count",] == 0


@pytest.mark.parametrize("value", [math.nan, -1, None, "many", math.inf])
def test_a_number_that_is_none_spoils_no_sum(metrics, value):
    move = {"from": "gpu", "to": "disk", "moved_chunks": value, "latency_s": value}
    metrics.observe(
        replace(MANAGED, prompt_tokens=value, ttl_s=value, generate_s=value, moves=(move, {}))
    )
    metrics.observe(MANAGED)
    found = scrape(metrics)
    assert found["kvttl_prompt_tokens_total",] == 300
    assert found["kvttl_ttl_seconds_sum",] == 3_693.6
    assert found["kvttl_generate_seconds_sum",] == 0.5
    assert found["kvttl_moves_total", "gpu", "unknown", "disk"] == 1


def test_gauges_show_the_callbacks_value_at_each_scrape(metrics, caplog):
    claims = []
    assert ("kvttl_live_claims",) not in scrape(metrics)  # unknown is not 0
    metrics.watch("live_claims", lambda: len(claims))
    assert scrape(metrics)["kvttl_live_claims",] == 0
    claims.append("a")
    assert scrape(metrics)["kvttl_live_claims",] == 1
    metrics.watch("live_claims", lambda: 1 / 0)  # takes the first one's place
    assert math.isnan(scrape(metrics)["kvttl_live_claims",])
    assert "the gauge kvttl_live_claims cannot be read: division by zero" in caplog.messages


def test_a_gauge_that_is_not_ours_is_refused(metrics):
    with pytest.raises(ValueError, match="name must be one of live_claims, queue_depth, tracked"):
        metrics.watch("claims", int)


def test_two_instances_do_not_collide(metrics):
    other = DecisionMetrics()
    metrics.observe(MANAGED)
    with metrics.serve(0) as one, other.serve(0) as two:
        assert one.port != two.port
    assert scrape(metrics)["kvttl_prompt_tokens_total",] == 300
    assert scrape(other)["kvttl_prompt_tokens_total",] == 0


def test_a_registry_of_the_callers_is_used():
    registry = CollectorRegistry()
    DecisionMetrics(registry).observe(MANAGED)
    assert registry.get_sample_value("kvttl_decisions_total", {"tier": "disk"}) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost", "::1"])
def test_loopback_hosts_are_served(metrics, host):
    if host == "::1" and not has_ipv6_loopback():
        pytest.skip("no IPv6 loopback here")
    assert scrape(metrics, host=host)["kvttl_prompt_tokens_total",] == 0


def has_ipv6_loopback():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.0.1", "example.org", "127.1", None])
def test_other_hosts_are_refused(metrics, host):
    with pytest.raises(ValueError, match="host must be a loopback address"):
        metrics.serve(0, host=host)


@pytest.mark.parametrize("port", [-1, 65_536, 1.5, "9100", True, None])
def test_ports_out_of_range_are_refused(metrics, port):
    with pytest.raises(ValueError, match=r"port must be a whole number in 0\.\.65535, got"):
        metrics.serve(port)


def test_a_taken_port_is_said_in_a_sentence_and_given_back_after_close(metrics):
    server = metrics.serve(0)
    with pytest.raises(RuntimeError, match=f"port {server.port}: Address already in use; choose"):
        metrics.serve(server.port)
    server.close()
    server.close()
    metrics.serve(server.port).close()


def test_the_page_on_deciding_lists_every_metric():
    page = (Path(__file__).parents[1] / "docs" / "deciding.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in page] == []
