"""The routes, metrics and budgets of a real LMCache server with the module, and its fleet's."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from fastapi import Depends, FastAPI
from inside_server import CHUNK, Client, inside_server, prompt
from lmcache.v1.mp_coordinator.config import MPCoordinatorConfig
from lmcache.v1.mp_coordinator.views import build_views
from prometheus_client.parser import text_string_to_metric_families
from redis_fixtures import free_port
from starlette.testclient import TestClient
from waiting import wait_until

from kvttl.decisions.metrics import METRICS
from kvttl.server import routes
from kvttl.server.fleet.controller import Fleet
from kvttl.server.module import ServerSettings

TOKEN = "of-the-tests"  # noqa: S105
CONFIG = {"heuristics": {"base_ttl": 3600.0}, "save": "demotion"}


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    """Of this machine, without a token of its own."""
    port, log = free_port(), tmp_path_factory.mktemp("fleet") / "coordinator.log"
    extra = {"controller_packages": ["kvttl.server.fleet"], "kvttl": {"settings": {"low": 0.7}}}
    options = ("--extra-config", json.dumps(extra), "--instance-timeout", "3600")
    command = [sys.executable, "-m", "lmcache.v1.mp_coordinator", "--host", "127.0.0.1"]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: is_listening(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-3000:]
        yield SimpleNamespace(port=port, process=process, log=log)
    finally:
        process.terminate()
        process.wait(15)


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory, coordinator):
    """Reached by the network, with a token; room for 64 chunks in gpu."""
    options = (
        *("--http-host", "0.0.0.0"),  # noqa: S104 - that is what is tried
        *("--coordinator-url", f"http://127.0.0.1:{coordinator.port}"),
        *("--coordinator-advertise-ip", "127.0.0.1", "--coordinator-heartbeat-interval", "0.5"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTTL_TOKEN", TOKEN)
        with inside_server(tmp_path_factory.mktemp("routes"), CONFIG, options=options) as running:
            yield running


@pytest.fixture
def client(server):
    client = Client(server.url)
    yield client
    client.close()


def ask(port, path, method="GET", body=None, token=TOKEN, **headers):
    """Return the status and the answer, JSON or text."""
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def of(app, client="127.0.0.1", **headers):
    return TestClient(app, client=(client, 1), base_url="http://127.0.0.1:8080", headers=headers)


@pytest.fixture
def guarded_app(monkeypatch):
    def made(host, token=""):
        monkeypatch.setattr(routes, "token", lambda: token)
        app = FastAPI()
        app.get("/kvttl/status", dependencies=[Depends(routes.guarded(host))])(lambda: {})
        return app

    return made


def test_lmcache_shows_nobody_the_token_or_the_settings(server):
    """Also before any of this kit's routes was asked."""
    for path in ("/env", "/config", "/status"):
        status, answer = ask(server.http_port, path, token="")
        assert status == 200 and TOKEN not in str(answer)
    assert {"settings", "changes"}.isdisjoint(answer["kvttl"]) and "failures" in answer["kvttl"]


