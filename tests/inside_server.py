"""A real LMCache server with this kit's module, and clients that do what an engine does."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import torch
from lmcache.v1.multiprocess.custom_types import (
    IPCCacheServerKey,
    RegisterEngineDrivenContextPayload,
)
from lmcache.v1.multiprocess.protocols.server_module import ServerModuleCallRequest
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
from redis_fixtures import free_port
from waiting import wait_until

MODEL, CHUNK, LAYERS, HIDDEN = "inside-model", 32, 1, 16
SHAPE = (2, LAYERS, CHUNK, HIDDEN)
CHUNK_BYTES = 4 * 2 * LAYERS * CHUNK * HIDDEN  # of float32: 4096, LMCache's alignment
_WAIT_S = 60.0


class Client:
    """Looks up, stores and loads the KV cache of prompts, as an engine on CPU does."""

    def __init__(self, url, number=1, model=MODEL):
        self._client, self._number, self._model = RequestClientFactory.create(url), number, model
        self.hits: dict[str, int] = {}
        payload = RegisterEngineDrivenContextPayload(
            number, model, 1, 16, LAYERS, HIDDEN, "float32", False, CHUNK
        )
        self._call("register_kv_cache_engine_driven_context", payload)

    def _call(self, name, *args):
        return getattr(self._client, name)(*args).result(timeout=_WAIT_S)

    def _key(self, tokens, request, start, salt, configs, worker=None):
        end = len(tokens) // CHUNK * CHUNK
        options = {"num_kv_readers": 1, "request_configs": configs}
        return IPCCacheServerKey(
            self._model, 1, worker, tuple(tokens), start, end, request, salt, **options
        )

    def serve(self, tokens, request=None, salt="", generate_s=0.0, **hints):
        """Do all that a request does; returns how many of its chunks were hits."""
        request = request or f"r{time.monotonic_ns()}"
        configs = {f"lmcache.kvttl.{name}": value for name, value in hints.items()} or None
        key = self._key(tokens, request, 0, salt, configs)
        self._call("lookup", key, 1)
        hits = self._call("wait_prefetch_status", request, _WAIT_S) or 0
        if hits:
            self.load(tokens[: hits * CHUNK], request, salt)
        time.sleep(generate_s)
        if len(tokens) // CHUNK > hits:
            self.store(tokens, request, hits, salt, configs)
        self._call("end_session", request)
        return hits

    def load(self, tokens, request, salt=""):
        """Take hits over; returns what each chunk holds."""
        key = self._key(tokens, request, 0, salt, None, worker=0)
        got = self._call("prepare_retrieve", key, self._number)
        assert got.success
        self._call("commit_retrieve", key, self._number)
        return pickle.loads(got.data) if got.data else []  # noqa: S301 - of our own server

    def store(self, tokens, request, hits=0, salt="", configs=None):
        """Store the chunks from `hits` on; returns whether LMCache took them."""
        key = self._key(tokens, request, hits * CHUNK, salt, configs, worker=0)
        self._call("prepare_store", key, self._number)
        ids = [tokens[at * CHUNK] for at in range(hits, len(tokens) // CHUNK)]
        chunks = [torch.full(SHAPE, float(each)) for each in ids]
        return self._call("commit_store", key, self._number, pickle.dumps(chunks))

    def look_up(self, tokens, salt=""):
        """Return how many chunks would be hits, without using them."""
        request = f"l{time.monotonic_ns()}"
        key = self._key(tokens, request, 0, salt, None)
        self._call("lookup", key, 1)
        hits = self._call("wait_prefetch_status", request, _WAIT_S) or 0
        self._call(
            "free_lookup_locks", self._key(tokens[: hits * CHUNK], request, 0, salt, None), 1
        )
        return hits

    def ask(self, method):
        """Call the module over the engines' own transport; returns its answer's bytes."""
        answer = self._call("server_module_call", ServerModuleCallRequest(method, b""))
        assert answer.success, answer.error
        return answer.payload

    def status(self):
        return json.loads(self.ask("kvttl.status"))

    def records(self):
        lines = self.ask("kvttl.decisions").decode().splitlines()
        return [SimpleNamespace(**json.loads(line)) for line in lines]

    def generations(self):
        """Records of generations, in the order in which they were decided."""
        return [record for record in self.records() if record.kind == "generation"]

    def close(self):
        self._client.close()


@contextlib.contextmanager
def inside_server(
    folder, config=None, *, l1_chunks=64, redis=None, options=(), program=None, http=0
):
    """Run a server with the module, without an engine; yields its ZMQ url and process."""
    port, http_port = free_port(), http or free_port()
    module = {"module_path": "kvttl.server", "config": {"sweep_s": 0.05, **(config or {})}}
    adapters = [{"type": "fs", "base_path": str(Path(folder) / "disk")}]
    if redis:
        adapters.append({"type": "resp", "host": "127.0.0.1", "port": redis})
    command = [
        *(program or [sys.executable, "-m", "kvttl.server"]),
        *f"server --host 127.0.0.1 --port {port} --http-host 127.0.0.1 --http-port {http_port}"
        f" --chunk-size {CHUNK} --l1-size-gb {l1_chunks * CHUNK_BYTES / 2**30}"
        f" --instance-id inside-{port} --eviction-policy noop --eviction-trigger-watermark 1.0"
        " --supported-transfer-mode auto --no-run-script-api-enabled".split(),
        *("--server-module", json.dumps(module)),
        *(part for each in adapters for part in ("--l2-adapter", json.dumps(each))),
        *options,
    ]
    env = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    env["LMCACHE_LOG_LEVEL"] = "INFO"  # whatever an engine in this process has set
    log = Path(folder) / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
    scheme = "grpc" if "grpc" in options else "tcp"
    try:
        wait_until(lambda: _is_up(process, http_port, log))
        yield SimpleNamespace(
            url=f"{scheme}://127.0.0.1:{port}", process=process, log=log, http_port=http_port
        )
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stack_of(running, folder, config_path="config.yaml"):
    """What `kvttl.session.launch.engine` needs to know of a server to connect an engine to it."""
    from kvttl.stack.config import engine_kwargs, load_config

    port, folder = int(running.url.rpartition(":")[2]), Path(folder)
    paths = {"run_dir": str(folder / "run"), "disk_path": str(folder / "disk")}
    config = load_config(config_path, server_port=port, **paths)
    assert config.chunk_size_tokens == CHUNK, config.chunk_size_tokens
    return SimpleNamespace(engine_kwargs=functools.partial(engine_kwargs, config))


def _is_up(process, http_port, log):
    assert process.poll() is None, log.read_text()[-3000:]
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{http_port}/healthcheck", timeout=2
        ) as answer:
            return answer.status == 200
    except OSError:
        return False


def prompt(number, chunks, first=0):
    """Token ids of a prompt whose every chunk is another one's."""
    return [1000 * number + at // CHUNK + first for at in range(chunks * CHUNK)]
