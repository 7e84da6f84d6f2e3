"""The routes, metrics and budgets of a real LMCache server with the module, and its fleet's."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from fastapi import Depends, FastAPI
from inside_server import Client, inside_server
from starlette.testclient import TestClient

from kvttl.server import routes

TOKEN = "of-the-tests"  # noqa: S105
CONFIG = {"heuristics": {"base_ttl": 3600.0}, "save": "demotion"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Reached by the network, with a token; room for 64 chunks in gpu."""
    options = ("--http-host", "0.0.0.0")  # noqa: S104 - that is what is tried
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


@pytest.mark.parametrize("method, path", [("GET", "/kvttl/status"), ("PATCH", "/kvttl/config")])
@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "\u00e9"])
def test_the_network_needs_the_token(server, method, path, token):
    body = {"high": 0.5} if method == "PATCH" else None
    status, answer = ask(server.http_port, path, method, body, token.encode().decode("latin-1"))
    assert status == 401 and answer["detail"].startswith("the token is missing or wrong")
    status, answer = ask(server.http_port, "/kvttl/status")
    assert status == 200 and answer["settings"]["high"] == 0.85


def test_lmcache_shows_nobody_the_token_or_the_settings(server):
    for path in ("/env", "/config", "/status"):
        status, answer = ask(server.http_port, path, token="")
        assert status == 200 and TOKEN not in str(answer)
    assert {"settings", "changes"}.isdisjoint(answer["kvttl"]) and "failures" in answer["kvttl"]


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
