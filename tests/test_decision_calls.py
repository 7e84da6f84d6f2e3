"""What a decision costs in calls to LMCache, at an HTTP service that keeps a directory."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from local_managers import CONFIG

from cache_controller import LMCacheController
from kvttl.lmcache.client import TIERS_PATH
from kvttl.lmcache.layout import DEFAULT_INSTANCE
from tiered_caching import MultiTierCache

CHUNK = 32
PLACES = {"gpu": ("l1", "dram"), "disk": ("l2", "fs"), "remote": ("l2", "resp")}
ALL = {"dram", "fs", "resp"}
HOT, WARM, COLD = ({"perplexity": p, "time_variance": 0.0} for p in (12.0, 35.0, 90.0))


class DirectoryHandler(BaseHTTPRequestHandler):
    """Coordinator and server in one: where each chunk is, deletes and prefetches."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        address = {"ip": "127.0.0.1", "http_port": self.server.server_port}
        answers = {
            "/status": {"chunk_size": CHUNK},
            "/healthcheck": {"status": "healthy"},
            TIERS_PATH: {},
            "/instances": {"instances": [{"instance_id": DEFAULT_INSTANCE, **address}]},
        }
        if self.path in answers:
            self.answer(answers[self.path])
        else:  # a server that does not decide by itself has no /kvttl/status
            self.send_error(404)

    def do_POST(self):
        body = self.body()
        hashes = [key["chunk_hash_hex"] for key in body.get("keys", ())]
        hashes += [f"{n:064x}" for n in range(len(body.get("token_ids", ())) // CHUNK)]
        for name in hashes:
            self.server.held.setdefault(name, set(ALL))
            if self.path == "/cache/prefetches":
                self.server.held[name].add("dram")
        self.answer({"results": [self.entry(name) for name in hashes], "request_id": "1"})

    def do_DELETE(self):
        body = self.body()
        gone = {"l1": {"dram"}, "l2": {body["adapter"]}, "all": {"dram", body["adapter"]}}
        for key in body["keys"]:
            self.server.held[key["chunk_hash_hex"]] -= gone[body["tier"]]
        self.answer({"ok": True, "skipped": 0})

    def entry(self, name):
        placements = [
            {"instance_id": DEFAULT_INSTANCE, "tier": tier, "backend": backend}
            for tier, backend in PLACES.values()
            if backend in self.server.held[name]
        ]
        key = {"model_name": "gemma-3-270m-it", "cache_salt": "", "chunk_hash_hex": name}
        return {"key": key, "placements": placements}

    def body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, values):
        if self.path != TIERS_PATH:  # asked once a second, not by decision
            self.server.calls.append(f"{self.command} {self.path}")
        data = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args):
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), DirectoryHandler)
    server.held, server.calls = {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Engine:
    def generate(self, prompts, sampling_params):
        sequence = SimpleNamespace(text="x", logprobs=None)
        output = {"prompt_token_ids": list(range(10 * CHUNK)), "num_cached_tokens": 0}
        return [SimpleNamespace(outputs=[sequence], **output)]


def test_a_decision_that_moves_takes_three_calls(service):
    controller = LMCacheController("127.0.0.1", service.server_port)
    with MultiTierCache(
        controller, Engine(), config=CONFIG, notify=None, sweep_every_s=None
    ) as cache:
        cache.generate_and_manage("x", None, HOT)  # finds out about server and chunk size
        for metadata, tier, moves in (
            (HOT, "gpu", 0),
            (WARM, "disk", 1),
            (COLD, "remote", 1),
            (HOT, "gpu", 1),
            (COLD, "remote", 1),
        ):
            service.calls.clear()
            cache.generate_and_manage("x", None, metadata)
            record = cache.records[-1]
            assert (record.error, record.wanted_tier, len(record.moves)) == ("", tier, moves)
            assert record.tier_after == {tier: 10}
            assert len(service.calls) <= (3 if moves else 1), service.calls