@pytest.mark.parametrize("method, path", [("GET", "/kvttl/status"), ("PATCH", "/kvttl/config")])
@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "\u00e9"])
def test_the_network_needs_the_token(server, method, path, token):
    body = {"high": 0.5} if method == "PATCH" else None
    status, answer = ask(server.http_port, path, method, body, token.encode().decode("latin-1"))
    assert status == 401 and answer["detail"].startswith("the token is missing or wrong")
    status, answer = ask(server.http_port, "/kvttl/status")
    assert status == 200 and answer["settings"]["high"] == 0.85


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "kv-server", ""])  # noqa: S104
def test_without_a_token_the_network_is_refused(guarded_app, host):
    answer = of(guarded_app(host)).get("/kvttl/status")
    assert answer.status_code == 403 and "set KVTTL_TOKEN" in answer.json()["detail"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_a_token_only_if_there_is_one(guarded_app, host):
    assert of(guarded_app(host)).get("/kvttl/status").status_code == 200
    assert of(guarded_app(host, TOKEN)).get("/kvttl/status").status_code == 401
    right = {"Authorization": f"bearer {TOKEN}"}
    assert of(guarded_app(host, TOKEN), **right).get("/kvttl/status").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a name that was pointed to this machine: DNS rebinding
        {"Host": "127.0.0.1.evil.example:8080"},
        {"Host": "[::1"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_pages_of_others_in_this_machines_browser_are_refused(guarded_app, headers):
    answer = of(guarded_app("127.0.0.1"), **headers).get("/kvttl/status")
    assert answer.status_code == 403 and "Host and Origin" in answer.json()["detail"]
    of_here = {"Host": "localhost:8080", "Origin": "http://[::1]:3000"}
    assert of(guarded_app("127.0.0.1"), **of_here).get("/kvttl/status").status_code == 200


def test_what_a_proxy_forwards_needs_a_token(guarded_app):
    answer = of(guarded_app("127.0.0.1"), client="203.0.113.9").get("/kvttl/status")
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"hihg": 0.5}, "unknown setting of kvttl.server 'hihg': did you mean 'high'?"),
        ({"high": 1.5}, "high must be 0..1, got 1.5"),
        ({"low": 0.9}, "low must be > 0 and <= high (0.85), got 0.9"),
        ({"birth": "some"}, "birth must be none or all, got 'some'"),
        ({"heuristics": {"gama": None}}, "unknown setting of heuristics 'gama'"),
        ({"heuristics": {"gamma": 2}}, "gamma must be"),
        ({"heuristics": 3}, "heuristics must be a mapping, got 3"),
        ({"budgets": {"tenant-a": 0}}, "budgets['tenant-a'] must be 0..1, got 0"),
        ({"workers": 4}, "workers cannot be changed while the server runs, got 4"),
        ([0.5], "the body must be a JSON object"),
        ({"high": float("nan")}, "the body must be a JSON object"),
        (b'{"high": ', "the body must be a JSON object"),
        ({"high": 0.5, "save": 1}, "save must be end or demotion, got 1"),  # all or nothing
    ],
)
def test_a_wrong_change_is_refused_with_a_sentence(server, changes, sentence):
    before = ask(server.http_port, "/kvttl/status")[1]
    status, answer = ask(server.http_port, "/kvttl/config", "PATCH", changes)
    assert status == 400 and sentence in answer["detail"] and "\n" not in answer["detail"]
    after = ask(server.http_port, "/kvttl/status")[1]
    assert after["settings"] == before["settings"] and after["changes"] == before["changes"]


def change(server, **changes):
    status, answer = ask(server.http_port, "/kvttl/config", "PATCH", changes)
    assert status == 200, answer
    return answer


def last(client, tokens_ended):
    return wait_until(lambda: (r := client.records()[tokens_ended:]) and r[0])


def test_a_change_holds_at_once_and_is_told(server, client):
    client.serve(prompt(1, 2))
    assert last(client, 0).ttl_s == 3600.0
    heuristics = {"base_ttl": 600.0, "min_ttl": 0.1, "disk_ttl_factor": 300.0}
    settings = change(server, heuristics=heuristics, high=0.8)
    assert settings["heuristics"] == heuristics and (settings["high"], settings["low"]) == (
        0.8,
        0.75,
    )
    client.serve(prompt(2, 2), ttl=1.0)
    assert last(client, 1).ttl_s == 1.0
    (step,) = wait_until(lambda: [r for r in client.records() if r.kind == "expiry"])
    assert (step.from_tier, step.ttl_s) == ("gpu", 300.0)  # the ladder's too
    client.serve(prompt(3, 2))
    assert last(client, 3).ttl_s == 600.0
    settings = change(
        server, heuristics={"base_ttl": None, "min_ttl": None, "disk_ttl_factor": None}
    )
    assert settings["heuristics"] == {}
    told = ask(server.http_port, "/kvttl/status")[1]["changes"]
    assert told[-2]["settings"] == {"heuristics": heuristics, "high": 0.8}
    log = server.log.read_text()
    assert "settings changed: " in log and '"high": 0.8' in log


def test_decisions_come_page_by_page(server, client):
    for number in range(10, 15):
        client.serve(prompt(number, 1))
    wait_until(lambda: client.status()["waiting_decisions"] == 0)
    everything = client.records()
    assert len(everything) >= 5
    came, since = [], 0
    while True:
        status, page = ask(server.http_port, f"/kvttl/decisions?since={since}&limit=2")
        assert status == 200 and len(page["records"]) <= 2
        assert page["complete"] == (since != 0)  # of before the start nothing is known
        came, since = came + page["records"], page["next"]
        if not page["more"]:
            break
    assert [r["prompt_digest"] for r in came] == [r.prompt_digest for r in everything]
    before_s = time.time()
    client.serve(prompt(15, 1))
    wait_until(lambda: len(client.records()) > len(everything))
    _, page = ask(server.http_port, f"/kvttl/decisions?since={before_s}")
    assert [r["prompt_digest"] for r in page["records"]] == [client.records()[-1].prompt_digest]
    for wrong, sentence in [
        ("since=now", "since must be a number (0..1e+12), got 'now'"),
        ("since=nan", "since must be"),
        ("limit=0", "limit must be 1..1000, got 0"),
    ]:
        status, answer = ask(server.http_port, f"/kvttl/decisions?{wrong}")
        assert status == 400 and sentence in answer["detail"], answer


def metrics(server):
    _, text = ask(server.http_port, "/metrics", token="")
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *s.labels.values()): s.value for s in samples if s.name.startswith("kvttl_")}


def test_lmcaches_metrics_show_decisions_and_places(server, client):
    before = metrics(server)
    tokens = prompt(20, 3)
    client.serve(tokens, tier="gpu")
    client.serve(tokens, tier="disk")
    wait_until(lambda: client.status()["chunks"]["disk"] >= 3)
    wait_until(lambda: client.status()["waiting_decisions"] == 0)
    status, after = client.status(), metrics(server)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["kvttl_decisions_total", "gpu"] == grown["kvttl_decisions_total", "disk"] == 1
    assert grown["kvttl_hit_tokens_total", "gpu"] == 3 * CHUNK
    assert grown["kvttl_chunks_done_total", "copied to disk"] == 3
    assert after["kvttl_chunks", "disk"] == status["chunks"]["disk"]
    assert after["kvttl_live_claims",] == sum(status["claims"].values()) > 0
    assert 0 <= after["kvttl_pass_age_seconds",] < 600
    assert METRICS.keys() - {"kvttl_" + name for name in ("shed_total",)} <= {
        name.removesuffix("_sum") for name, *_ in after
    } | {"kvttl_not_managed_total", "kvttl_moves_total", "kvttl_moved_chunks_total"}


def test_gauges_of_several_models_are_sums(server, client):
    other = Client(server.url, number=2, model="another-model")
    other.serve(prompt(21, 2))
    client.serve(prompt(21, 2))
    status = wait_until(lambda: len((s := client.status())["claims"]) == 2 and s)
    assert metrics(server)["kvttl_live_claims",] == sum(status["claims"].values())
    other.close()


def test_a_tenant_over_its_budget_gives_up_its_own(server, client):
    """The other's would go first: it ends first."""
    change(server, high=0.85, budgets={"flood": 0.4})
    mine = prompt(30, 16)
    client.serve(mine, salt="quiet", ttl=3600.0)
    for number in range(31, 41):
        client.serve(prompt(number, 10), salt="flood", pin=3600.0)
    assert client.serve(mine, salt="quiet", ttl=3600.0) == 16
    wait_until(lambda: client.status()["waiting_decisions"] == 0)
    change(server, budgets={"flood": None})
    for number in range(41, 49):
        client.serve(prompt(number, 10), salt="flood", pin=3600.0)
    assert client.look_up(mine, "quiet") < 16


def fleet(coordinator, method="GET", body=None, token=TOKEN):
    return ask(coordinator.port, "/kvttl/fleet", method, body, token)


def settings(server):
    return ask(server.http_port, "/kvttl/status")[1]["settings"]


def register(coordinator, name, ip, port):
    """As LMCache's servers do."""
    body = {"instance_id": name, "ip": ip, "http_port": port}
    headers = {"Content-Type": "application/json"}
    assert ask(coordinator.port, "/instances", "POST", body, "", **headers)[0] == 200


def leave(coordinator, name):
    assert ask(coordinator.port, f"/instances/{name}", "DELETE")[0] in (200, 204)


def test_the_fleet_shows_all_servers_and_sums_their_metrics(coordinator, server, client):
    client.serve(prompt(50, 3))
    wait_until(lambda: client.status()["waiting_decisions"] == 0)
    (name,) = wait_until(lambda: fleet(coordinator)[1]["servers"])
    register(coordinator, "again", "127.0.0.1", server.http_port)
    register(coordinator, "away", "127.0.0.1", free_port())
    status, answer = fleet(coordinator)
    assert status == 200 and answer["servers"].keys() == {name, "again", "away"}
    assert answer["servers"][name]["chunks"] == answer["servers"]["again"]["chunks"]
    assert answer["servers"]["away"]["error"].startswith("no usable answer from http://127.0.0.1:")
    of_one = metrics(server)["kvttl_decisions_total", "gpu"]
    assert answer["metrics"]["kvttl_decisions_total{tier=gpu}"] == 2 * of_one > 0
    leave(coordinator, "again")
    leave(coordinator, "away")


def test_the_fleets_settings_are_all_servers_also_of_those_that_come_later(coordinator, server):
    (name,) = wait_until(lambda: fleet(coordinator)[1]["servers"])
    register(coordinator, "away", "127.0.0.1", free_port())
    status, answer = fleet(coordinator, "PATCH", {"max_pin_s": 60.0, "heuristics": {"alpha": 0.5}})
    assert status == 200 and "no usable answer" in answer["servers"]["away"]["error"]
    assert answer["servers"][name]["max_pin_s"] == 60.0
    assert answer["settings"] == {"low": 0.7, "max_pin_s": 60.0, "heuristics": {"alpha": 0.5}}
    assert settings(server)["heuristics"] == {"alpha": 0.5} and settings(server)["low"] == 0.7
    status, answer = fleet(coordinator, "PATCH", {"max_pin_s": 30.0, "low": 0.99})
    assert status == 400 and answer["detail"].startswith(f"{name}: low must be > 0 and <= high")
    assert fleet(coordinator)[1]["settings"]["max_pin_s"] == settings(server)["max_pin_s"] == 60.0
    change(server, max_pin_s=10.0)
    register(coordinator, "away", "127.0.0.1", server.http_port)  # it has come back
    wait_until(lambda: settings(server)["max_pin_s"] == 60.0)
    leave(coordinator, "away")


def test_a_server_outside_the_fleets_networks_is_not_asked(coordinator, server):
    """Anybody may register; an address that reaches this machine and is not its loopback's."""
    with socket.create_server(("0.0.0.0", 0)) as stranger:  # noqa: S104
        stranger.setblocking(False)
        register(coordinator, "stranger", "0.0.0.0", stranger.getsockname()[1])  # noqa: S104
        assert "fleet's `networks`" in fleet(coordinator)[1]["servers"]["stranger"]["error"]
        assert fleet(coordinator, "PATCH", {"high": 0.85})[0] == 200
        leave(coordinator, "stranger")
        with pytest.raises(BlockingIOError):
            stranger.accept()


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"heuristics": {"base_tll": 1}}, "unknown setting of heuristics 'base_tll': did you mean"),
        ({"heuristics": []}, r"heuristics must be a mapping, got \[\]"),
        ({"adapters": "fs"}, "adapters must be a mapping, got 'fs'"),
        ({"log": 5}, "log must be a text, got 5"),
    ],
)
def test_wrong_settings_have_a_sentence(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        ServerSettings.of(config)


def test_a_wrong_option_stops_the_coordinator_with_a_sentence():
    config = MPCoordinatorConfig(extra_config={"kvttl": {"setings": {}}})
    with pytest.raises(ValueError, match="option of kvttl.server.fleet 'setings': did you mean"):
        Fleet.from_config(config, build_views(config))
